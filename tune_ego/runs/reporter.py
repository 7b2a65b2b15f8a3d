"""Files of a run that a worker writes, and its reports to Ray."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cv2

from tune_ego import storage
from tune_ego.console import say
from tune_ego.evaluation.attention_maps import validation_strip
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.results import experiment
from tune_ego.runs.job import Job
from tune_ego.training.checkpoint import snapshot, write_checkpoint
from tune_ego.training.trainer import Trainer

_METRICS_EVERY = 2.0
"""Seconds between two writes of metrics.jsonl, validations aside."""


class Reporter:
    """Writes the run's files on rank 0 and tells Ray Train about validations on every rank.

    The files are ours and not Ray's: whole or not there, whenever a process dies, and read without Ray.
    """

    def __init__(self, job: Job, rank: int, plan: FeedPlan) -> None:
        self.job, self.rank = job, rank
        last = plan.validation_iterations[-job.config.train.average_checkpoints :] if job.final else ()
        self.needed = {*last} if len(last) > 1 else set()
        """Checkpoints that the final weights will be the mean of."""
        self.trainer: Trainer | None = None
        """Trainer whose attention maps are drawn after validations."""
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
                self._write(checkpoint, waits=not self.job.final or metrics is None)
            if metrics and checkpoint is not None:
                self._draw(metrics["iteration"])
        if metrics and checkpoint is not None:
            self._tell_ray(metrics)

    def _write(self, checkpoint: dict[str, Any], waits: bool) -> None:
        """A checkpoint, after its metrics: those without one are forgotten.

        A final run goes on meanwhile. A trial may be ended as soon as it is heard of, and what was asked for between
        validations is for a machine that ends soon.
        """
        self.wait()
        if waits:
            write_checkpoint(self.job.run, checkpoint, self.needed)
        else:
            self.writing = self.pool.submit(write_checkpoint, self.job.run, snapshot(checkpoint), self.needed)

    def wait(self) -> None:
        """Until the last checkpoint is written. Raises what its writing raised, once."""
        if self.writing is not None:
            written, self.writing = self.writing, None
            written.result()

    def end(self) -> None:
        """`wait`, after an error, which a second one is not to hide."""
        try:
            self.wait()
        except Exception as error:
            say(f"{self.job.run}: its last checkpoint was not written: {error!r}")

    def _draw(self, iteration: int) -> None:
        strip = validation_strip(*self.trainer.seen) if self.trainer and self.trainer.seen else None
        if strip is not None:
            png = cv2.imencode(".png", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))[1].tobytes()
            storage.write_bytes(storage.join(self.job.run, experiment.picture_file(iteration)), png)

    @staticmethod
    def _tell_ray(metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)  # returns when all workers have called it
