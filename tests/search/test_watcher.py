"""The record of a search while it runs, and the checkpoints that it removes; no Ray runs."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tune_ego import ray_private, storage
from tune_ego.results.checkpoint_files import checkpoint_iterations, checkpoint_uri
from tune_ego.results.decisions import Decision, write_decisions
from tune_ego.results.experiment import METRIC, Failure, write_failure, write_metrics
from tune_ego.results.trial_records import TrialRecords, read_records, run_folder
from tune_ego.search.watcher import Watcher
from tune_ego.space_io import parse_space

BUDGET = 30
STATES = ("pending", "running", "interrupted", "finished", "stopped", "failed")


def make(root: Path, scheduler: str = "name: asha", trials: int = 1) -> Watcher:
    records = TrialRecords(str(root))
    records.add([{"trial": f"{n:05d}", "repeat": 1, "sampled": {}} for n in range(trials)])
    base = f"base: {{train: {{iterations: {BUDGET}, validate_every: 10}}, optimizer: {{lr: 0.5}}}}"
    return Watcher(str(root), parse_space(f"{base}\nscheduler: {{{scheduler}}}", "t"), BUDGET, records)


def trial(number: int = 0, error: object = None) -> SimpleNamespace:
    draw = {"trial": f"{number:05d}", "repeat": 1, "sampled": {}}
    return SimpleNamespace(config=draw, get_pickled_error=lambda: error)


def write_run(root: Path, number: int, iterations: list[int], actions: str, failure: str) -> str:
    name = f"{number:05d}"
    run = run_folder(str(root), name)
    for iteration in iterations:
        for file in ("checkpoint.pt", "checkpoint.json"):
            storage.write_text(checkpoint_uri(run, iteration, file), "{}")
    decisions = [Decision(n, name, 10 * n + 10, 0.5, action) for n, action in enumerate(actions.split())]
    write_decisions(str(root), name, decisions)
    if failure:
        write_failure(run, Failure(failure, final=True))
    return run


@pytest.mark.parametrize(
    ("iterations", "actions", "failure", "scheduler", "state", "line"),
    [
        ([10, 20, 30], "CONTINUE CONTINUE CONTINUE", "", "name: asha", "finished", "finished"),
        ([10, 20], "CONTINUE STOP", "", "name: asha", "stopped", "stopped by ASHA"),
        ([10, 20], "CONTINUE STOP", "", "name: median", "stopped", "stopped by the median rule"),
        # It had trained up to the budget before the stop reached it.
        ([10, 20, 30], "CONTINUE STOP", "", "name: asha", "stopped", "stopped by ASHA"),
        ([10, 20], "CONTINUE CONTINUE", "", "name: asha", "interrupted", "interrupted"),
        ([], "", "", "name: fifo", "interrupted", "interrupted"),
        ([30], "", "", "name: fifo", "finished", "finished"),
        # Only its last decision counts.
        ([10, 20], "STOP CONTINUE", "", "name: asha", "interrupted", "interrupted"),
        ([10, 20, 30], "CONTINUE STOP", "loss is nan", "name: asha", "failed", "failed: loss is nan"),
    ],
)
def test_the_state_in_which_a_trial_ends(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    iterations: list[int],
    actions: str,
    failure: str,
    scheduler: str,
    state: str,
    line: str,
) -> None:
    watched = make(tmp_path, scheduler)
    write_run(tmp_path, 0, iterations, actions, failure)
    before = time.monotonic()
    watched.on_trial_complete(1, [], trial())
    record = read_records(str(tmp_path))["00000"]
    assert (record["state"], record["reason"]) == (state, failure)
    assert capsys.readouterr().out == f"  00000: {line}\n"
    assert before <= watched.ended["00000"] <= time.monotonic()


@pytest.mark.parametrize(
    ("error", "reason"),
    [("Traceback\n  File\nValueError: x\n", "ValueError: x"), (None, "died"), (" \n ", "died")],
)
def test_a_trial_that_died_fails_for_the_last_line_of_its_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], error: object, reason: str
) -> None:
    watched = make(tmp_path)
    watched.on_trial_start(1, [], trial())
    assert read_records(str(tmp_path))["00000"]["state"] == "running"
    watched.on_trial_error(1, [], trial(error=error))
    record = read_records(str(tmp_path))["00000"]
    assert (record["state"], record["reason"]) == ("failed", reason)
    assert capsys.readouterr().out == f"  00000: starts\n  00000: failed: {reason}\n"


def test_validations_are_printed_and_a_collapsed_rate_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watched = make(tmp_path)
    # Ranger at 0.5 over 30 iterations: 1e-4 at iteration 5 is under a thousandth, and early.
    write_metrics(run_folder(str(tmp_path), "00000"), [{"iteration": 5, "learning_rate_rgb": 1e-4}])
    for iteration in (10, 20):
        watched.on_trial_result(1, [], trial(), {"iteration": iteration, METRIC: 0.125})
    watched.on_trial_result(1, [], trial(), {"iteration": 25})
    warning = "the learning rate of the rgb stream fell from 0.5 to 0.0001 by iteration 5 of 30"
    assert capsys.readouterr().out.splitlines() == [
        "  00000: iteration 10, validation mean class accuracy 12.5 %",
        f"  00000: {warning}",
        "  00000: iteration 20, validation mean class accuracy 12.5 %",
    ]


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("at", ["a step", "the end"])
def test_checkpoints_of_stopped_trials_alone_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: bool, at: str
) -> None:
    watched = make(tmp_path, f"name: asha, keep_stopped: {str(keep).lower()}", len(STATES))
    runs = [write_run(tmp_path, number, [10, 30], "", "") for number in range(len(STATES))]
    for number, state in enumerate(STATES):
        watched.records.note(f"{number:05d}", state)
    monkeypatch.setattr(watched, "_sweep", lambda names: None)
    monkeypatch.setattr(ray_private, "live_controllers", list)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    if at == "the end":
        watched.on_experiment_end([])
    else:
        watched.ended = {f"{number:05d}": 0.0 for number in range(len(STATES))}
        monkeypatch.setattr(time, "monotonic", lambda: 100.0)
        watched.on_step_end(1, [])
    left = {state: checkpoint_iterations(run) for state, run in zip(STATES, runs)}
    assert left == {state: [] if state == "stopped" and not keep else [10, 30] for state in STATES}


def test_what_an_ended_trial_leaves_is_removed_three_seconds_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And once more each second: a controller that still lives may make another placement group."""
    watched = make(tmp_path, trials=2)
    now = [50.0]
    swept: list[list[str]] = []
    removed: list[set[str]] = []
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(watched, "_sweep", lambda names: swept.append(list(names)))
    monkeypatch.setattr(watched, "_remove_checkpoints_of_stopped", lambda names: removed.append(set(names)))
    steps: list[tuple[float, dict[str, float], list[list[str]], list[set[str]]]] = [
        # Now, trials that have ended and when, those swept, those whose checkpoints may go.
        (50.0, {"00000": 50.0}, [[]], [set()]),
        (50.9, {}, [], []),
        (51.0, {}, [[]], [set()]),
        (52.9, {"00001": 52.0}, [[]], [set()]),
        (53.9, {}, [["00000"]], [{"00000"}]),
        (54.9, {}, [["00000"]], [set()]),
        (55.9, {}, [["00000", "00001"]], [{"00001"}]),
    ]
    for moment, ended, expected_swept, expected_removed in steps:
        now[0] = moment
        watched.ended |= ended
        swept.clear()
        removed.clear()
        watched.on_step_end(1, [])
        assert (moment, swept, removed) == (moment, expected_swept, expected_removed)


def test_a_trial_that_is_started_again_is_swept_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = make(tmp_path)
    swept: list[Any] = []
    monkeypatch.setattr(watched, "_sweep", swept.append)
    watched.on_trial_recover(1, [], trial())
    assert swept == [["00000"]] and capsys.readouterr().out == "  00000: failed and is restarted\n"
