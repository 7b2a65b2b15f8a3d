"""The training loop, the same for trials and final runs. No Ray here.

It takes an iterator of batches in the order of a `FeedPlan` and a `report` callable, so it can be run, tested and
profiled without a cluster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from tune_ego.feed.batches import ClipBatch
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.results.experiment import FEED_WAIT, REPORT_SECONDS, VALIDATION_SECONDS
from tune_ego.training.trainer import Report, Signal, Trainer


def train(
    trainer: Trainer,
    plan: FeedPlan,
    batches: Iterator[ClipBatch],
    report: Report,
    read_signal: Callable[[], Signal] = lambda: Signal.NONE,
) -> None:
    """Train from the trainer's iteration to the plan's last one; `batches` begins at that iteration's first item.

    `read_signal` is called before every iteration. All workers follow the highest signal of any worker.
    """
    config = trainer.config
    timed_batches = _TimedBatches(batches)
    since, before, reporting = time.monotonic(), trainer.iteration, 0.0
    while trainer.iteration < plan.iterations:
        trainer.step(timed_batches, read_signal())
        done = trainer.iteration
        validates = plan.validates_after(done)
        if validates or done % config.train.log_every == 0:
            trainer.flush_status()
            mean = torch.stack(trainer.reduce_losses()).mean(dim=0)
            seconds = time.monotonic() - since
            metrics = {
                "iteration": done,
                **trainer.training_metrics(mean),
                "clips_per_second": (done - before) * config.train.batch_size / seconds,
                FEED_WAIT: timed_batches.seconds / seconds,
                REPORT_SECONDS: reporting,
                **trainer.memory(),
            }
            if validates:
                start = time.monotonic()
                metrics |= trainer.validate(timed_batches, plan)
                metrics[VALIDATION_SECONDS] = time.monotonic() - start
            trainer.clear_losses()
            start = time.monotonic()
            report(metrics, trainer.checkpoint() if validates else None)
            since, before = time.monotonic(), done
            timed_batches.seconds, reporting = 0.0, since - start
        if trainer.signal and not validates:
            trainer.flush_status()
            report(None, trainer.checkpoint())
        if trainer.signal == Signal.STOP:
            return


class _TimedBatches(Iterator[ClipBatch]):
    """Batches with a clock: `seconds` is how long the loop has waited for them."""

    def __init__(self, batches: Iterator[ClipBatch]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __next__(self) -> ClipBatch:
        start = time.monotonic()
        batch = next(self._batches)
        self.seconds += time.monotonic() - start
        return batch
