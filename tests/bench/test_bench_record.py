"""Figures of a benchmark by a clock that a test moves, and what the stub search counts."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tune_ego.bench import record as module
from tune_ego.bench.record import Benchmark, _number, in_turn
from tune_ego.bench.search import Curve, run_asha, run_fifo
from tune_ego.search_space import parse_space


def test_repeats_are_timed_apart_and_warm_ups_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two warm-ups of 100 s, then 1, 2 and 3 s of the one body, 10, 20 and 30 s of the other."""
    now = 0.0
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(module, "gc", SimpleNamespace(collect=lambda: 0))

    def body(seconds: list[float]) -> Callable[[], None]:
        def work() -> None:
            nonlocal now
            now += seconds.pop(0)

        return work

    found = in_turn(3, warm_up=2, a=body([100, 100, 1, 2, 3]), b=body([100, 100, 10, 20, 30]))
    assert found == {"a": [1, 2, 3], "b": [10, 20, 30]}


def test_medians_and_their_ratio() -> None:
    benchmark = Benchmark("test", {})
    slow = benchmark.add("slow", "s", [10.0, 1.0, 3.0, 2.0])  # between 2 and 3
    benchmark.compare("slow / fast", slow, benchmark.add("fast", "s", [0.5]))
    assert benchmark.record()["figures"][0] == {
        "name": "slow",
        "unit": "s",
        "median": 2.5,
        "least": 1.0,
        "most": 10.0,
        "repeats": 4,
    }
    assert benchmark.record()["ratios"] == [{"name": "slow / fast", "value": 5.0}]
    assert [row["name"] for row in benchmark.record()["figures"]] == ["slow", "fast"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.01234, "0.0123"), (2.5, "2.5"), (99.4, "99.4"), (100.4, "100"), (12345.6, "12,346")]
)
def test_numbers_of_a_table(value: float, text: str) -> None:
    assert _number(value) == text


def test_a_stub_curve_rises_to_half_of_its_top_at_its_half() -> None:
    """0.6 x 200 / (200 + 200) and x 600 / (600 + 200), with the noise of each place."""
    curve = Curve(0.6, 200.0, 7)
    for iteration, level in ((200, 0.3), (600, 0.45)):
        noise = random.Random(700021 + iteration).gauss(0, 0.01)
        assert curve.at(iteration) == pytest.approx(level + noise)


def test_a_search_without_rungs_spends_all_iterations(tmp_path: Path) -> None:
    """20 trials of 3 validations each, more than go on at a time; the best of all, not of the last ones."""
    text = "base: {train: {iterations: 300, validate_every: 100}}\nscheduler: {name: fifo}"
    space = parse_space(text, "t")
    curves = [Curve(0.9 if n == 3 else 0.1, 1.0, n) for n in range(20)]
    best = max(curves[3].at(iteration) for iteration in (100, 200, 300))
    outcome = run_asha(space, curves, str(tmp_path))
    assert (outcome.iterations, outcome.best, outcome.reports) == (6000, best, 60)
    assert run_fifo(space, curves) == (6000, best, 0.0, 60)


def test_a_search_with_a_rung_spends_less(tmp_path: Path) -> None:
    """One rung, at 100 of 200; falling trials, 9 of 10 below the first: each after the first ends at the rung."""
    text = "base: {train: {iterations: 200, validate_every: 100}}\nscheduler: {name: asha, grace: 100, reduction: 2}"
    curves = [Curve(0.9 - 0.08 * n, 1e-6, n) for n in range(10)]
    outcome = run_asha(parse_space(text, "t"), curves, str(tmp_path))
    assert (outcome.iterations, outcome.reports) == (200 + 9 * 100, 11)
