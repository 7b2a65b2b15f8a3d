"""Progress of a search or run, from its files alone."""

from __future__ import annotations

import json
import os
import re
import time
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from tests.conftest import tiny_config
from tests.drivers import write_driver
from tests.six_trials import GIB, write_six_trials
from tests.specs import search_spec
from tests.stub_experiment import write_experiment
from tests.test_cli import call
from tune_ego import __version__, storage
from tune_ego.config_io import dump_config
from tune_ego.results import experiment, progress, trial_records
from tune_ego.results.experiment import GPU_BYTES, METRIC, VALIDATION_SECONDS, Trial
from tune_ego.results.progress import (
    Speed,
    duration,
    facts,
    run_facts,
    run_state,
    rung_of,
    search_shown,
    search_state,
    search_view,
    share_of_iterations,
    shown,
    speed,
    standing,
    status_table,
)
from tune_ego.results.reading import read_experiment
from tune_ego.results.trial_records import TrialRecords
from tune_ego.space_io import parse_space


def drive(root: Path) -> None:
    """Write the record of this process as the search's or run's driver."""
    write_driver(root, os.getpid())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_six_trials(tmp_path / "six")


def printed(view: RenderableType, width: int = 200) -> str:
    drawn = Console(file=StringIO(), width=width)
    drawn.print(view)
    return drawn.file.getvalue()  # type: ignore[attr-defined]


def test_a_search_in_the_middle(root: Path) -> None:
    """Figures of the running trials 00002 (50 of 100 iterations, batches of 20) and 00003 (40, batches of 40)."""
    now = standing(read_experiment(str(root)))
    assert now.states == {"running": 2, "pending": 2, "finished": 1, "stopped": 1, "failed": 1}
    assert list(now.states) == ["running", "pending", "finished", "stopped", "failed"]
    assert now.best is not None and (now.best.id, now.best.accuracy) == ("00000", 0.8)
    # Seconds an iteration: 20 / 40 clips/s + (2 + 4) / 2 s of validation every 20; 40 / 80 + (10 + 6) / 2 / 20.
    assert now.iterations_per_second == pytest.approx(1 / 0.65 + 1 / 0.9)
    assert now.clips_per_second == 120.0
    assert now.gpu_bytes == 4 * GIB  # the last lines' 2 and 4, not the 6 of an earlier one
    # At each rung ahead one in 2 goes on. 00002: 30 to rung 80, half of the 20 after it; 00003, which stands at rung
    # 40: 40 to rung 80, half of 20; each of the 2 pending: 20 + 20 / 2 + 40 / 4 + 20 / 8 = 42.5. Together 175
    # iterations of (0.65 + 0.9) / 2 s, two at a time.
    assert now.seconds_left == pytest.approx((40 + 50 + 85) * 0.775 / 2)


def test_facts_of_a_search_in_the_middle(root: Path) -> None:
    assert facts(read_experiment(str(root))) == [
        ("trials", "2 running, 2 pending, 1 finished, 1 stopped, 1 failed"),
        ("best so far", "80.0 % (00000: optimizer.name sgd, train.batch_size 20)"),
        ("on", "validation fold 0 (stratified) of split 1, mean class accuracy"),
        ("speed", "2.65 iterations/s, 120.0 clips/s, 4.0 GiB of GPU memory a trial"),  # 1.538 + 1.111
        ("left, about", "0:01:08"),  # 67.8 s
        ("results", str(root)),
    ]


def test_a_search_that_nobody_drives_has_no_speed(tmp_path: Path) -> None:
    found = read_experiment(str(write_six_trials(tmp_path / "six", alive=False)))
    now = standing(found)
    assert now.states == {"pending": 2, "interrupted": 2, "finished": 1, "stopped": 1, "failed": 1}
    assert (now.iterations_per_second, now.clips_per_second, now.gpu_bytes, now.seconds_left) == (0, 0, None, None)
    assert [name for name, _ in facts(found)] == ["trials", "best so far", "on", "results"]
    assert search_state(found, alive=True) == "running"
    assert search_state(found, alive=False) == f"interrupted; resume with: tune-ego resume {found.root}"
    for trial in found.trials:
        trial.state = "finished"
    assert search_state(found, alive=False).startswith("interrupted")  # 6 of 7: one was never drawn
    found.spec["trials"] = 6
    assert search_state(found, alive=False) == "over"


