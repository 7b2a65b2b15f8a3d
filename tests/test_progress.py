"""Where a search or run stands, from its files alone."""

from __future__ import annotations

import json
import os
import socket
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from tests.conftest import tiny_config
from tests.stub_experiment import write_experiment
from tests.test_cli import call
from tune_ego import experiment, progress, storage
from tune_ego.config import dump_config
from tune_ego.experiment import GPU_BYTES, METRIC, TrialRecords, read_experiment
from tune_ego.progress import rung_of, rungs, search_shown, search_view, shown, speed, standing
from tune_ego.search_space import parse_space


def drive(root: Path) -> None:
    """As if this process drove the search or run."""
    record = {"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()}
    (root / "driver.json").write_text(json.dumps(record))


def half_done(root: Path) -> None:
    """The stub search of 8 trials, as if it went on: two of its trials are in the middle, and two are to come."""
    write_experiment(root, 8)
    records = TrialRecords(str(root))
    for name, state in (("00004", "running"), ("00005", "running"), ("00006", "pending"), ("00007", "pending")):
        records.note(name, state)
        lines = experiment.read_metrics(experiment.run_folder(str(root), name))
        kept = [] if state == "pending" else [{**line, GPU_BYTES: 3 << 30} for line in lines[:20]]
        experiment.write_metrics(experiment.run_folder(str(root), name), kept)
    drive(root)


def test_a_search_in_the_middle(tmp_path: Path) -> None:
    half_done(tmp_path)
    found = read_experiment(str(tmp_path))
    now = standing(found)
    assert (now.states["running"], now.states["pending"], sum(now.states.values())) == (2, 2, 8)
    assert now.best is not None and now.best.accuracy == max(trial.accuracy or 0 for trial in found.trials)
    running = [trial for trial in found.trials if trial.state == "running"]
    paces = [speed(trial.config, trial.metrics) for trial in running]
    assert all(pace is not None for pace in paces)
    for trial, pace in zip(running, paces):
        validating = 21.0 / trial.config.train.validate_every
        clips = trial.metrics[-1]["clips_per_second"]
        assert pace == pytest.approx((trial.config.train.batch_size / clips + validating, clips))
    assert now.iterations_per_second == pytest.approx(sum(1 / pace.seconds for pace in paces if pace))
    assert now.gpu_bytes == 3 << 30
    budget = found.trials[0].config.train.iterations
    longest = 4 * budget * max(pace.seconds for pace in paces if pace) / 2
    assert now.seconds_left is not None and 0 < now.seconds_left < longest

    drawn = Console(file=StringIO(), width=200)
    drawn.print(search_view(found))
    text = drawn.file.getvalue()  # type: ignore[attr-defined]
    assert "2 running, 2 pending" in text and "GiB of GPU memory a trial" in text and str(tmp_path) in text
    assert "00004" in text and "00006" not in text


def test_time_left_without_early_stopping_is_that_of_all_iterations(tmp_path: Path) -> None:
    space = parse_space(
        "base: {train: {iterations: 100, validate_every: 50, batch_size: 10}}\nsamples: 3\nscheduler: {name: fifo}", "t"
    )
    spec = {"space": space.text, "space_source": "t", "overrides": {}, "samples": 3, "trials": 3}
    storage.write_json(str(tmp_path / experiment.EXPERIMENT_FILE), spec)
    records = TrialRecords(str(tmp_path))
    records.add([{"trial": f"0000{n}", "repeat": 0, "sampled": {}} for n in range(2)])  # the third is not drawn yet
    records.note("00000", "running")
    line = {"iteration": 40, "train_loss": 1.0, "clips_per_second": 5.0}
    experiment.write_metrics(experiment.run_folder(str(tmp_path), "00000"), [line])
    (tmp_path / "driver.json").write_text(
        json.dumps({"id": "x", "host": socket.gethostname(), "pid": os.getpid(), "beat": time.time()})
    )
    now = standing(read_experiment(str(tmp_path)))
    assert now.states == {"running": 1, "pending": 2}
    assert now.seconds_left == pytest.approx((60 + 2 * 100) * 2.0)
    assert now.best is None


def test_rungs() -> None:
    space = parse_space("base: {train: {iterations: 300}}\nscheduler: {name: asha, grace: 10, reduction: 3}", "t")
    assert rungs(space.scheduler, 300) == [10, 30, 90, 270]
    assert rungs(space.scheduler, 270) == [10, 30, 90]
    assert rungs(parse_space("scheduler: {name: fifo}", "t").scheduler, 300) == []


def test_the_rung_is_the_last_that_was_validated(tmp_path: Path) -> None:
    half_done(tmp_path)
    found = read_experiment(str(tmp_path))
    trial = next(trial for trial in found.trials if trial.state == "running")
    steps = rungs(found.space.scheduler, trial.config.train.iterations)
    last = trial.validations[-1]["iteration"]
    assert rung_of(found.space, trial) == f"{sum(rung <= last for rung in steps)} of {len(steps)}"


def test_ended_trials_are_not_read_again(tmp_path: Path) -> None:
    half_done(tmp_path)
    first = read_experiment(str(tmp_path))
    known = {trial.id: trial for trial in first.trials if trial.ended}
    for trial in known.values():
        (Path(trial.run) / experiment.METRICS_FILE).unlink()
    again = read_experiment(str(tmp_path), known)
    assert [trial.metrics for trial in again.trials if trial.ended] == [trial.metrics for trial in known.values()]
    assert [trial.iteration for trial in again.trials] == [trial.iteration for trial in first.trials]


def test_without_a_terminal_a_line_now_and_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.05)
    half_done(tmp_path)
    with search_shown(str(tmp_path)):
        time.sleep(0.6)
    lines = capsys.readouterr().out.splitlines()
    assert lines and all(line.startswith("  trials 2 running, 2 pending") for line in lines)


