"""Times in the log of a run, by a clock that stands still but where a test moves it."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tune_ego.feed.batches import ClipBatch
from tune_ego.training import loop as module
from tune_ego.training.loop import train
from tune_ego.training.trainer import Signal, Trainer

FEED, STEP, VALIDATION, REPORT = 1.0, 3.0, 20.0, 50.0  # seconds


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


class StubTrainer:
    """A `Trainer` whose iteration takes a batch and 3 s, and its validation two batches and 20 s; loss = iteration."""

    def __init__(self, clock: Clock, start: int, **changes: object) -> None:
        self.config = tiny_config(**changes)
        self.iteration, self.signal = start, 0
        self._clock = clock
        self._losses: list[torch.Tensor] = []
        self.calls: list[str] = []

    def step(self, batches: Iterator[ClipBatch], signal: int) -> None:
        next(batches)
        self._clock.now += STEP
        self.iteration += 1
        self.signal = signal
        self._losses.append(torch.tensor([[self.iteration, 10.0 * self.iteration]]))

    def flush_status(self) -> None:
        self.calls.append("flush_status")

    def reduce_losses(self) -> list[torch.Tensor]:
        self.calls.append("losses")
        return self._losses

    def clear_losses(self) -> None:
        self._losses = []

    def training_metrics(self, losses: torch.Tensor) -> dict[str, float]:
        return {"losses": losses.tolist()}  # type: ignore[dict-item]

    def memory(self) -> dict[str, int]:
        return {"gpu_bytes": 7}

    def validate(self, batches: Iterator[ClipBatch], plan: Any) -> dict[str, float]:
        next(batches)
        next(batches)
        self._clock.now += VALIDATION
        self.calls.append("validate")
        return {"accuracy": 0.5}

    def checkpoint(self) -> dict[str, Any]:
        self.calls.append("checkpoint")
        return {"iteration": self.iteration, "losses": len(self._losses)}


def run(clock: Clock, trainer: StubTrainer, iterations: int, validated: set[int], notices: list[Signal]) -> list[Any]:
    """The lines that `train` reports; each report takes 50 s, each batch 1 s."""
    reports: list[Any] = []

    def feed() -> Iterator[Any]:
        while True:
            clock.now += FEED
            yield None

    def report(metrics: Any, checkpoint: Any) -> None:
        clock.now += REPORT
        reports.append((metrics, checkpoint))

    plan: Any = SimpleNamespace(iterations=iterations, validates_after=lambda done: done in validated)
    waiting = iter(notices)
    train(trainer, plan, feed(), report, lambda: next(waiting, Signal.NONE))  # type: ignore[arg-type]
    return reports


def test_speed_and_waiting_are_since_the_last_line(clock: Clock) -> None:
    """Iterations of 1 + 3 s, batches of 8; a line every 2 iterations, a validation after 3 and 4."""
    trainer = StubTrainer(clock, 0, train__batch_size=8, train__log_every=2)
    reports = run(clock, trainer, 4, {3, 4}, [])
    common = {"gpu_bytes": 7, "feed_wait": 0.25}
    assert [metrics for metrics, _ in reports] == [
        # 2 x 8 clips in 2 x 4 s; nothing was reported before; the mean of the losses 1 and 2
        {"iteration": 2, "losses": [[1.5, 15.0]], "clips_per_second": 2.0, "report_seconds": 0.0, **common},
        {
            "iteration": 3,
            "losses": [[3.0, 30.0]],
            "clips_per_second": 2.0,
            "report_seconds": 50.0,  # 8 clips, 4 s
            "accuracy": 0.5,
            "validation_seconds": 22.0,
            **common,  # two batches and 20 s
        },
        {
            "iteration": 4,
            "losses": [[4.0, 40.0]],
            "clips_per_second": 2.0,
            "report_seconds": 50.0,
            "accuracy": 0.5,
            "validation_seconds": 22.0,
            **common,
        },
    ]
    # A checkpoint is made after its validation, and holds no losses that are in the log.
    assert [checkpoint for _, checkpoint in reports] == [
        None,
        {"iteration": 3, "losses": 0},
        {"iteration": 4, "losses": 0},
    ]
    assert trainer.calls == ["flush_status", "losses", *["flush_status", "losses", "validate", "checkpoint"] * 2]


def test_a_resumed_run_s_first_line_is_since_its_start(clock: Clock) -> None:
    """From iteration 5 on; line 6 has 1 iteration: 4 clips in 4 s."""
    reports = run(clock, StubTrainer(clock, 5, train__log_every=3), 9, {9}, [])
    assert [(metrics["iteration"], metrics["clips_per_second"]) for metrics, _ in reports] == [(6, 1.0), (9, 1.0)]
    assert [metrics["losses"] for metrics, _ in reports] == [[[6.0, 60.0]], [[8.0, 80.0]]]


def test_speed_is_of_all_passes_and_workers(clock: Clock) -> None:
    """Batches of 8 in 2 passes: 8 clips in an iteration of 4 s."""
    reports = run(clock, StubTrainer(clock, 0, train__batch_size=8, train__accumulate=2), 1, set(), [])
    assert [metrics["clips_per_second"] for metrics, _ in reports] == [2.0]


def test_a_checkpoint_between_validations_keeps_the_losses_of_the_line_to_come(clock: Clock) -> None:
    """After iteration 2; the time that it takes counts among the next line's, as nothing else logs it."""
    trainer = StubTrainer(clock, 0, train__log_every=3)
    reports = run(clock, trainer, 3, {3}, [Signal.NONE, Signal.SAVE])
    assert reports[0] == (None, {"iteration": 2, "losses": 2})
    assert reports[1][0]["clips_per_second"] == pytest.approx(12 / 62)  # 3 x 4 clips; 3 x 4 s + 50 s
    assert (reports[1][0]["losses"], reports[1][0]["report_seconds"]) == ([[2.0, 20.0]], 0.0)
    assert len(reports) == 2


