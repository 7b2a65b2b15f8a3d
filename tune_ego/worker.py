"""What a training process of a run does under Ray Train, in trials and final runs alike."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import cv2
import torch

from tune_ego import checkpoint_files, experiment, storage
from tune_ego.attention import validation_strip
from tune_ego.checkpoint import Origin, last_checkpoint, mean_weights, snapshot, to_bytes, write_checkpoint
from tune_ego.config import Config
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.errors import StorageError, UserError, user_error_in
from tune_ego.feed.batches import begun, on_device, ray_batches
from tune_ego.feed.plan import FeedPlan
from tune_ego.hardware import set_up_torch
from tune_ego.launch import Job
from tune_ego.train import NonFiniteLoss, Notice, Trainer, train

_METRICS_EVERY = 2.0
"""Seconds between two writes of metrics.jsonl, validations aside."""
_STOP_EVERY = 1.0
"""Seconds between two looks for the file that asks a run to stop."""


def work(job: Job) -> None:
    """What every training process runs, in trials and final runs alike."""
    import ray.train

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
        if job.config.data.decode == "gpu" and not job.gpus:
            raise UserError("data.decode: gpu needs a GPU, and this run has none; leave it out")
        saved = last_checkpoint(job.run)
        done = saved[0]["iteration"] if saved is not None else 0
        if done < plan.iterations:
            first = plan.first_item(done)
            batches = begun(ray_batches(plan, first, job.config.compute.readers, _batch_bytes(job.config)))
        trainer = Trainer(job.config, _origin(shards), _device(job, workers), rank, go_on=saved is not None)
        if saved is not None:
            trainer.load(*saved)
        reporter.begin(done)
        if done < plan.iterations:
            with watched(job.stop, rank) as notice:
                reporter.trainer = trainer
                train(trainer, plan, on_device(batches, trainer.device), reporter, notice)
                reporter.wait()
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


def _device(job: Job, workers: int) -> torch.device:
    if workers > 1:
        from ray.train.torch import get_device

        return get_device()
    return torch.device("cuda" if job.gpus else "cpu")  # Ray shows a process its own GPUs only


def _origin(shards: Shards) -> Origin:
    return Origin(shards.actions, shards.image_size, shards.info["settings"]["flow"])


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
    if config.data.decode == "gpu":
        return config.micro_batch << 20  # JPEG files: measured, 0.72 MB a window of 320 x 240 pixels
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
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

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
            if self.writing is not None and self.writing.done():
                self.wait()  # what failed is heard of now
            self.lines += [metrics] if metrics else []
            if checkpoint is not None or time.monotonic() - self.written > _METRICS_EVERY:
                experiment.write_metrics(self.job.run, self.lines)
                self.written = time.monotonic()
            if checkpoint is not None:
                # After its metrics: those without one are forgotten.
                self.wait()
                self.writing = self.pool.submit(write_checkpoint, self.job.run, snapshot(checkpoint), self.needed)
                if not self.job.final or metrics is None:
                    self.wait()  # a trial may be ended as soon as it is heard of, and a machine after a notice
            if metrics and checkpoint is not None:
                self._draw(metrics["iteration"])
        if metrics and checkpoint is not None:
            self._tell_ray(metrics)

    def wait(self) -> None:
        """Until the last checkpoint is written: a final run goes on meanwhile. Raises what its writing raised."""
        if self.writing is not None:
            self.writing.result()

    def _draw(self, iteration: int) -> None:
        strip = validation_strip(*self.trainer.seen) if self.trainer and self.trainer.seen else None
        if strip is not None:
            png = cv2.imencode(".png", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))[1].tobytes()
            storage.write_bytes(storage.join(self.job.run, experiment.picture_file(iteration)), png)

    @staticmethod
    def _tell_ray(metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)  # returns when all workers have called it
