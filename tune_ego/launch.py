"""Training under Ray Train: the worker function of trials and final runs, and starting it."""

from __future__ import annotations

import functools
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import cv2

from tune_ego import checkpoint_files, experiment, storage
from tune_ego.attention import validation_strip
from tune_ego.checkpoint import Origin, last_checkpoint, mean_weights, to_bytes, write_checkpoint
from tune_ego.config import Config, dump_config, override_config
from tune_ego.console import say
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.errors import Interrupted, StorageError, UserError, user_error_in
from tune_ego.feed.batches import begun, on_device, ray_batches
from tune_ego.feed.windows import FeedPlan, check_fits
from tune_ego.hardware import set_up_torch
from tune_ego.model import build_stream, load_weights
from tune_ego.placement import placement_group_prefix, worker_resources
from tune_ego.train import NonFiniteLoss, Notice, Trainer, train

_METRICS_EVERY = 2.0
"""Seconds between two writes of metrics.jsonl, validations aside."""
_STOP_EVERY = 1.0
"""Seconds between two looks for the file that asks a run to stop."""


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


def origin_of(shards: Shards) -> Origin:
    return Origin(shards.actions, shards.image_size, shards.info["settings"]["flow"])


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
    trainer = _trainer_class(job.run)(
        _worker,
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


def _trainer_class(run: str) -> Any:
    """Ray's TorchTrainer with named placement groups, without two helper processes of each run and its own Ctrl+C.

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

        def _register_sigint_handler(self, controller: Any) -> None:
            """None: Ray's waits for the end of the run, stays after it, and may exit with 0."""

    return Trainer


def _root_cause(error: BaseException) -> str:
    """The last line of the innermost message: Ray wraps a worker's traceback in its own."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _worker(settings: dict[str, Any]) -> None:
    """What every training process runs, in trials and final runs alike."""
    import ray.train
    from ray.train.torch import get_device

    job: Job = settings["job"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    # Ray Data's executor is a thread of this process; the default of 5 ms makes training wait for it.
    sys.setswitchinterval(1e-3)
    set_up_torch(job.config, job.gpus)
    if experiment.read_failure(job.run) is not None:
        return  # another worker's, before Ray started them all again
    shards = open_shards(job.data)
    plan = FeedPlan.of(job.data, job.config, workers, rank)
    reporter = _Reporter(job, rank, plan)
    try:
        saved = last_checkpoint(job.run)
        done = saved[0]["iteration"] if saved is not None else 0
        if done < plan.iterations:
            first = plan.first_item(done)
            batches = begun(ray_batches(plan, first, job.config.compute.readers, _batch_bytes(job.config)))
        trainer = Trainer(job.config, origin_of(shards), get_device(), rank, go_on=saved is not None)
        if saved is not None:
            trainer.load(*saved)
        reporter.begin(done)
        if done < plan.iterations:
            with watched(job.stop, rank) as notice:
                reporter.trainer = trainer
                train(trainer, plan, on_device(batches, trainer.device), reporter, notice)
    except Exception as error:
        mistake = user_error_in(error)
        if isinstance(mistake, StorageError) or (mistake is None and not isinstance(error, NonFiniteLoss)):
            raise  # Ray tries again
        # This would fail again. The driver finds the reason in the run's folder.
        reason, final = str(mistake or error), isinstance(error, NonFiniteLoss)
        if reason:
            experiment.write_failure(job.run, experiment.Failure(reason, final))
        if mistake is not None and workers > 1:
            raise  # the others may wait for this one
        return
    if job.final and rank == 0 and trainer.iteration == plan.iterations:
        last = plan.validations[-job.config.train.average_checkpoints :]
        weights = mean_weights(job.run, last) if len(last) > 1 else trainer.model.state_dict()
        storage.write_bytes(storage.join(job.run, checkpoint_files.MODEL_FILE), to_bytes(weights))


@contextmanager
def watched(stop: str, rank: int) -> Iterator[Callable[[], Notice]]:
    """What a worker should do after an iteration, from the file `stop` and from Ray's spot notices.

    Rank 0 looks for the file, in a thread of its own, and Ray tells every rank of a notice. What rank 0 heard all do:
    `Trainer.step` passes it on.
    """
    ended, asked = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(_STOP_EVERY) and not asked.is_set():
            try:
                if storage.exists(stop):
                    asked.set()
            except (OSError, UserError):  # of an object store: the next look may work
                continue

    heard = None

    def notice() -> Notice:
        from ray.train.v2._internal.execution.context import get_train_context

        nonlocal heard
        if rank != 0:
            return Notice.NONE
        if asked.is_set():
            return Notice.STOP
        # Not `ray.train.get_preemption_info`, a barrier of all workers: this is called after every iteration.
        info = get_train_context().preemption_context.preemption_info
        if info is not None and info != heard:
            heard = info
            return Notice.SAVE
        return Notice.NONE

    thread = threading.Thread(target=look, daemon=True)
    if rank == 0:
        thread.start()
    try:
        yield notice
    finally:
        ended.set()


def _batch_bytes(config: Config) -> int:
    channels = sum({"rgb": 3, "flow": 2}[name] for name in config.stream_names)
    return config.micro_batch * 16 * config.data.crop**2 * channels


class _Reporter:
    """Writes the run's files on rank 0 and tells Ray Train about validations on every rank.

    The files are ours and not Ray's: whole or not there, whenever a process dies, and read without Ray.
    """

    def __init__(self, job: Job, rank: int, plan: FeedPlan) -> None:
        self.job, self.rank = job, rank
        last = plan.validations[-job.config.train.average_checkpoints :] if job.final else ()
        self.needed = {*last} if len(last) > 1 else set()
        """Checkpoints that the final weights will be the mean of."""
        self.trainer: Trainer | None = None
        """Whose attention is drawn after validations."""
        self.lines: list[dict[str, Any]] = []
        self.written = 0.0

    def begin(self, iteration: int) -> None:
        """Forget what was logged after the checkpoint that the run goes on from, and report its validations again.

        A search's scheduler may not have heard of some of them; what it has heard changes nothing.
        """
        self.lines = [line for line in experiment.read_metrics(self.job.run) if line["iteration"] <= iteration]
        for line in [] if self.job.final else self.lines:
            if experiment.METRIC in line:
                self._tell_ray(line)

    def __call__(self, metrics: dict[str, Any] | None, checkpoint: dict[str, Any] | None) -> None:
        if self.rank == 0:
            self.lines += [metrics] if metrics else []
            if checkpoint is not None or time.monotonic() - self.written > _METRICS_EVERY:
                experiment.write_metrics(self.job.run, self.lines)
                self.written = time.monotonic()
            if checkpoint is not None:
                # After its metrics: those without one are forgotten.
                write_checkpoint(self.job.run, checkpoint, self.needed)
            if metrics and checkpoint is not None:
                self._draw(metrics["iteration"])
        if metrics and checkpoint is not None:
            self._tell_ray(metrics)

    def _draw(self, iteration: int) -> None:
        strip = validation_strip(*self.trainer.seen) if self.trainer and self.trainer.seen else None
        if strip is not None:
            png = cv2.imencode(".png", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))[1].tobytes()
            storage.write_bytes(storage.join(self.job.run, experiment.picture_file(iteration)), png)

    @staticmethod
    def _tell_ray(metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)  # returns when all workers have called it


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
