"""Training under Ray Train: the worker function of trials and final runs, and starting it."""

from __future__ import annotations

import functools
import hashlib
import math
import signal
import sys
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_ego import experiment, storage
from tune_ego.checkpoint import Origin, read_checkpoint, to_bytes
from tune_ego.config import Config, dump_config, override_config
from tune_ego.console import say
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.errors import UserError, user_error_in
from tune_ego.experiment import METRIC
from tune_ego.feed.batches import READER_CPUS, on_device, ray_batches
from tune_ego.feed.windows import FeedPlan, check_fits
from tune_ego.model import build_stream, load_weights
from tune_ego.train import NonFiniteLoss, Trainer, train

TRIAL_CPUS = 0.1
"""What Ray reserves for a trial's own actor, which only starts and watches its workers."""
_METRICS_EVERY = 2.0
"""Seconds between two writes of metrics.jsonl, validations aside."""


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
    final: bool
    """Write `final/model.pt` at the end."""


def origin_of(shards: Shards) -> Origin:
    return Origin(shards.actions, shards.image_size, shards.info["settings"]["flow"])


def gpus_per_worker(config: Config, nodes: list[dict[str, float]]) -> float:
    """What `compute.gpus_per_worker` means on a cluster of these nodes."""
    if config.compute.gpus_per_worker != "auto":
        return config.compute.gpus_per_worker
    return 1.0 if any(node.get("GPU", 0) >= 1 for node in nodes) else 0.0


def live_nodes() -> list[dict[str, float]]:
    """The resources of each node of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def fitting_runs(config: Config, gpus: float, nodes: list[dict[str, float]]) -> int:
    """How many runs of this configuration the nodes hold at a time; raises `UserError` where not even one."""
    compute = config.compute
    needs = {"CPU": compute.cpus_per_worker + compute.readers * READER_CPUS, "GPU": gpus}
    spare = {"CPU": TRIAL_CPUS, "GPU": 0.0}
    places = sum(
        min(math.floor(max(0.0, node.get(kind, 0) - spare[kind]) / need) for kind, need in needs.items() if need)
        for node in nodes
    )
    if places < compute.workers:
        totals = {kind: sum(node.get(kind, 0) for node in nodes) for kind in needs}
        raise UserError(
            f"{compute.workers} worker(s) ask for {needs['CPU']:g} CPUs and {gpus:g} GPUs each, {TRIAL_CPUS:g} CPUs "
            f"beside, and the cluster has {totals['CPU']:g} CPUs and {totals['GPU']:g} GPUs on {len(nodes)} node(s); "
            "change compute.workers, compute.cpus_per_worker, compute.gpus_per_worker or the cluster"
        )
    return places // compute.workers


def fit(job: Job, callbacks: list[Any] | None = None) -> None:
    """Run a job to its end on a Ray cluster, from its last checkpoint where it has one.

    Raises `UserError` with the reason where it failed for good.
    """
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.exceptions import TrainingFailedError

    failure = experiment.read_failure(job.run)
    if failure is not None and failure.final:
        raise UserError(failure.reason)
    storage.remove(storage.join(job.run, experiment.FAILURE_FILE))  # the user may have put it right
    storage.write_text(storage.join(job.run, experiment.CONFIG_FILE), dump_config(job.config))
    compute = job.config.compute
    resources = {"CPU": compute.cpus_per_worker, **({"GPU": job.gpus} if job.gpus else {})}
    folder, _, name = job.run.rpartition("/")
    trainer = _trainer_class(job.run)(
        _worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(num_workers=compute.workers, use_gpu=job.gpus > 0, resources_per_worker=resources),
        run_config=RunConfig(
            name=name,
            storage_path=folder,
            callbacks=callbacks,
            failure_config=FailureConfig(max_failures=compute.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=1, checkpoint_score_attribute=METRIC),  # and the latest
        ),
    )
    in_main_thread = threading.current_thread() is threading.main_thread()
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise UserError(f"{job.run}: {_root_cause(error)}") from error
    finally:
        if in_main_thread:  # Ray's own handler would keep the run's controller alive
            signal.signal(signal.SIGINT, interrupt)
    failure = experiment.read_failure(job.run)
    if failure is not None:
        raise UserError(failure.reason)


def placement_group_prefix(run: str) -> str:
    """How the names of all placement groups of a run (its folder or URI) begin, and those of no other."""
    return f"tune_ego-{hashlib.sha256(run.encode()).hexdigest()[:16]}-"


def _trainer_class(run: str) -> Any:
    """Ray's TorchTrainer with named placement groups, and without two helper processes of each run.

    A trial that is stopped or dies leaves its placement group behind. Ray's `PlacementGroupCleaner` is a detached
    actor that may outlive the search (it asks the dashboard whether the trial lives, and there may be none), so the
    search removes placement groups itself, by their names. The data set manager splits data sets between workers;
    here every worker reads its own.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.util.placement_group import placement_group

    class NamedPlacementGroups(WorkerGroupCallback):  # type: ignore[misc]
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            # In the run's controller: Ray gives no other way to name the group that it makes next.
            from ray.train.v2._internal.execution.worker_group import worker_group

            name = placement_group_prefix(run) + uuid.uuid4().hex
            worker_group.placement_group = functools.partial(placement_group, name=name)

    class Trainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            unused = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
            kept = [c for c in super()._create_default_callbacks() if type(c).__name__ not in unused]
            return [*kept, NamedPlacementGroups()]

    return Trainer


