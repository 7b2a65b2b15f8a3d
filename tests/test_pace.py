import pytest

from tune_ego.feed import pace as pace_module
from tune_ego.feed.pace import Pace


@pytest.fixture
def clock(monkeypatch):
    """Sets what `time.monotonic` gives from now on, one after another."""
    times = []
    monkeypatch.setattr(pace_module.time, "monotonic", lambda: times.pop(0))

    def set_to(*seconds):
        times[:] = seconds

    return set_to


def taken_after(clock, interval, waited):
    """A pace whose trainer took blocks so many seconds apart, and waited so long for each."""
    clock(0.0, interval - waited, interval)
    pace = Pace()
    pace.asked()
    pace.taken()
    return pace


def test_executor_does_not_pause_long_before_the_first_block(clock):
    clock(0.0, 0.0)
    pace = Pace()
    assert pace.pause(0) == pace.pause(100) == pytest.approx(0.01)
    pace.asked()
    assert pace.pause(0) == pytest.approx(0.01)


def test_executor_pauses_for_half_of_what_lies_before_the_trainer(clock):
    pace = taken_after(clock, 0.2, 0.002)
    assert pace.pause(0) == pytest.approx(0.1)
    assert pace.pause(1) == pytest.approx(0.2)
    assert pace.pause(9) == pytest.approx(0.25)
    assert taken_after(clock, 100.0, 0.0).pause(0) == pytest.approx(0.25)
    assert taken_after(clock, 0.001, 0.0).pause(0) == pytest.approx(0.01)


def test_executor_hurries_while_the_trainer_waits(clock):
    pace = taken_after(clock, 0.2, 0.05)
    assert pace.pause(3) == pytest.approx(0.01)
    pace = taken_after(clock, 0.2, 0.0)
    clock(0.3)
    pace.asked()
    assert pace.pause(3) == pytest.approx(0.01)
