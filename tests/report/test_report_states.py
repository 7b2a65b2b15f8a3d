"""A report of a search in any state, and of one whose records are damaged."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.drivers import write_driver
from tests.report.test_report import Page, check_page, without_charts
from tests.stub_experiment import write_experiment
from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.report.page import SECTIONS
from tune_ego.report.write import write_report
from tune_ego.results.decisions import Decision, trial_decisions
from tune_ego.results.experiment import METRIC, Experiment, Trial, read_metrics
from tune_ego.results.reading import _check_end, read_experiment
from tune_ego.results.trial_records import TrialRecords


def test_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Running, interrupted, all failed and empty searches say so, and have all sections."""
    without_charts(monkeypatch)
    root, out = tmp_path / "search", tmp_path / "report.html"

    def state() -> str:
        state = str(write_report(str(root), str(out))["experiment"]["state"])
        check_page(out, SECTIONS)
        return state

    def note(changes: dict[str, object]) -> None:
        records = json.loads((root / "trials.json").read_text())
        storage.write_json(str(root / "trials.json"), {**records, **changes})

    write_experiment(root, 4)
    assert state() == "over: 4 of 4 trials have ended"
    records = TrialRecords(str(root))
    for name in ("00002", "00003"):
        records.note(name, "running")
    assert state() == f"interrupted: 2 of 4 trials have ended; to resume: tune-ego resume {root}"
    write_driver(root, elsewhere=True)
    assert state() == "running: 2 of 4 trials have ended; this report shows the results so far"
    for content in ("{}", "[]", "{", '{"beat": "x"}'):
        (root / "driver.json").write_text(content)
        assert state().startswith("interrupted: 2 of 4 trials")
    (root / "driver.json").unlink()
    for trial in read_experiment(str(root)).trials:
        records.note(trial.id, "failed", "out of memory")
        shutil.rmtree(trial.run)
    monkeypatch.undo()  # with their drawings
    assert state() == "over, and every trial failed; the first one failed with: out of memory"
    assert "There is no best configuration: no trial has been validated" in Page(out.read_text()).text
    note({"00003": None})
    assert state().startswith("interrupted: 3 of 4 trials have ended")
    (root / "trials.json").unlink()
    assert state() == "empty: no trial has been started, or none can be read"


ENTRIES: dict[str, dict[str, object]] = {
    "entry": {"sampled": None},
    "unknown": {"sampled": {"a@0": 1}},
    "state": {"state": None},
    "other_state": {"state": "lost"},
    "short": {"state": "finished"},
}
DECISIONS = {
    "decisions": "[[1, 2",
    "words": '[["a", "b", "c", "d", "e"]]',
    "nothing": '[[1, "00001", null, null, "STOP"]]',
    "mapping": '{"a": 1}',
}
REASONS = {
    "nan": "metrics.jsonl: damaged: line 1: gaze_loss is nan",
    "no_iteration": "metrics.jsonl: damaged: line 2: no iteration",
    "empty": "the trial was stopped early, but .*metrics.jsonl has no line",
    "short": "the trial has finished, but .*metrics.jsonl ends at iteration 450 of 1500",
    "state": "state: Input should be .*, found None",
    "other_state": "state: Input should be .*, found 'lost'",
    **dict.fromkeys(DECISIONS, "decisions.json: damaged"),
}


