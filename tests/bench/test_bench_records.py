"""Numbers of the benchmarks: medians, ratios, units, and the moments of kills; nothing is measured here."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tune_ego.bench import record, resume, step
from tune_ego.bench.record import Benchmark, Figure, in_turn
from tune_ego.bench.step import Measured, Variant, config_of, largest_difference, made_up_batch
from tune_ego.console import percent
from tune_ego.errors import UserError


def test_the_median_of_an_even_number_is_the_mean_of_the_middle_two() -> None:
    assert Figure("f", "s", [9.0, 1.0, 2.0]).median == 2
    assert Figure("f", "s", [9.0, 1.0, 2.0, 4.0]).median == 3
    assert Figure("f", "s", [9.0, 1.0, 2.0, 4.0]).record() == {
        "name": "f",
        "unit": "s",
        "median": 3.0,
        "least": 1.0,
        "most": 9.0,
        "repeats": 4,
    }


def test_a_ratio_is_the_figure_over_its_yardstick() -> None:
    benchmark = Benchmark("b", {})
    benchmark.compare("a / b", Figure("a", "s", [1.0, 6.0, 90.0]), Figure("b", "s", [4.0, 1.0, 50.0]))
    assert [(ratio.name, ratio.value) for ratio in benchmark.ratios] == [("a / b", 1.5)]  # medians 6 and 4


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.01234, "0.0123"), (2.5, "2.5"), (99.94, "99.9"), (100.4, "100"), (1234.6, "1,235")],
)
def test_numbers_have_three_digits_or_all(value: float, text: str) -> None:
    assert record._number(value) == text


def test_the_first_runs_of_each_body_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that stands but in the bodies: a takes 1, 2, 3, ... s, b ten times as long; two runs warm up."""
    now, calls = [0.0], {"a": 0, "b": 0}

    def body(name: str, factor: float) -> None:
        calls[name] += 1
        now[0] += factor * calls[name]

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    monkeypatch.setattr("gc.collect", lambda: 0)
    seconds = in_turn(3, warm_up=2, a=lambda: body("a", 1), b=lambda: body("b", 10))
    assert seconds == {"a": [3, 4, 5], "b": [30, 40, 50]} and calls == {"a": 5, "b": 5}


def test_a_step_s_figures_have_their_units() -> None:
    """4 clips in 0.5 s and in 2 s are 8 and 2 clips/s, median 5; at 3e9 FLOP a clip 24e9 and 6e9 FLOP/s, median 15e9;
    products at 30e9 FLOP/s: half of it."""
    benchmark = Benchmark("step", {})
    variant = Variant("rgb", 4)
    speed = step._note(benchmark, variant, Measured([0.5, 2.0], [20e9, 40e9], 2_500_000_000, {}, False), 3e9)
    assert speed.values == [8, 2]
    name = "rgb, fp32, batch 4"
    assert [(figure.name, figure.unit, figure.values) for figure in benchmark.figures] == [
        (name, "clips/s", [8, 2]),
        (f"matrix product beside {name}", "GFLOP/s", [20, 40]),
        (f"peak memory, {name}", "GB", [2.5]),
    ]
    assert [(r.name, r.value) for r in benchmark.ratios] == [(f"FLOP/s, {name} / matrix product", 0.5)]
    step._note(benchmark, replace(variant, compiled=True), Measured([1.0], [1e9], 0, {}, False), 1e9)
    assert list(benchmark.about) == ["not compiled: rgb, fp32, batch 4, compiled"]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "both, fp32, batch 2"),
        ({"streams": "flow", "precision": "bf16", "batch": 24}, "flow, bf16, batch 24"),
        ({"channels_last": True, "compiled": True}, "both, fp32, batch 2, channels last, compiled"),
        ({"recomputes": True, "plain": True}, "both, fp32, batch 2, activation checkpointing, straightforward"),
    ],
)
def test_a_variant_s_name(changes: dict[str, Any], name: str) -> None:
    assert replace(Variant(), **changes).name == name


@pytest.mark.parametrize(
    ("precision", "setting"), [("fp32", "off"), ("tf32", "off"), ("bf16", "bf16"), ("fp16", "fp16")]
)
def test_a_variant_s_configuration(precision: str, setting: str) -> None:
    config = config_of(Variant("flow", 6, 64, precision, recomputes=True, width=0.25))
    assert (config.train.precision, config.streams, config.train.batch_size) == (setting, "flow", 6)
    assert (config.data.crop, config.model.width, config.train.compile) == (64, 0.25, "off")
    assert config.train.activation_checkpointing
    batch = made_up_batch(config, torch.device("cpu"))
    assert batch.rgb_BTHWC is None
    assert batch.flow_BT2HW is not None and batch.flow_BT2HW.shape == (6, 16, 2, 64, 64)
    assert batch.flow_BT2HW.float().mean() == pytest.approx(127.5, abs=2) and batch.flow_BT2HW.max() == 255


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
    whole: set[str] = set()
    (tmp_path / "config.yaml").touch()
    for name in ("iteration-000004", "iteration-000008"):
        (tmp_path / name).mkdir()
    (tmp_path / "iteration-000004" / "checkpoint.json").touch()
    assert resume._is_half_written(tmp_path, whole)
    (tmp_path / "iteration-000008" / "checkpoint.json").touch()
    assert not resume._is_half_written(tmp_path, whole)
    assert whole == {"iteration-000004", "iteration-000008"}


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
