"""Figures of benchmarks: medians, ratios, units, the stub search, and the moments of kills; nothing is measured."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tune_ego.bench import record, resume, step
from tune_ego.bench.record import Benchmark, Figure, time_in_turn
from tune_ego.bench.search import Curve, run_asha, run_fifo
from tune_ego.bench.step import (
    Measurement,
    Variant,
    _on_cpu,
    _on_gpu,
    flops_per_clip,
    largest_difference,
    random_batch,
    variant_config,
)
from tune_ego.console import percent
from tune_ego.errors import UserError
from tune_ego.model.backbones import FACTS
from tune_ego.space_io import parse_space


@pytest.mark.parametrize("warm_ups", [(1, 2), (100, 100)])
def test_the_first_runs_of_each_body_do_not_count(warm_ups: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands but in the functions: after two warm-ups a takes 3, 4 and 5 s, b ten times as long."""
    now, calls = [0.0], {"a": 0, "b": 0}
    monkeypatch.setattr(record, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(record, "gc", SimpleNamespace(collect=lambda: 0))

    def function(name: str, factor: float) -> Callable[[], None]:
        def work() -> None:
            now[0] += factor * [*warm_ups, 3, 4, 5][calls[name]]
            calls[name] += 1

        return work

    seconds = time_in_turn(3, warm_up=2, a=function("a", 1), b=function("b", 10))
    assert seconds == {"a": [3, 4, 5], "b": [30, 40, 50]} and calls == {"a": 5, "b": 5}


@pytest.mark.parametrize(
    ("values", "median", "least", "most"),
    [
        ([0.5], 0.5, 0.5, 0.5),
        ([9.0, 1.0, 2.0], 2.0, 1.0, 9.0),
        ([9.0, 1.0, 2.0, 4.0], 3.0, 1.0, 9.0),
        ([10.0, 1.0, 3.0, 2.0], 2.5, 1.0, 10.0),
    ],
)
def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two(
    values: list[float], median: float, least: float, most: float
) -> None:
    figure = Figure("f", "s", values)
    assert figure.median == median
    expected = {"name": "f", "unit": "s", "median": median, "least": least, "most": most, "repeats": len(values)}
    assert figure.record() == expected
    benchmark = Benchmark("b", {})
    benchmark.add("f", "s", values)
    assert benchmark.record()["figures"] == [expected]


@pytest.mark.parametrize(
    ("values", "reference", "ratio"),
    [
        ([1.0, 6.0, 90.0], [4.0, 1.0, 50.0], 1.5),  # medians 6 and 4
        ([10.0, 1.0, 3.0, 2.0], [0.5], 5.0),  # 2.5 and 0.5
    ],
)
def test_a_ratio_is_the_figure_over_its_yardstick(values: list[float], reference: list[float], ratio: float) -> None:
    benchmark = Benchmark("b", {})
    slow = benchmark.add("slow", "s", values)
    benchmark.compare("slow / fast", slow, benchmark.add("fast", "s", reference))
    assert [(entry.name, entry.value) for entry in benchmark.ratios] == [("slow / fast", ratio)]
    assert benchmark.record()["ratios"] == [{"name": "slow / fast", "value": ratio}]
    assert [row["name"] for row in benchmark.record()["figures"]] == ["slow", "fast"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.01234, "0.0123"),
        (2.5, "2.5"),
        (99.4, "99.4"),
        (99.94, "99.9"),
        (100.4, "100"),
        (1234.6, "1,235"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits_or_all(value: float, text: str) -> None:
    assert record._format_number(value) == text


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


def test_a_step_s_figures_have_their_units() -> None:
    """4 clips in 0.5 s and in 2 s are 8 and 2 clips/s, median 5; at 3e9 FLOP a clip 24e9 and 6e9 FLOP/s, median 15e9;
    products at 30e9 FLOP/s: half of it."""
    benchmark = Benchmark("step", {})
    variant = Variant("rgb", 4)
    speed = step._add_figures(benchmark, variant, Measurement([0.5, 2.0], [20e9, 40e9], 2_500_000_000, {}, False), 3e9)
    assert speed.values == [8, 2]
    name = "rgb, fp32, batch 4"
    assert [(figure.name, figure.unit, figure.values) for figure in benchmark.figures] == [
        (name, "clips/s", [8, 2]),
        (f"matrix product beside {name}", "GFLOP/s", [20, 40]),
        (f"peak memory, {name}", "GB", [2.5]),
    ]
    assert [(r.name, r.value) for r in benchmark.ratios] == [(f"FLOP/s, {name} / matrix product", 0.5)]
    step._add_figures(benchmark, replace(variant, compiled=True), Measurement([1.0], [1e9], 0, {}, False), 1e9)
    assert list(benchmark.facts) == ["not compiled: rgb, fp32, batch 4, compiled"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "both, fp32, batch 2"),
        ({"streams": "flow", "precision": "bf16", "batch": 24}, "flow, bf16, batch 24"),
        ({"channels_last": True, "compiled": True}, "both, fp32, batch 2, channels last, compiled"),
        (
            {"activation_checkpointing": True, "plain": True},
            "both, fp32, batch 2, activation checkpointing, straightforward",
        ),
    ],
)
def test_a_variant_s_name(changes: dict[str, Any], name: str) -> None:
    assert replace(Variant(), **changes).name == name


