"""Files of a run that a worker writes, and its reports to Ray."""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import cv2

from tune_ego import storage
from tune_ego.console import percent, say
from tune_ego.evaluation.attention_maps import validation_strip
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.results import experiment
from tune_ego.runs.job import Job
from tune_ego.training.checkpoint import snapshot, write_checkpoint
from tune_ego.training.trainer import Trainer

_METRICS_EVERY = 2.0
"""Seconds between two writes of metrics.jsonl, validations aside."""


class Reporter:
    """Writer of a run's files on rank 0, which also reports validations to Ray Train on every rank.

    Metrics and checkpoints are files of tune_ego, not of Ray. Each is whole or absent whenever a process dies, and can
    be read without Ray.
    """

    def __init__(self, job: Job, rank: int, plan: FeedPlan) -> None:
        self.job, self.rank = job, rank
        self.averaged = set(job.averaged_iterations(plan))
        """Iterations whose checkpoints are kept to be averaged into the final weights."""
        self.trainer: Trainer | None = None
        """Trainer whose attention maps are drawn after validations."""
        self.lines: list[dict[str, Any]] = []
        self.written = 0.0
        self.pool = ThreadPoolExecutor(1)
        self.writing: Future[None] | None = None

    def begin(self, iteration: int) -> None:
        """Drop metrics after `iteration`, from which the run resumes, and report the validations up to it again.

        The scheduler of a search may have missed some of them. Those that it has on record change nothing.
        """
        lines = experiment.read_metrics(self.job.run, whole=False)
        self.lines = [line for line in lines if line["iteration"] <= iteration]
        for line in [] if self.job.final else self.lines:
            if experiment.METRIC in line:
                self._report_to_ray(line)

    def __call__(self, metrics: dict[str, Any] | None, checkpoint: dict[str, Any] | None) -> None:
        if self.rank == 0:
            if self.writing is not None and self.writing.done():
                self.wait()  # raises what the writing raised
            self.lines += [metrics] if metrics else []
            if checkpoint is not None or time.monotonic() - self.written > _METRICS_EVERY:
                experiment.write_metrics(self.job.run, self.lines)
                self.written = time.monotonic()
            if checkpoint is not None:
                self._write(checkpoint, waits=not self.job.final or metrics is None)
                say(_describe(metrics, checkpoint["iteration"]))
            if metrics and checkpoint is not None:
                self._draw(metrics["iteration"])
        if metrics and checkpoint is not None:
            self._report_to_ray(metrics)

    def _write(self, checkpoint: dict[str, Any], waits: bool) -> None:
        """Write a checkpoint, after the metrics up to it: a resumed run drops metrics beyond its checkpoint.

        A final run continues while the checkpoint of a validation is written. Two kinds of checkpoints are waited for:
        those of a trial, which the scheduler may end right after its report, and those that a signal asked for, as the
        machine may be about to end.
        """
        self.wait()
        if waits:
            write_checkpoint(self.job.run, checkpoint, self.averaged)
        else:
            self.writing = self.pool.submit(write_checkpoint, self.job.run, snapshot(checkpoint), self.averaged)

    def wait(self) -> None:
        """Wait until the last checkpoint is written. Raises an error of its writing, once."""
        if self.writing is not None:
            written, self.writing = self.writing, None
            written.result()

    def end(self) -> None:
        """Wait like `wait`, but print an error instead: the run's own error must not be hidden."""
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
    def _report_to_ray(metrics: dict[str, Any]) -> None:
        import ray.train

        ray.train.report(metrics)  # returns when all workers have called it


def _describe(metrics: dict[str, Any] | None, iteration: int) -> str:
    """Return a line of the run's log about a checkpoint."""
    if metrics is None:
        return f"iteration {iteration}: checkpoint, after a stop request or a spot notice"
    return f"iteration {iteration}: checkpoint; validation mean class accuracy {percent(metrics[experiment.METRIC])}"
