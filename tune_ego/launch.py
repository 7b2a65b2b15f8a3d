"""Runs on Ray Train: what is checked before, and starting them. No torch here, nor in what only watches them."""

from __future__ import annotations

import functools
import uuid
from dataclasses import dataclass
from typing import Any

from tune_ego import checkpoint_files, experiment, storage
from tune_ego.config import Config, dump_config, override_config
from tune_ego.console import say
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import Interrupted, UserError
from tune_ego.feed.windows import check_fits
from tune_ego.placement import placement_group_prefix, worker_resources


@dataclass(frozen=True)
class Job:
    """One run, as it travels to its workers."""

    config: Config
    data: str
    """The shards."""
    run: str
    """The run's folder or URI."""
    gpus: float
    """GPUs of a worker."""
    stop: str
    """The file that asks the run to write a checkpoint and end."""
    final: bool
    """Write `final/model.pt` at the end."""


def fit(job: Job, callbacks: list[Any] | None = None) -> None:
    """Run a job to its end on a Ray cluster, from its last checkpoint where it has one.

    Raises `UserError` with the reason where it failed for good, `Interrupted` where it was asked to stop.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    failure = experiment.read_failure(job.run)
    if failure is not None and failure.final:
        raise UserError(failure.reason)
    storage.remove(storage.join(job.run, experiment.FAILURE_FILE))  # the user may have put it right
    storage.write_text(storage.join(job.run, experiment.CONFIG_FILE), dump_config(job.config))
    compute = job.config.compute
    workers = compute.workers if isinstance(compute.workers, int) else tuple(compute.workers)
    resources = worker_resources(job.config, job.gpus)
    folder, _, name = job.run.rpartition("/")
    trainer = _trainer_class(job.run, compute.most_workers)(
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


def _trainer_class(run: str, workers: int) -> Any:
    """Ray's trainer with named placement groups, without two helper processes of each run and its own Ctrl+C.

    A run of one worker needs no process group, and so no torch in the two processes that only watch it. A trial that
    is stopped or dies leaves its placement group behind. Ray's `PlacementGroupCleaner` is a detached actor that may
    outlive the search (it asks the dashboard whether the trial lives, and there may be none), so the search removes
    placement groups itself, by their names. The data set manager splits data sets between workers; here every worker
    reads its own.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.util.placement_group import placement_group

    if workers > 1:
        from ray.train.torch import TorchTrainer as Base
    else:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Base

    class NamedPlacementGroups(WorkerGroupCallback):  # type: ignore[misc]
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            # In the run's controller: Ray gives no other way to name the group that it makes next.
            from ray.train.v2._internal.execution.worker_group import worker_group

            name = placement_group_prefix(run) + uuid.uuid4().hex
            worker_group.placement_group = functools.partial(placement_group, name=name)

    class Trainer(Base):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            unused = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
            kept = [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]
            return [*kept, NamedPlacementGroups()]

        def _register_sigint_handler(self, controller: Any) -> None:
            """None: Ray's waits for the end of the run, stays after it, and may exit with 0."""

    return Trainer


def _work(settings: dict[str, Any]) -> None:
    from tune_ego.worker import work  # torch

    work(settings["job"])


def _root_cause(error: BaseException) -> str:
    """The last line of the innermost message: Ray wraps a worker's traceback in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def check_run(config: Config, data: str) -> None:
    """Raise `UserError` for what can be seen before a cluster is started; tells what `init_from` gives."""
    from tune_ego.model import build_stream, load_weights

    shards = open_shards(data)
    check_fits(shards, config)
    for modality, source in initial_weights(config).items():
        stream = build_stream(modality, len(shards.actions), config.model)
        found = load_weights(stream, source)
        flow = shards.info["settings"]["flow"]
        if modality == "flow" and found.flow_method not in (None, flow):
            raise UserError(f"{source}: trained on {found.flow_method} flow, {data} has {flow}")
        left_out, fresh = (", ".join(modules) or "nothing" for modules in (found.modules_left_out, found.fresh_modules))
        say(f"{modality} starts from {source}: {len(found.loaded)} tensors; left out: {left_out}; fresh: {fresh}")


def with_found_weights(config: Config, before: Config | None = None) -> Config:
    """`init_from` as the absolute paths of files: workers have another working directory, and a run goes on.

    `before` is the same run's configuration at an earlier start: a folder still means the file that it meant then.
    """
    earlier = initial_weights(before) if before else {}
    paths = {}
    for modality, path in initial_weights(config).items():
        same = earlier.get(modality, "").startswith(f"{storage.absolute(path)}/")
        paths[f"init_from.{modality}"] = earlier[modality] if same else checkpoint_files.find_checkpoint(path)
    return override_config(config, paths, "init_from") if paths else config


def initial_weights(config: Config) -> dict[str, str]:
    """Stream -> the weights that it starts from."""
    files = {modality: getattr(config.init_from, modality) for modality in config.stream_names}
    return {modality: path for modality, path in files.items() if path is not None}
