"""`tune --dry-run`."""

from __future__ import annotations

import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.search.test_search import assert_nothing_is_left, write_space
from tests.test_cli import call
from tune_ego.bench.search import draw_curves, run_asha
from tune_ego.errors import UserError
from tune_ego.results import experiment
from tune_ego.search import dry_run as plan_module
from tune_ego.search.dry_run import Probe, _any_draw, _cost, _measure, _plan, _show, show_plan
from tune_ego.space_io import parse_space

SPACE = """
base:
  train: {iterations: 100, validate_every: 30, batch_size: 12}
  compute: {workers: 4, cpus_per_worker: 1.5, readers: 3}
space:
  model.stam_depth: {grid: [1, 2, 3]}
  optimizer.lr: {loguniform: [1e-3, 1e-1]}
samples: 2
repeats: 5
scheduler: {name: asha, grace: 20, reduction: 2}
"""


def test_a_plan_worked_out_by_hand() -> None:
    space = parse_space(SPACE, "t")
    assert _plan(space, space.config(next(space.draws())), 0.5, 3) == {
        "configurations": 6,  # 2 samples x 3 grid points
        "trials": 30,
        "trials_at_a_time": 3,
        "workers": 4,
        "cpus_per_worker": 2.25,  # 1.5, and a quarter for each of 3 readers
        "gpus_per_worker": 0.5,
        "iterations_of_a_trial": 100,
        "iterations_at_most": 3000,
        "share_expected": pytest.approx(0.425),  # (20 + 20 / 2 + 40 / 4 + 20 / 8) / 100
    }


def test_a_plan_of_a_billion_samples_is_made_at_once() -> None:
    start = time.monotonic()
    space = parse_space(SPACE.replace("samples: 2", "samples: 1000000000"), "t")
    plan = _plan(space, space.config(_any_draw(space, 0)), 0.5, 3)
    assert plan["trials"] == 15 * 10**9 and time.monotonic() - start < 2


PLAN: dict[str, Any] = {"trials": 30, "trials_at_a_time": 3, "workers": 4, "gpus_per_worker": 0.5}
PROBE = Probe(start=20.0, iteration=1.5, validation=12.5)


@pytest.mark.parametrize(
    ("changes", "price", "expected"),
    [
        # 100 x 1.5 s + 4 validations (after 30, 60, 90 and 100) x 12.5 s = 200 s, and 20 s to start: 30 trials take
        # 30 x 220 s; 3 at a time. A share of 0.4 shortens the training, not the start: 30 x (20 + 80) s.
        ({"share_expected": 0.4}, None, (6600 / 3600 / 3, 3000 / 3600 / 3, None, None)),
        # 4 workers of half a GPU at 3 an hour
        ({"share_expected": 0.4}, 3.0, (6600 / 3600 / 3, 3000 / 3600 / 3, 11.0, 5.0)),
        # without GPUs the price is of a worker
        ({"share_expected": 0.4, "gpus_per_worker": 0.0}, 3.0, (6600 / 3600 / 3, 3000 / 3600 / 3, 22.0, 10.0)),
        # the share is not known: the median rule
        ({"share_expected": None, "trials_at_a_time": 1}, 3.0, (6600 / 3600, None, 11.0, None)),
    ],
)
def test_hours_and_price_worked_out_by_hand(
    changes: dict[str, Any], price: float | None, expected: tuple[float | None, ...]
) -> None:
    config = parse_space(SPACE, "t").config({"model.stam_depth@0": 1, "optimizer.lr@0": 0.01})
    names = ("hours_at_most", "hours_expected", "price_at_most", "price_expected")
    cost = _cost({**PLAN, **changes}, config, PROBE, price)
    assert cost.pop("seconds") == {"start": 20.0, "iteration": 1.5, "validation": 12.5}
    assert cost == {name: pytest.approx(value) for name, value in zip(names, expected) if value is not None}


def test_validations_of_a_whole_number_of_intervals_are_not_rounded_up() -> None:
    """100 iterations, a validation every 25: 4 of them, as 100 is the last."""
    config = parse_space(SPACE.replace("30, batch", "25, batch"), "t").config(
        {"model.stam_depth@0": 1, "optimizer.lr@0": 0.01}
    )
    assert _cost({**PLAN, "share_expected": None}, config, PROBE, None)["hours_at_most"] == pytest.approx(
        6600 / 3600 / 3
    )


def test_a_plan_as_it_is_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[list[str]] = []
    monkeypatch.setattr(plan_module, "print_table", lambda title, columns, rows: shown.extend(rows))
    space = parse_space(SPACE, "t")
    config = space.config(next(space.draws()))
    plan = _plan(space, config, 0.5, 3)
    _show(plan | _cost(plan, config, PROBE, 300.0), space, [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 4.0}])
    assert shown == [
        ["cluster now", "2 node(s), 12 CPUs, 1 GPUs"],
        ["configurations", "6 of 5 repeats each, drawn by random"],
        ["trials", "30, 3 at a time"],
        ["workers of a trial", "4: 2.25 CPUs, 0.5 GPUs each"],
        ["iterations of a trial", "100 at most"],
        ["iterations in all", "3,000 at most, with asha about 1,275"],  # 0.425 of them
        ["seconds, measured", "1.50 an iteration, 12.5 a validation, 20 to start and end a trial"],
        ["hours", "0.61 h at most, with asha about 0.29 h"],  # 30 x (20 + 85) s / 3
        ["price", "1,100.00 at most, with asha about 525.00"],
    ]
    shown.clear()
    fifo = parse_space(
        SPACE.replace("{name: asha, grace: 20, reduction: 2}", "{name: median}").replace("repeats: 5", ""), "t"
    )
    _show(_plan(fifo, config, 0.0, 1), fifo, [])
    assert shown == [
        ["cluster now", "0 node(s), 0 CPUs, 0 GPUs"],
        ["configurations", "6, drawn by random"],
        ["trials", "6, 1 at a time"],
        ["workers of a trial", "4: 2.25 CPUs, 0 GPUs each"],
        ["iterations of a trial", "100 at most"],
        ["iterations in all", "600 at most, with median depends on the curves"],
    ]