def test_the_view_of_a_search_has_running_trials_first_and_the_best_after_them(root: Path) -> None:
    text = printed(search_view(read_experiment(str(root))))
    rows = [line.split() for line in text.splitlines() if line.startswith("0000")]
    assert rows == [
        ["00002", "running", "2", "of", "3", "50", "of", "100", "40.0", "%", "ranger", "20"],
        ["00003", "running", "2", "of", "3", "40", "of", "100", "60.0", "%", "sgd", "40"],
        ["00000", "finished", "3", "of", "3", "100", "of", "100", "80.0", "%", "sgd", "20"],
        ["00001", "stopped", "2", "of", "3", "40", "of", "100", "20.0", "%", "ranger", "40"],
        ["00004", "failed", "0", "of", "3", "20", "of", "100", "-", "sgd", "20"],
    ]
    assert "left, about" in text and "0:01:08" in text and str(root) in text


def test_the_table_of_trials_has_the_rung_of_each(root: Path) -> None:
    """The last rung at which a trial was validated: 00004 has come to iteration 20, and was not."""
    names, rows = status_table(read_experiment(str(root)))
    assert names[:4] == ["trial", "state", "rung", "iterations"]
    assert names[5:] == ["optimizer.\nname", "train.\nbatch_size"]
    assert rows == [
        ["00000", "finished", "3 of 3", "100", "80.0 %", "sgd", "20"],
        ["00003", "running", "2 of 3", "40", "60.0 %", "sgd", "40"],
        ["00002", "running", "2 of 3", "50", "40.0 %", "ranger", "20"],
        ["00001", "stopped", "2 of 3", "40", "20.0 %", "ranger", "40"],
        ["00004", "failed", "0 of 3", "20", "-", "sgd", "20"],
        ["00005", "pending", "0 of 3", "0", "-", "ranger", "20"],
    ]


def test_time_left_without_early_stopping_is_that_of_all_iterations(tmp_path: Path) -> None:
    space = parse_space(
        "base: {train: {iterations: 100, validate_every: 50, batch_size: 10}}\nsamples: 3\nscheduler: {name: fifo}", "t"
    )
    storage.write_json(str(tmp_path / experiment.EXPERIMENT_FILE), search_spec(space.text))
    records = TrialRecords(str(tmp_path))
    records.add([{"trial": f"0000{n}", "repeat": 0, "sampled": {}} for n in range(2)])  # the third is not drawn yet
    records.note("00000", "running")
    line = {"iteration": 40, "train_loss": 1.0, "clips_per_second": 5.0}
    experiment.write_metrics(trial_records.run_folder(str(tmp_path), "00000"), [line])
    drive(tmp_path)
    now = standing(read_experiment(str(tmp_path)))
    assert now.states == {"running": 1, "pending": 2}
    assert now.seconds_left == pytest.approx((60 + 2 * 100) * 2.0)
    assert now.best is None


def test_rungs() -> None:
    space = parse_space("base: {train: {iterations: 300}}\nscheduler: {name: asha, grace: 10, reduction: 3}", "t")
    assert space.scheduler.rungs(300) == [10, 30, 90, 270]
    assert space.scheduler.rungs(270) == [10, 30, 90]
    assert parse_space("scheduler: {name: fifo}", "t").scheduler.rungs(300) == []


def test_the_share_of_iterations_that_asha_is_expected_to_run() -> None:
    """Rungs 100, 300, 900 and 2700 of 3,000; at each of them one in 3 goes on."""
    text = "base: {train: {iterations: 3000, validate_every: 100}}\nscheduler: "
    space = parse_space(text + "{name: asha, grace: 100, reduction: 3}", "")
    # 100 + 200 / 3 + 600 / 9 + 1800 / 27 + 300 / 81 = 8200 / 27
    assert share_of_iterations(space, 3000) == pytest.approx(8200 / 27 / 3000)
    assert share_of_iterations(parse_space(text + "{name: fifo}", ""), 3000) == 1
    assert share_of_iterations(parse_space(text + "{name: median}", ""), 3000) is None


