"""The training loop, the same for trials and final runs. It knows no Ray.

It takes an iterator of batches in the order of a `FeedPlan` and a `report` callable, so it can be run, tested and
profiled anywhere.
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
    notice: Callable[[], Signal] = lambda: Signal.NONE,
) -> None:
    """Train from the trainer's iteration to the plan's last one; `batches` begins at that iteration's first item.

    After every iteration this worker's `notice` is asked; what one worker hears all do.
    """
    config = trainer.config
    waited = _Waited(batches)
    since, before, reporting = time.monotonic(), trainer.iteration, 0.0
    while trainer.iteration < plan.iterations:
        trainer.step(waited, notice())
        done = trainer.iteration
        validates = plan.validates_after(done)
        if validates or done % config.train.log_every == 0:
            trainer.flush_status()
            mean = torch.stack(trainer.losses()).mean(dim=0)
            seconds = time.monotonic() - since
            metrics = {
                "iteration": done,
                **trainer.training_metrics(mean),
                "clips_per_second": (done - before) * config.train.batch_size / seconds,
                FEED_WAIT: waited.seconds / seconds,
                REPORT_SECONDS: reporting,
                **trainer.memory(),
            }
            if validates:
                start = time.monotonic()
                metrics |= trainer.validate(waited, plan)
                metrics[VALIDATION_SECONDS] = time.monotonic() - start
            trainer.forget_losses()
            start = time.monotonic()
            report(metrics, trainer.checkpoint() if validates else None)
            since, before = time.monotonic(), done
            waited.seconds, reporting = 0.0, since - start
        if trainer.signal and not validates:
            trainer.flush_status()
            report(None, trainer.checkpoint())
        if trainer.signal == Signal.STOP:
            return


class _Waited(Iterator[ClipBatch]):
    """Batches, and for how long the loop has waited for them."""

    def __init__(self, batches: Iterator[ClipBatch]) -> None:
        self._batches, self.seconds = batches, 0.0

    def __next__(self) -> ClipBatch:
        start = time.monotonic()
        batch = next(self._batches)
        self.seconds += time.monotonic() - start
        return batch