@pytest.mark.parametrize(
    ("precision", "setting"), [("fp32", "off"), ("tf32", "off"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_a_variant_s_configuration(precision: str, setting: str) -> None:
    config = variant_config(Variant("flow", 6, 64, precision, activation_checkpointing=True, width=0.25))
    assert (config.train.precision, config.streams, config.train.batch_size) == (setting, "flow", 6)
    assert (config.data.crop, config.model.width, config.train.compile) == (64, 0.25, "off")
    assert config.train.activation_checkpointing
    batch = random_batch(config, torch.device("cpu"))
    assert batch.rgb_BTHWC is None
    assert batch.flow_BT2HW is not None and batch.flow_BT2HW.shape == (6, 16, 2, 64, 64)
    assert batch.flow_BT2HW.float().mean() == pytest.approx(127.5, abs=2) and batch.flow_BT2HW.max() == 255


@pytest.mark.parametrize("variants", [_on_cpu, _on_gpu])
def test_each_backbone_has_a_row(variants: Callable[[Variant], list[Variant]]) -> None:
    rows = [variant for variant in variants(Variant("rgb", width=0.25)) if variant.backbone != "i3d"]
    assert [row.backbone for row in rows] == list(FACTS)
    for row in rows:
        assert row.streams == "rgb" and row.backbone in row.name
        assert variant_config(row).model.backbone == row.backbone


def test_the_operations_of_a_backbone_are_its_own() -> None:
    """Forward and backward are about three times the forward operations of 16 x 112 x 112: R(2+1)D-18 has 40.5 GMAC."""
    count = flops_per_clip("rgb", 112, 1.0, "r2plus1d_18")
    assert 5.5 < count / 40.5e9 < 6.6 and flops_per_clip("rgb", 112, 1.0, "s3d") < count / 3


def test_the_largest_difference_is_of_all_outputs_and_has_no_sign() -> None:
    ours = {"a": np.array([1.0, 2.0]), "b": np.array([0.0])}
    assert largest_difference(ours, {"a": np.array([1.5, 2.0]), "b": np.array([3.0])}) == 3
    assert largest_difference(ours, {"a": np.array([-6.0, 2.0]), "b": np.array([0.0])}) == 7


def test_a_product_s_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 n^3 operations: 2 x 8 x 8 x 8 = 1024."""
    monkeypatch.setattr(step, "_PRODUCT", {"cpu": 8})
    for precision, dtype in (("fp32", torch.float32), ("tf32", torch.float32), ("bf16", torch.bfloat16)):
        multiply, operations = step._product(torch.device("cpu"), precision)
        assert operations == 1024 and multiply().shape == (8, 8) and multiply().dtype == dtype


def test_a_checkpoint_is_half_written_until_its_checksum_is_there(tmp_path: Path) -> None:
    complete: set[str] = set()
    (tmp_path / "config.yaml").touch()
    for name in ("iteration-000004", "iteration-000008"):
        (tmp_path / name).mkdir()
    (tmp_path / "iteration-000004" / "checkpoint.json").touch()
    assert resume._is_half_written(tmp_path, complete)
    (tmp_path / "iteration-000008" / "checkpoint.json").touch()
    assert not resume._is_half_written(tmp_path, complete)
    assert complete == {"iteration-000004", "iteration-000008"}


def test_a_killed_run_may_differ_in_its_times_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name / "final").mkdir(parents=True)
        (tmp_path / name / "final/model.pt").write_bytes(b"weights")
    lines = {
        name: [{"iteration": 1, "train_loss": 0.5, "clips_per_second": speed}]
        for name, speed in ((str(tmp_path / "whole"), 9.0), (str(tmp_path / "killed"), 7.0))
    }
    monkeypatch.setattr("tune_ego.results.experiment.read_metrics", lambda run: lines[run])
    resume._compare(tmp_path / "whole", tmp_path / "killed")
    lines[str(tmp_path / "killed")][0]["train_loss"] = 0.25
    with pytest.raises(UserError, match="metrics of the killed run"):
        resume._compare(tmp_path / "whole", tmp_path / "killed")
    (tmp_path / "killed/final/model.pt").write_bytes(b"Weights")
    with pytest.raises(UserError, match="weights of the killed run"):
        resume._compare(tmp_path / "whole", tmp_path / "killed")


def test_a_file_is_newer_where_it_was_written_after_the_moment(tmp_path: Path) -> None:
    file = tmp_path / "f"
    assert not resume._is_newer(file, 0)
    file.touch()
    os.utime(file, (50, 50))
    assert resume._is_newer(file, 49) and not resume._is_newer(file, 50)


def test_the_last_logged_and_the_last_saved_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_ego.results.experiment.read_metrics", lambda run: [{"iteration": 3}, {"iteration": 9.0}])
    assert resume._last_logged(tmp_path) == 9 and resume._last_saved(tmp_path) == 0
    monkeypatch.setattr("tune_ego.results.checkpoint_files.checkpoint_iterations", lambda run: [4, 8])
    assert resume._last_saved(tmp_path) == 8
    monkeypatch.setattr("tune_ego.results.experiment.read_metrics", lambda run: [])
    assert resume._last_logged(tmp_path) == 0


def test_descendants_are_children_and_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resume.descendants(os.getpid())[0] == os.getpid()
    files = {7: "7 (a) b) S 1 0", 8: "8 (x) S 7 0", 9: "9 (y) S 8 0", 10: "10 (z) S 1 0", 11: "11 (w) S 7 0"}

    def process(pid: int, stat: str) -> Any:
        class Folder(SimpleNamespace):
            def __truediv__(self, name: str) -> Any:
                return SimpleNamespace(read_text=lambda: stat)

        return Folder(name=str(pid))

    folders = [process(*item) for item in files.items()]
    monkeypatch.setattr(resume, "Path", lambda _: SimpleNamespace(iterdir=lambda: folders))
    assert resume.descendants(7) == [7, 8, 11, 9]


@pytest.mark.parametrize(("fraction", "text"), [(0.1234, "12.3 %"), (1.0, "100.0 %"), (0.0, "0.0 %"), (None, "-")])
def test_percentages(fraction: float | None, text: str) -> None:
    assert percent(fraction) == text