@pytest.mark.parametrize(
    ("validated", "rung"),
    [([], "0 of 4"), ([9], "0 of 4"), ([10], "1 of 4"), ([29], "1 of 4"), ([20, 90], "3 of 4"), ([300], "4 of 4")],
)
def test_the_rung_is_the_last_that_was_validated(validated: list[int], rung: str) -> None:
    space = parse_space("base: {train: {iterations: 300}}\nscheduler: {name: asha, grace: 10, reduction: 3}", "t")
    lines = [{"iteration": iteration, METRIC: 0.1} for iteration in validated]
    trial = Trial("0", "running", "", {}, 0, space.config({}), [*lines, {"iteration": 300}])
    assert rung_of(space, trial) == rung
    assert rung_of(parse_space("scheduler: {name: fifo}", "t"), trial) == "-"


def test_ended_trials_are_not_read_again(root: Path) -> None:
    first = read_experiment(str(root))
    known = {trial.id: trial for trial in first.trials if trial.ended}
    assert list(known) == ["00000", "00001", "00004"]
    for trial in known.values():
        (Path(trial.run) / experiment.METRICS_FILE).unlink()
    again = read_experiment(str(root), known)
    assert [trial.iteration for trial in again.trials] == [100, 40, 50, 40, 20, 0]