def test_a_probe_is_measured_without_its_warm_up_and_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub run of 16 lines by a clock: 4 slow iterations of 12 s, then 12 s / 24 clips/s ones; 100 s in all."""
    clock = iter((1000.0, 1100.0))
    monkeypatch.setattr(plan_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    jobs: list[Any] = []

    def fit(job: Any) -> None:
        jobs.append(job)
        speeds = [1.0] * 4 + [24.0] * 9 + [4.0] * 3  # 12 s x 4, 0.5 s x 9, 3 s x 3: 61.5 s
        lines: list[dict[str, Any]] = [{"iteration": n, "clips_per_second": speed} for n, speed in enumerate(speeds, 1)]
        lines[-1]["validation_seconds"] = 8.5
        experiment.write_metrics(job.run, lines)

    monkeypatch.setattr(plan_module, "fit", fit)
    config = parse_space(SPACE, "t").config({"model.stam_depth@0": 1, "optimizer.lr@0": 0.01})
    run = tmp_path / "search-probe"
    assert _measure(config, "/data", str(run), 0.5) == Probe(start=30.0, iteration=0.5, validation=8.5)
    (job,) = jobs
    train = job.config.train
    assert (train.iterations, train.log_every, train.validate_every, job.config.schedule.warmup) == (16, 1, 16, 0)
    assert (job.data, job.run, job.gpus, job.final) == ("/data", str(run), 0.5, False)
    assert not run.exists()
    run.mkdir()
    (run / "precious.txt").write_text("")
    with pytest.raises(UserError, match="the folder of the probe is not empty"):
        _measure(config, "/data", str(run), 0.5)
    assert (run / "precious.txt").exists()


def test_the_expected_share_is_about_what_asha_runs(tmp_path: Path) -> None:
    """0.101 is worked out in `test_progress`; stub trials through the real scheduler run 7 to 14 %."""
    text = "base: {train: {iterations: 3000, validate_every: 100}}\nscheduler: {name: asha, grace: 100, reduction: 3}"
    ran = run_asha(parse_space(text, ""), draw_curves(150, 0), str(tmp_path)).iterations / 3000 / 150
    assert ran == pytest.approx(8200 / 27 / 3000, rel=0.35)


def test_a_plan_with_hours_and_price(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    space = write_space(tmp_path, **{"train.iterations": 1000, "train.validate_every": 100})
    before = sorted(tmp_path.iterdir())
    root = str(tmp_path / "search")
    experiment.write_metrics(f"{root}-probe", [{"iteration": 16}])  # of one that was killed
    (tmp_path / "search-probe" / experiment.CONFIG_FILE).write_text("")
    plan = show_plan(space, shards, root, {}, 0, None, None, probe=True, price=3.0)
    assert sorted(tmp_path.iterdir()) == before
    assert_nothing_is_left()
    assert (plan["trials"], plan["trials_at_a_time"], plan["workers"], plan["iterations_at_most"]) == (2, 1, 1, 2000)
    seconds = plan["seconds"]
    assert all(0 < value < 60 for value in seconds.values())
    trial = seconds["start"] + 1000 * seconds["iteration"] + 10 * seconds["validation"]
    assert plan["hours_at_most"] == pytest.approx(2 * trial / 3600)
    assert plan["price_at_most"] == pytest.approx(plan["hours_at_most"] * 3)
    assert plan["hours_expected"] < plan["hours_at_most"]
    output = capsys.readouterr().out
    assert "2,000 at most, with asha about" in output and "hours" in output and "price" in output


def test_a_plan_without_a_probe_has_no_hours_and_refuses_what_cannot_be(
    tmp_path: Path, shards: str, ray_cluster: None
) -> None:
    space = write_space(tmp_path)
    assert "hours_at_most" not in show_plan(space, shards, str(tmp_path / "s"), {}, 0, None, None)
    with pytest.raises(UserError, match=r"ask for 64\.25 CPUs"):
        show_plan(space, shards, str(tmp_path / "s"), {"compute.cpus_per_worker": 64.0}, 0, None, None)


def test_the_plan_of_a_billion_samples_is_printed_at_once(
    tmp_path: Path, shards: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    space = Path(write_space(tmp_path))
    space.write_text(space.read_text() + "samples: 1000000000\n")
    search = ["tune", str(space), "--data", shards, "--storage", str(tmp_path), "--name", "search", "--dry-run"]
    start = time.monotonic()
    assert call(monkeypatch, *search) == 0
    assert time.monotonic() - start < 15
    assert re.search(r"^trials +2,000,000,000, \d+ at a time", capsys.readouterr().out, re.MULTILINE)
    assert list(tmp_path.iterdir()) == [space]
