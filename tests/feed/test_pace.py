from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from tune_ego.feed.pace import Pace

Clock = Callable[..., None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Sets what `time.monotonic` gives from now on, one after another."""
    times: list[float] = []
    monkeypatch.setattr(time, "monotonic", lambda: times.pop(0) if times else 0.0)

    def set_to(*seconds: float) -> None:
        times[:] = seconds

    return set_to


def taken_after(clock: Clock, interval: float, waited: float) -> Pace:
    """A pace whose trainer took blocks so many seconds apart, and waited so long for each."""
    clock(0.0, interval - waited, interval)
    pace = Pace()
    pace.request_block()
    pace.block_received()
    return pace


def test_executor_does_not_pause_long_before_the_first_block(clock: Clock) -> None:
    clock(0.0, 0.0)
    pace = Pace()
    assert pace.pause(0) == pace.pause(100) == pytest.approx(0.01)
    pace.request_block()
    assert pace.pause(0) == pytest.approx(0.01)


def test_executor_pauses_for_half_of_what_lies_before_the_trainer(clock: Clock) -> None:
    pace = taken_after(clock, 0.2, 0.002)
    assert pace.pause(0) == pytest.approx(0.1)
    assert pace.pause(1) == pytest.approx(0.2)
    assert pace.pause(9) == pytest.approx(0.25)
    assert taken_after(clock, 100.0, 0.0).pause(0) == pytest.approx(0.25)
    assert taken_after(clock, 0.001, 0.0).pause(0) == pytest.approx(0.01)


def test_executor_hurries_while_the_trainer_waits(clock: Clock) -> None:
    pace = taken_after(clock, 0.2, 0.05)
    assert pace.pause(3) == pytest.approx(0.01)
    pace = taken_after(clock, 0.2, 0.0)
    clock(0.3)
    pace.request_block()
    assert pace.pause(3) == pytest.approx(0.01)


@pytest.mark.parametrize(("waited", "pause"), [(0.0099, 0.1), (0.0101, 0.01)])
def test_a_trainer_that_waited_a_twentieth_of_the_time_waits(clock: Clock, waited: float, pause: float) -> None:
    assert taken_after(clock, 0.2, waited).pause(0) == pytest.approx(pause)


def test_the_interval_is_that_of_the_last_two_blocks(clock: Clock) -> None:
    pace = taken_after(clock, 0.2, 0.0)
    clock(0.3, 0.3, 0.35, 0.35)
    pace.request_block()
    pace.block_received()
    assert pace.pause(1) == pytest.approx(0.1)  # 0.3 - 0.2, times two blocks, halved
    pace.request_block()
    pace.block_received()
    assert pace.pause(1) == pytest.approx(0.05)