def test_without_a_terminal_a_line_now_and_then(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All facts but the last, in which folder the results are."""
    monkeypatch.setattr(progress, "_LINE_EVERY", 0.02)
    text = ""
    with search_shown(str(root)):
        for _ in range(500):
            if text := text + capsys.readouterr().out:
                break
            time.sleep(0.02)
    assert text.splitlines()[0] == (
        "  trials 2 running, 2 pending, 1 finished, 1 stopped, 1 failed; "
        "best so far 80.0 % (00000: optimizer.name sgd, train.batch_size 20); "
        "on validation fold 0 (stratified) of split 1, mean class accuracy; "
        "speed 2.65 iterations/s, 120.0 clips/s, 4.0 GiB of GPU memory a trial; left, about 0:01:08"
    )


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
        for _ in range(500):
            if len(looks) > 2:
                break
            time.sleep(0.02)
    text = drawn.file.getvalue()  # type: ignore[attr-defined]
    assert "look 1" in text and "look 3" in text


def test_status_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(train__iterations=10)
    (tmp_path / experiment.CONFIG_FILE).write_text(dump_config(config))
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    assert "interrupted; resume with the same tune-ego train command" in capsys.readouterr().out
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


@pytest.mark.parametrize("kind", ["search", "run"])
@pytest.mark.parametrize(("version", "later"), [("0.0.1", []), ("0.0.1", ["0.0.2", __version__]), (__version__, [])])
def test_status_shows_the_versions_that_ran_a_search_or_run(
    kind: str,
    version: str,
    later: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Only where this version is not the one that ran all of it."""
    record = {"data": "/nowhere/shards", "version": version, **({"resumed_with": later} if later else {})}
    if kind == "search":
        write_six_trials(tmp_path)
        file = tmp_path / experiment.EXPERIMENT_FILE
        file.write_text(json.dumps({**json.loads(file.read_text()), **record}))
    else:
        (tmp_path / experiment.CONFIG_FILE).write_text(dump_config(tiny_config()))
        experiment.write_metrics(str(tmp_path), [{"iteration": 1, "train_loss": 2.0, "clips_per_second": 8.0}])
        storage.write_json(tmp_path / experiment.RUN_FILE, record)
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown_rows = re.findall(r"^versions +(.*?) *$", capsys.readouterr().out, re.MULTILINE)
    words = ", then ".join([version, *later])
    assert shown_rows == ([] if version == __version__ else [f"tune_ego {words}; this is {__version__}"])


def test_facts_of_a_run(tmp_path: Path) -> None:
    """Batches of 4 at 8 clips/s: 0.5 s; (3 + 5) / 2 s of validation every 2 iterations: 2 s; 2.5 s, 5 iterations."""
    config = tiny_config(train__iterations=10)
    run = str(tmp_path)
    assert run_facts(config, run) == [("run", "starts"), ("results", run)]
    assert run_facts(config, run, "failed") == [("run", "failed; nothing is logged"), ("results", run)]
    lines: list[dict[str, float]] = [
        {"iteration": n, "train_loss": 2.0 / n, "clips_per_second": 1.0 if n < 5 else 8.0} for n in (1, 2, 3, 4, 5)
    ]
    lines[1] |= {METRIC: 0.4, VALIDATION_SECONDS: 3.0}
    lines[3] |= {METRIC: 0.3, VALIDATION_SECONDS: 5.0}
    lines[4] |= {GPU_BYTES: 3 * GIB}
    experiment.write_metrics(run, lines)
    rows = [
        ("iteration", "5 of 10"),
        ("training loss", "0.400"),
        ("validation mean class accuracy", "30.0 %, best 40.0 % at iteration 2"),
    ]
    pace = "0.40 iterations/s, 8.0 clips/s, 3.0 GiB of GPU memory"
    assert run_facts(config, run) == [*rows, ("speed", pace), ("left, about", "0:00:12"), ("results", run)]
    assert run_facts(config, run, "finished") == [("run", "finished"), *rows, ("results", run)]
    assert speed(config, lines) == Speed(2.5, 8.0)
    assert speed(config, lines[:1]) == Speed(4.0, 1.0)
    assert speed(config, []) is None


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00:00"), (59.6, "0:01:00"), (90061, "1 day, 1:01:01")])
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_state_of_a_run(tmp_path: Path) -> None:
    """A trial's is its entry in the search's records; another run's comes from its own files."""
    root = write_six_trials(tmp_path / "six")
    states = {trial.name: run_state(str(trial)) for trial in sorted((root / "runs").iterdir())}
    assert states == {
        "00000": "finished",
        "00001": "stopped",
        "00002": "running",
        "00003": "running",
        "00004": "failed",
        "00005": "pending",
    }
    (root / "driver.json").unlink()
    assert run_state(str(root / "runs" / "00002")) == "interrupted"
    assert run_state(str(root / "runs" / "00005")) == "pending"
    assert run_state(str(root / "runs" / "00009")) == "unknown"


def test_status_of_a_search_names_damaged_records_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_six_trials(tmp_path)
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert "running" in shown and "resume with" not in shown and "rung" in shown and "iterations/s" in shown
    (tmp_path / "driver.json").unlink()
    (tmp_path / "runs" / "00000" / "metrics.jsonl").write_text('{"iteration": 1}\n\nnonsense\n')
    assert call(monkeypatch, "status", str(tmp_path)) == 0
    shown = capsys.readouterr().out
    assert f"interrupted; resume with: tune-ego resume {tmp_path}" in shown and "iterations/s" not in shown
    damage = f"00000: damaged, and left out: {tmp_path}/runs/00000/metrics.jsonl: damaged: line 2: "
    assert damage in shown.replace("\n", "")
    assert "00004: out of memory" in shown  # of one that failed
    assert call(monkeypatch, "export", str(tmp_path), "--out", str(tmp_path / "best.yaml")) == 0
    assert damage in capsys.readouterr().out.replace("\n", "")


def test_a_narrow_terminal_shows_what_fits_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_experiment(tmp_path, 8)
    found = read_experiment(str(tmp_path))
    for width in (80, 300):
        drawn = Console(file=StringIO(), width=width)
        monkeypatch.setattr(progress, "console", drawn)
        drawn.print(search_view(found))
        text = drawn.file.getvalue()  # type: ignore[attr-defined]
        assert all(trial.id in text for trial in found.trials) and "…" not in text
        assert ("searched parameters more" in text) == (width == 80)