def _root_cause(error: BaseException) -> str:
    """The last line of the innermost message: Ray wraps a worker's traceback in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _worker(settings: dict[str, Any]) -> None:
    """What every training process runs, in trials and final runs alike."""
    import ray.train
    import torch
    from ray.train.torch import get_device

    job: Job = settings["job"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    # Ray Data's executor is a thread of this process; the default of 5 ms makes training wait for it.
    sys.setswitchinterval(1e-3)
    if not job.gpus:
        torch.set_num_threads(math.ceil(job.config.compute.cpus_per_worker))
    shards = open_shards(job.data)
    reporter = _Reporter(job, rank)
    try:
        trainer = Trainer(job.config, origin_of(shards), get_device(), rank)
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                trainer.load(read_checkpoint(folder), checkpoint.path)
        reporter.begin(trainer.iteration)
        plan = FeedPlan.of(job.data, job.config, workers, rank)
        first = plan.first_item(trainer.iteration)
        if trainer.iteration < plan.iterations:
            batches = ray_batches(plan, first, job.config.compute.readers, _batch_bytes(job.config))
            train(trainer, plan, on_device(batches, trainer.device), reporter)
    except Exception as error:
        mistake = user_error_in(error)
        if mistake is None and not isinstance(error, NonFiniteLoss):
            raise
        # Ray would try again, and this would fail again. The driver finds the reason in the run's folder.
        reason, final = str(mistake or error), isinstance(error, NonFiniteLoss)
        if reason:
            experiment.write_failure(job.run, experiment.Failure(reason, final))
        return
    if job.final and rank == 0:
        storage.write_bytes(storage.join(job.run, experiment.MODEL_FILE), to_bytes(trainer.model.state_dict()))


def _batch_bytes(config: Config) -> int:
    channels = sum({"rgb": 3, "flow": 2}[name] for name in config.stream_names)
    return config.micro_batch * 16 * config.data.crop**2 * channels


class _Reporter:
    """Writes the run's files on rank 0 and tells Ray Train about validations on every rank."""

    def __init__(self, job: Job, rank: int) -> None:
        self.job, self.rank = job, rank
        self.lines: list[dict[str, Any]] = []
        self.written = 0.0

    def begin(self, iteration: int) -> None:
        """Forget what was logged after the checkpoint that the run goes on from."""
        if self.rank == 0:
            self.lines = [line for line in experiment.read_metrics(self.job.run) if line["iteration"] <= iteration]

    def __call__(self, metrics: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
        if self.rank == 0:
            self.lines.append(metrics)
            if checkpoint is not None or time.monotonic() - self.written > _METRICS_EVERY:
                experiment.write_metrics(self.job.run, self.lines)
                self.written = time.monotonic()
        if checkpoint is not None:
            self._report_to_ray(metrics, checkpoint)

    def _report_to_ray(self, metrics: dict[str, Any], content: dict[str, Any]) -> None:
        import ray.train

        name = experiment.checkpoint_name(metrics["iteration"])
        if self.rank:
            ray.train.report(metrics, checkpoint_dir_name=name)
            return
        with tempfile.TemporaryDirectory(prefix="tune_ego-") as folder:
            (Path(folder) / experiment.CHECKPOINT_FILE).write_bytes(to_bytes(content))
            ray.train.report(metrics, checkpoint=ray.train.Checkpoint.from_directory(folder), checkpoint_dir_name=name)


def check_run(config: Config, data: str) -> None:
    """Raise `UserError` for what can be seen before a cluster is started; tells what `init_from` gives."""
    shards = open_shards(data)
    check_fits(shards, config)
    for modality, source in initial_weights(config).items():
        stream = build_stream(modality, len(shards.actions), config.model)
        found = load_weights(stream, source)
        flow = origin_of(shards).flow
        if modality == "flow" and found.flow_method not in (None, flow):
            raise UserError(f"{source}: trained on {found.flow_method} flow, {data} has {flow}")
        counts = f"{len(found.loaded)} loaded, {len(found.left_out)} left out, {len(found.fresh)} fresh"
        say(f"{modality} starts from {source}: {counts}")


def with_found_weights(config: Config, before: Config | None = None) -> Config:
    """`init_from` as the absolute paths of files: workers have another working directory, and a run goes on.

    `before` is the same run's configuration at an earlier start: a folder still means the file that it meant then.
    """
    earlier = initial_weights(before) if before else {}
    paths = {}
    for modality, path in initial_weights(config).items():
        same = earlier.get(modality, "").startswith(f"{storage.absolute(path)}/")
        paths[f"init_from.{modality}"] = earlier[modality] if same else experiment.find_checkpoint(path)
    return override_config(config, paths, "init_from") if paths else config


def initial_weights(config: Config) -> dict[str, str]:
    """Stream -> the weights that it starts from."""
    files = {modality: getattr(config.init_from, modality) for modality in config.stream_names}
    return {modality: path for modality, path in files.items() if path is not None}