@pytest.mark.parametrize("damage", ["metrics", "cut", "nan", "no_iteration", "empty", *ENTRIES, *DECISIONS])
def test_a_damaged_trial_is_named_and_the_others_shown(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not shown itself, nor counted among what was saved."""
    without_charts(monkeypatch)
    root, out = tmp_path / "search", tmp_path / "report.html"
    write_experiment(root, 4)
    run = root / "runs" / "00001"
    records = json.loads((root / "trials.json").read_text())
    assert records["00001"]["state"] == "stopped"
    if damage in ENTRIES:
        records["00001"] |= ENTRIES[damage]
        (root / "trials.json").write_text(json.dumps(records))
    elif damage in DECISIONS:
        (run / "decisions.json").write_text(DECISIONS[damage])
    else:
        text = (run / "metrics.jsonl").read_text()
        changed = {
            "metrics": "\x00" * 9,
            "cut": text[:-20],
            "nan": text.replace('"gaze_loss": 0.', '"gaze_loss": NaN, "x": 0.', 1),
            "no_iteration": text.replace('"iteration": 20,', ""),
            "empty": "",
        }
        (run / "metrics.jsonl").write_text(changed[damage])
    numbers = write_report(str(root), str(out))
    page = check_page(out, SECTIONS)
    ((trial, reason),) = [(one["trial"], one["reason"]) for one in numbers["damaged"]]
    assert trial == "00001" and reason and f"trial 00001: {reason}" in page.text
    shown = [row["trial"] for row in numbers["trials"]]
    assert sorted(shown) == ["00000", "00002", "00003"]
    assert re.search(REASONS.get(damage, ""), reason)
    assert numbers["stopping"]["trials_counted"] == 3 and numbers["experiment"]["trials_drawn"] == 4


def test_a_validation_without_micro_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_charts(monkeypatch)
    root, out = tmp_path / "search", tmp_path / "report.html"
    write_experiment(root, 4)
    for file in root.glob("runs/*/metrics.jsonl"):
        file.write_text(re.sub(r'"val_micro_accuracy": [\d.e-]+, ', "", file.read_text()))
    numbers = write_report(str(root), str(out))
    assert not numbers["damaged"] and numbers["answer"]["micro_accuracy"] is None
    check_page(out, SECTIONS)


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([{"iteration": 1}, {"iteration": 2, "x": 1.5}], ""),
        ([{"iteration": 0}], "line 1: iteration 0 comes after 0"),
        ([{"iteration": 3}, {"iteration": 3}], "line 2: iteration 3 comes after 3"),
        ([{"iteration": 3}, {"iteration": 4}, {"iteration": 2}], "line 3: iteration 2 comes after 4"),
        ([{"iteration": 1.0}], "line 1: no iteration"),
        ([{"iteration": 1}, [2]], "line 2: no iteration"),
        ([{"iteration": 1, "x": True}], "line 1: x is True"),
        ([{"iteration": 1, "x": "2"}], "line 1: x is '2'"),
        ([{"iteration": 1, "x": float("inf")}], "line 1: x is inf"),
        ([{"iteration": 1, "x": 1e308}], "line 1: x is 1e+308"),
        ([{"iteration": 1, METRIC: 1.01}], f"line 1: {METRIC} is 1.01"),
        ([{"iteration": 1, METRIC: -0.1}], f"line 1: {METRIC} is -0.1"),
        ([{"iteration": 10**32}], "line 1: no iteration"),
        ([{"iteration": 1}, '{"iteration": 2, "x": 1, "x": 2}'], "line 2: the key 'x' is given twice"),
        ([{"iteration": 1}, "[" * 100_000], "line 2: nested too deeply"),
        ([{"iteration": 1}, '{"iteration": 2, "val'], "line 2"),
    ],
)
def test_lines_that_no_run_writes(tmp_path: Path, lines: list[Any], reason: str) -> None:
    """The lines before the first damaged one can be read all the same, to resume the run."""
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    if not reason:
        assert read_metrics(str(tmp_path)) == lines
        return
    with pytest.raises(UserError, match=re.escape(f"{file}: damaged: {reason}")):
        read_metrics(str(tmp_path))
    assert read_metrics(str(tmp_path), whole=False) == lines[: int(re.findall(r"\d+", reason)[0]) - 1]


def test_a_stopped_or_finished_trial_has_the_lines_of_it() -> None:
    """A finished one all of its iterations, a stopped one at least a line; a running one needs none."""
    config = Experiment("", {"space": SPACE, "space_source": "t", "overrides": {}, "samples": 1}, []).space.config({})
    for state, iteration, reason in [
        ("finished", 100, ""),
        ("finished", 99, "the trial has finished, but /run/metrics.jsonl ends at iteration 99 of 100"),
        ("finished", 0, "the trial has finished, but /run/metrics.jsonl ends at iteration 0 of 100"),
        ("stopped", 1, ""),
        ("stopped", 0, "the trial was stopped early, but /run/metrics.jsonl has no line"),
        ("running", 0, ""),
    ]:
        lines = [{"iteration": iteration}] if iteration else []
        trial = Trial("0", state, "/run", {}, 0, config, lines)
        if not reason:
            _check_end(trial)
            continue
        with pytest.raises(ValueError, match=f"{reason}$"):
            _check_end(trial)


SPACE = "base: {train: {iterations: 100}}"


@pytest.mark.parametrize(
    "content",
    [
        [[0, "00000", 10, 0.5, "STOP", 1]],
        [["0", "00000", 10, 0.5, "STOP"]],
        [[0, "00001", 10, 0.5, "STOP"]],  # of another trial
        [[0, "00000", 10.0, 0.5, "STOP"]],
        [[0, "00000", 10, True, "STOP"]],
        [[0, "00000", 10, 0.5, 1]],
        [[0, "00000", 10**32, 0.5, "STOP"]],
        [[0, "00000", 10, 1.5, "STOP"]],
        5,
    ],
)
def test_decisions_that_no_scheduler_writes(tmp_path: Path, content: object) -> None:
    run = tmp_path / "runs" / "00000"
    run.mkdir(parents=True)
    whole = [0, "00000", 10, 0.5, "STOP"]
    (run / "decisions.json").write_text(json.dumps([whole]))
    assert trial_decisions(str(tmp_path), "00000") == [Decision(0, "00000", 10, 0.5, "STOP")]
    (run / "decisions.json").write_text(json.dumps([whole, *content] if isinstance(content, list) else content))
    with pytest.raises(UserError, match=r"decisions\.json: damaged: "):
        trial_decisions(str(tmp_path), "00000")


def test_decisions_of_all_trials_are_read_in_their_order(tmp_path: Path) -> None:
    """00001 decided first."""
    write_experiment(tmp_path, 2)
    orders = {"00000": [1, 3], "00001": [0, 2]}
    for name, places in orders.items():
        made = [[place, name, 10 * place + 10, 0.1, "CONTINUE"] for place in places]
        (tmp_path / "runs" / name / "decisions.json").write_text(json.dumps(made))
    checked = read_experiment(str(tmp_path))
    assert [(decision.order, decision.trial) for decision in checked.decisions] == [
        (0, "00001"),
        (1, "00000"),
        (2, "00001"),
        (3, "00000"),
    ]
    assert [trial.id for trial in checked.trials] == ["00000", "00001"]
    assert checked.alive is False and checked.damaged == {}
