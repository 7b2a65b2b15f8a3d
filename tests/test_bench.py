"""Benchmarks in a short form: what they do and write down, not how fast this machine is."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch

from tune_ego.bench.prepare import bench_prepare
from tune_ego.bench.record import Benchmark, in_turn
from tune_ego.bench.search import bench_search, draw_curves, run_fifo
from tune_ego.search_space import parse_space


def test_in_turn_warms_up_and_alternates() -> None:
    calls: list[str] = []
    seconds = in_turn(2, warm_up=1, a=lambda: calls.append("a"), b=lambda: calls.append("b"))
    assert calls == ["a", "b"] * 3
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_a_record_holds_medians_spread_and_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = Benchmark("test", {"clips": 3})
    fast = benchmark.add("fast", "clips/s", [4.0, 5.0, 9.0])
    benchmark.compare("fast / slow", fast, benchmark.add("slow", "clips/s", [2.0]))
    benchmark.show()
    shown = capsys.readouterr().out
    assert "fast / slow" in shown and "2.50" in shown and "4 to 9" in shown
    benchmark.write(str(tmp_path / "b.json"))
    record = json.loads((tmp_path / "b.json").read_text())
    assert record["figures"][0] == {
        "name": "fast",
        "unit": "clips/s",
        "median": 5.0,
        "least": 4.0,
        "most": 9.0,
        "repeats": 3,
    }
    assert record["ratios"] == [{"name": "fast / slow", "value": 2.5}]
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert record["machine"]["cores"] >= 1 and record["date"].startswith("20") and record["about"] == {"clips": 3}


def test_bench_prepare_measures_every_part(ray_cluster: None, tmp_path: Path) -> None:
    threads = cv2.getNumThreads(), torch.get_num_threads()
    benchmark = bench_prepare(clips=10, seconds=0.8, repeats=1, windows=8)
    figures = {figure.name: figure for figure in benchmark.figures}
    assert {figure.unit for figure in benchmark.figures} == {"frames/s", "ms a pair", "windows/s", "MB a window"}
    assert all(value > 0 for figure in benchmark.figures for value in figure.values)
    assert 10 * 0.8 * 24 / 2 < benchmark.about["frames"] < 10 * 0.8 * 24 * 2
    assert 0.05 < figures["feed reads"].median < 2
    ratios = {ratio.name: ratio.value for ratio in benchmark.ratios}
    assert set(ratios) == {"prepare / plain loop", "flow tvl1 / dis", "feed / bare cv2.imdecode"}
    by_hand = figures["feed, one core"].median / figures["bare cv2.imdecode, one core"].median
    assert ratios["feed / bare cv2.imdecode"] == by_hand
    assert (cv2.getNumThreads(), torch.get_num_threads()) == threads


def test_asha_spends_little_and_finds_the_best() -> None:
    """1,000 stub trials through the scheduler of `tune`, beside running each to its end."""
    benchmark = bench_search(trials=1000, seeds=3)
    share, best, many, few = (figure.median for figure in benchmark.figures)
    assert share < 0.25
    assert best > 0.99
    assert many < 20  # ms a report
    assert many < 4 * few


def test_the_yardstick_runs_every_trial_to_its_end() -> None:
    space = parse_space("base: {train: {iterations: 300, validate_every: 100}}\nspace: {seed: {choice: [1, 2]}}", "t")
    curves = draw_curves(5, 0)
    fifo = run_fifo(space, curves)
    assert fifo.iterations == 1500 and fifo.reports == 15
    assert fifo.best == max(curve.at(iteration) for curve in curves for iteration in (100, 200, 300))
