"""Checking, resolving and starting runs on Ray Train. No torch here: the driver starts without it."""

from __future__ import annotations

from typing import Any

from tune_ego import ray_private, storage
from tune_ego.config import Config
from tune_ego.config_io import dump_config, override_config
from tune_ego.console import say
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.errors import Interrupted, UserError
from tune_ego.feed.reader import check_fits
from tune_ego.results import checkpoint_files, experiment
from tune_ego.runs.job import Job
from tune_ego.runs.placement import placement_group_prefix, worker_resources


def fit(job: Job, callbacks: list[Any] | None = None) -> None:
    """Run a job on a Ray cluster to its end, from its last checkpoint if it has one.

    Raises `UserError` with the reason where the run failed, `Interrupted` where the stop file ended it.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError

    failure = experiment.read_failure(job.run)
    if failure is not None and failure.final:
        raise UserError(failure.reason)
    storage.remove(storage.join(job.run, experiment.FAILURE_FILE))  # the user may have mended the cause
    storage.write_text(storage.join(job.run, experiment.CONFIG_FILE), dump_config(job.config))
    compute = job.config.compute
    workers = compute.workers if isinstance(compute.workers, int) else tuple(compute.workers)
    resources = worker_resources(job.config, job.gpus)
    folder, _, name = job.run.rpartition("/")
    trainer = ray_private.trainer_class(placement_group_prefix(job.run), compute.most_workers)(
        _work,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=job.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            callbacks=callbacks,
            failure_config=FailureConfig(max_failures=compute.max_failures, max_preemption_failures=-1),
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        failure = experiment.read_failure(job.run)
        if failure is not None:
            raise UserError(failure.reason) from error
        storage.write_text(storage.join(job.run, experiment.ERROR_FILE), str(error))
        raise UserError(f"{job.run}: {_root_cause(error)} (all of it in {experiment.ERROR_FILE} there)") from error
    failure = experiment.read_failure(job.run)
    if failure is not None:
        raise UserError(failure.reason)
    if job.config.train.iterations not in checkpoint_files.checkpoint_iterations(job.run):
        raise Interrupted(job.run)


def _work(settings: dict[str, Any]) -> None:
    from tune_ego.runs.worker import work  # torch

    work(settings["job"])


def _root_cause(error: BaseException) -> str:
    """Return the last line of the message, the innermost error: Ray wraps a worker's traceback in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def resolve_run(config: Config, data: str, before: Config | None = None) -> Config:
    """Resolve the starting weights of a run and check it against the shards, before a cluster is started.

    `before` is the configuration of the same run at an earlier start, which has read its weights. Raises `UserError`.
    """
    config = resolve_weights(config, before)
    check_run(config, data, weights=before is None)
    return config


def check_same_data(shards: Shards, fingerprint: str, where: str) -> None:
    """Raise `UserError` where shards are not those that the run or search `where` was started on, wherever they lie."""
    if shards.fingerprint != fingerprint:
        raise UserError(
            f"{where}: {shards.root} is another data set than it was started on: settings, class names or clips differ"
        )


def describe_micro_batches(before: Config, after: Config) -> str:
    """Return a warning if a run has smaller micro-batches than its configuration's file; else ""."""
    if after.micro_batch >= before.micro_batch:
        return ""
    workers = after.compute.most_workers
    change = f"{after.micro_batch} samples in a forward pass instead of {before.micro_batch}"
    text = f"Note: {workers} workers: {change}, and BatchNorm normalises over these"
    if before.passes % workers == 0:
        return f"{text}. To keep {before.micro_batch}: --set train.accumulate={before.passes // workers}"
    return f"{text}. A larger train.batch_size keeps them; on GPUs model.sync_bn: true normalises over all workers"


def check_run(config: Config, data: str, *, weights: bool = True) -> None:
    """Raise `UserError` where shards or starting weights do not fit a run; print which tensors `init_from` loads.

    Without `weights` the starting weights are not checked.
    """
    from tune_ego.model import build_stream, load_weights
    from tune_ego.training.optim import check_optimizer

    shards = open_shards(data)
    check_fits(shards, config)
    check_optimizer(config.optimizer)
    without = [modality for modality in config.stream_names if modality not in initial_weights(config)]
    if config.train.freeze_trunk_for and without:
        raise UserError(
            f"train.freeze_trunk_for: without starting weights the trunk of {' and '.join(without)} would be frozen at "
            f"random ones; set init_from.{without[0]}"
        )
    for modality, source in initial_weights(config).items() if weights else ():
        stream = build_stream(modality, len(shards.actions), config.model)
        loaded = load_weights(stream, source)
        flow = shards.info["settings"]["flow"]
        if modality == "flow" and loaded.flow_method not in (None, flow):
            raise UserError(f"{source}: trained on {loaded.flow_method} flow, {data} has {flow}")
        left_out, fresh = (
            ", ".join(modules) or "nothing" for modules in (loaded.modules_left_out, loaded.fresh_modules)
        )
        say(f"{modality} starts from {source}: {len(loaded.loaded)} tensors; left out: {left_out}; fresh: {fresh}")


def resolve_weights(config: Config, before: Config | None = None) -> Config:
    """Return the configuration with the absolute path of a file for each entry of `init_from`.

    Workers have another working directory. `before` is the configuration of the same run at an earlier start, whose
    choice of a file in a folder is kept.
    """
    earlier = initial_weights(before) if before else {}
    paths = {}
    for modality, path in initial_weights(config).items():
        same = earlier.get(modality, "").startswith(f"{storage.absolute(path)}/")
        paths[f"init_from.{modality}"] = earlier[modality] if same else checkpoint_files.find_checkpoint(path)
    return override_config(config, paths, "init_from") if paths else config


def initial_weights(config: Config) -> dict[str, str]:
    """Return the source of each stream's starting weights; no entry for streams that start with fresh weights."""
    files = {modality: getattr(config.init_from, modality) for modality in config.stream_names}
    return {modality: path for modality, path in files.items() if path is not None}