@pytest.mark.parametrize(("validated", "reported"), [({2, 4}, [2]), ({4}, [2]), (set(), [2])])
def test_a_stop_ends_the_run_with_one_checkpoint(clock: Clock, validated: set[int], reported: list[int]) -> None:
    """A validation's checkpoint is the stop's too."""
    trainer = StubTrainer(clock, 0, train__log_every=10)
    reports = run(clock, trainer, 4, validated, [Signal.NONE, Signal.STOP])
    assert [checkpoint["iteration"] for _, checkpoint in reports] == reported
    assert trainer.iteration == 2


def test_a_line_has_the_mean_losses_of_its_iterations(clock: Clock) -> None:
    """The real trainer, a line every 2 iterations: (first + second) / 2 of each stream, and their sums."""
    config = tiny_config(train__iterations=2, train__log_every=2, train__batch_size=1, optimizer__lr=0.01)
    trainer = Trainer(config, ORIGIN, CPU)
    losses: list[torch.Tensor] = []
    step = trainer.step

    def noted(batches: Iterator[ClipBatch], signal: int = 0) -> torch.Tensor:
        losses.append(step(batches, signal))
        clock.now += 2.0
        return losses[-1]

    trainer.step = noted  # type: ignore[method-assign]
    reports: list[Any] = []
    plan: Any = SimpleNamespace(iterations=2, validates_after=lambda done: False)
    train(trainer, plan, iter([batch(1), batch(2)]), lambda *line: reports.append(line))
    ((line, checkpoint),) = reports
    (rgb, flow) = ((losses[0] + losses[1]) / 2).tolist()  # (total, action, gaze)
    assert checkpoint is None and trainer.reduce_losses() == []
    assert line == {
        "iteration": 2,
        "train_loss": pytest.approx(rgb[0] + flow[0]),
        "action_loss": pytest.approx(rgb[1] + flow[1]),
        "gaze_loss": pytest.approx(rgb[2] + flow[2]),
        "learning_rate": 0.01,
        "action_loss_rgb": pytest.approx(rgb[1]),
        "gaze_loss_rgb": pytest.approx(rgb[2]),
        "learning_rate_rgb": 0.01,
        "action_loss_flow": pytest.approx(flow[1]),
        "gaze_loss_flow": pytest.approx(flow[2]),
        "learning_rate_flow": 0.01,
        "clips_per_second": 0.5,
        "feed_wait": 0.0,
        "report_seconds": 0.0,
    }
    assert rgb[0] == pytest.approx(rgb[1] + 0.1 * rgb[2])  # the gaze loss has the weight 0.1