def test_on_a_terminal_it_is_drawn_anew_and_wiped_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Console(file=StringIO(), force_terminal=True, width=80, highlight=False)
    monkeypatch.setattr(progress, "console", drawn)
    monkeypatch.setattr(progress, "_REDRAW_EVERY", 0.02)
    looks: list[int] = []

    def view() -> str:
        looks.append(1)
        if len(looks) == 2:
            raise OSError("an object store that does not answer")
        return f"look {len(looks)}"

    with shown("/nowhere", view, lambda: pytest.fail("a line")):
        time.sleep(0.5)
    text = drawn.file.getvalue()  # type: ignore[attr-defined]
    assert "look 1" in text and "look 3" in text


def test_status_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(train__iterations=10)
    (tmp_path / experiment.CONFIG_FILE).write_text(dump_config(config))
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    assert "interrupted; to go on: the same tune-ego train again" in capsys.readouterr().out
    drive(tmp_path)
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    assert "starts" in capsys.readouterr().out
    lines = [
        {"iteration": n, "train_loss": 2.0 / n, "clips_per_second": 8.0, **({METRIC: n / 10} if n % 2 == 0 else {})}
        for n in (1, 2, 3, 4, 5)
    ]
    experiment.write_metrics(str(tmp_path), lines)
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown_text = capsys.readouterr().out
    assert "5 of 10" in shown_text and "40.0 %, best 40.0 % at iteration 4" in shown_text
    assert "2.00 iterations/s, 8.0 clips/s" in shown_text and "0:00:02" in shown_text
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "model.pt").write_bytes(b"")
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown_text = capsys.readouterr().out
    assert "finished" in shown_text and "iterations/s" not in shown_text and "left" not in shown_text


def test_status_of_a_search_names_damaged_records_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    half_done(tmp_path)
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "running" in shown and "to go on" not in shown and "rung" in shown and "iterations/s" in shown
    (tmp_path / "driver.json").unlink()
    (tmp_path / "runs" / "00000" / "metrics.jsonl").write_text('{"iteration": 1}\n\nnonsense\n')
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert f"interrupted; to go on: tune-ego resume {tmp_path}" in shown and "iterations/s" not in shown
    assert "00000: damaged, and left out: metrics.jsonl is not lines of JSON" in shown
    assert "00003: iteration 21: action loss of the rgb stream is nan" in shown  # of one that failed
    assert call(monkeypatch, "export", str(tmp_path), "--out", str(tmp_path / "best.yaml")) == 2
    assert "runs/00000: its files or its entry are damaged" in capsys.readouterr().err


def test_a_narrow_terminal_shows_what_fits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    half_done(tmp_path)
    found = read_experiment(str(tmp_path))
    for width in (80, 200):
        drawn = Console(file=StringIO(), width=width)
        monkeypatch.setattr(progress, "console", drawn)
        drawn.print(search_view(found))
        text = drawn.file.getvalue()  # type: ignore[attr-defined]
        assert all(trial.id in text for trial in found.trials if trial.state != "pending") and "…" not in text
        assert ("searched parameters more" in text) == (width == 80)
