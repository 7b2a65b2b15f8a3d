"""Files of an experiment: trials, configurations over their repeats, records and decisions."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.drivers import write_driver
from tests.specs import search_spec
from tune_ego import storage
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.errors import UserError
from tune_ego.results.decisions import Decision, read_decisions, write_decisions
from tune_ego.results.experiment import (
    METRIC,
    Configuration,
    Experiment,
    Failure,
    Trial,
    by_configuration,
    collapsed_rate,
    learning_rates,
    read_failure,
    read_metrics,
    read_run_record,
    write_failure,
    write_metrics,
)
from tune_ego.results.reading import read_experiment, repeated_reader
from tune_ego.results.tables import config_value, configuration_table, trial_table
from tune_ego.results.trial_records import TrialRecords, read_records, run_folder, trial_name

SPACE = """
base: {train: {iterations: 30, validate_every: 10}, seed: 5}
space:
  model.stam_depth: {choice: [1, 2]}
  optimizer.lr: {uniform: [0.1, 0.5]}
  label: x
repeats: 2
samples: 2
"""


def trial(name: str, accuracies: list[float], state: str = "finished", **changes: Any) -> Trial:
    """A trial validated at 10, 20, ..., with a line of the training loss after each validation."""
    lines: list[dict[str, Any]] = []
    for number, accuracy in enumerate(accuracies, start=1):
        lines += [{"iteration": 10 * number, METRIC: accuracy}, {"iteration": 10 * number + 5, "train_loss": 1.0}]
    config = override_config(Config(), {key.replace("__", "."): value for key, value in changes.items()}, "t")
    return Trial(name, state, "", {}, int((name.partition("-")[2]) or 0), config, lines)


def experiment(trials: list[Trial], repeats: int = 2) -> Experiment:
    text = SPACE.replace("repeats: 2", f"repeats: {repeats}")
    return Experiment("/x", {"space": text, "space_source": "s", "overrides": {}, "samples": 9}, trials)


def test_the_best_of_a_trial_is_the_earliest_of_its_highest_validations() -> None:
    found = trial("00000", [0.2, 0.5, 0.5, 0.4])
    assert found.best == {"iteration": 20, METRIC: 0.5} and found.accuracy == 0.5
    assert [line["iteration"] for line in found.validations] == [10, 20, 30, 40] and found.iteration == 45
    none = trial("00000", [])
    assert (none.best, none.accuracy, none.validations, none.iteration) == (None, None, [], 0)
    assert trial("00000", [0.0]).accuracy == 0.0
    states = ("pending", "running", "interrupted", "finished", "stopped", "failed")
    assert [trial("00000", [], state).ended for state in states] == [False] * 3 + [True] * 3


def test_a_configuration_is_worth_the_mean_of_its_repeats() -> None:
    one = Configuration([trial("00003-0", [0.5, 0.25], seed=7), trial("00003-1", [0.25], seed=8), trial("00003-2", [])])
    assert (one.id, one.config.seed, one.accuracies, one.accuracy) == ("00003", 7, [0.5, 0.25], 0.375)
    assert one.spread == pytest.approx(0.125 * 2**0.5)  # of a sample of two: sqrt((0.125^2 + 0.125^2) / (2 - 1))
    alone = Configuration([trial("00004", [0.5])])
    assert (alone.id, alone.accuracy, alone.spread) == ("00004", 0.5, None)
    assert Configuration([trial("00005", [])]).accuracy is None
    assert Configuration([trial("00006", [0.0])]).accuracy == 0.0


def test_configurations_are_in_the_order_of_their_drawing() -> None:
    names = ["00010-1", "00002-0", "00010-0", "00002-1", "00001-0"]
    found = by_configuration([trial(name, []) for name in names])
    assert [[one.id for one in configuration.trials] for configuration in found] == [
        ["00001-0"],
        ["00002-0", "00002-1"],
        ["00010-0", "00010-1"],
    ]


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        # The highest mean, not the best single repeat: 0.5 against 0.45.
        ({"00000-0": [0.5], "00000-1": [0.5], "00001-0": [0.8], "00001-1": [0.1]}, "00000"),
        # Best of each repeat, not its last: 0.6 against 0.55.
        ({"00000-0": [0.55], "00000-1": [0.55], "00001-0": [0.7, 0.1], "00001-1": [0.5, 0.1]}, "00001"),
        # One without all repeats comes after.
        ({"00000-0": [0.9], "00000-1": [], "00001-0": [0.1], "00001-1": [0.2]}, "00001"),
        ({"00000-0": [0.9], "00001-0": [0.1], "00001-1": [0.2]}, "00001"),
        ({"00000-0": [0.3], "00001-0": [0.4], "00002-0": []}, "00001"),
        # The first of equals.
        ({"00001-0": [0.4], "00001-1": [0.2], "00000-0": [0.2], "00000-1": [0.4]}, "00000"),
    ],
)
def test_the_best_configuration(accuracies: dict[str, list[float]], best: str) -> None:
    assert experiment([trial(name, values) for name, values in accuracies.items()]).best.id == best


def test_without_validations_there_is_no_best() -> None:
    with pytest.raises(UserError, match=r"^/x: no trial has been validated yet$"):
        _ = experiment([trial("00000", [])]).best


def test_names_of_trials_and_their_folders() -> None:
    assert (trial_name(7, 0, 1), trial_name(7, 2, 3), trial_name(123456, 0, 2)) == ("00007", "00007-2", "123456-0")
    assert run_folder("s3://b/x/", "00007-2") == "s3://b/x/runs/00007-2"


def test_the_samples_of_an_experiment_are_those_that_it_was_resumed_with() -> None:
    space = experiment([]).space
    assert (space.samples, space.configurations, space.trials, space.source) == (9, 9, 18, "s")
    raised = Experiment("/x", {**experiment([]).spec, "overrides": {"train.iterations": 70}}, [])
    assert raised.space.base == {"train": {"iterations": 70, "validate_every": 10}, "seed": 5}


def test_records_of_trials(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert read_records(root) == {} and list(TrialRecords(root)) == []
    records = TrialRecords(root)
    records.add([{"trial": f"0000{n}", "repeat": n % 2, "sampled": {"a@0": n}} for n in range(6)])
    states = ["finished", "stopped", "failed", "running", "interrupted", "pending"]
    for place, state in enumerate(states):
        records.note(f"0000{place}", state, "nan" if state == "failed" else "")
    assert read_records(root) == {
        f"0000{n}": {
            "state": state,
            "reason": "nan" if state == "failed" else "",
            "repeat": n % 2,
            "sampled": {"a@0": n},
        }
        for n, state in enumerate(states)
    }
    again = TrialRecords(root)
    assert list(again) == [f"0000{n}" for n in range(6)] and again.state("00001") == "stopped"
    assert "00005" in again and "00006" not in again
    assert again.draws() == [{"trial": f"0000{n}", "repeat": n % 2, "sampled": {"a@0": n}} for n in (3, 4, 5)]
    again.reopen({"failed", "running"})
    assert [(record["state"], record["reason"]) for record in read_records(root).values()] == [
        *(("finished", ""), ("stopped", ""), ("pending", ""), ("pending", ""), ("interrupted", ""), ("pending", ""))
    ]
    again.note("00000", "failed", "x")
    again.note("00000", "finished")
    assert read_records(root)["00000"] == {"state": "finished", "reason": "", "repeat": 0, "sampled": {"a@0": 0}}


def test_files_of_a_run_read_back(tmp_path: Path) -> None:
    run = str(tmp_path)
    assert (read_metrics(run), read_failure(run)) == ([], None)
    write_metrics(run, [{"iteration": 1}, {"iteration": 2, METRIC: 0.5}])
    assert (tmp_path / "metrics.jsonl").read_text() == (
        '{"iteration": 1}\n{"iteration": 2, "val_mean_class_accuracy": 0.5}\n'
    )
    assert read_metrics(run) == [{"iteration": 1}, {"iteration": 2, METRIC: 0.5}]
    write_failure(run, Failure("nan", final=True))
    assert storage.read_json(tmp_path / "failure.json") == {"reason": "nan", "final": True}
    assert read_failure(run) == Failure("nan", True)


@pytest.mark.parametrize(
    "text", ['{"reason": "x"', "[]", "{}", '{"reason": 1, "final": true}', '{"reason": "x", "final": 1}', "\xff"]
)
def test_a_damaged_failure_is_none_and_this_is_said(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "failure.json").write_bytes(text.encode("latin-1"))
    assert read_failure(str(tmp_path)) is None
    assert capsys.readouterr().out == f"{tmp_path}/failure.json: damaged, and ignored\n"


@pytest.mark.parametrize("text", ['{"data": "x"', "[]", "{}", '{"data": 1}', '{"data": "x", "resumed_with": [1]}'])
def test_a_damaged_record_of_a_run_is_none_and_this_is_said(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_run_record(str(tmp_path)) is None
    (tmp_path / "run.json").write_text(text)
    assert read_run_record(str(tmp_path)) is None
    assert capsys.readouterr().out == f"{tmp_path}/run.json: damaged, and ignored\n"
    whole = {"data": "x", "data_fingerprint": "y", "version": "0.1.0", "resumed_with": ["0.2.0"], "later": 3}
    storage.write_json(tmp_path / "run.json", whole)
    assert read_run_record(str(tmp_path)) == whole


def test_decisions_of_a_search_are_in_the_order_of_their_making(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert read_decisions(root) == []
    first, second, third = (
        *(Decision(0, "00001", 10, 0.5, "CONTINUE"), Decision(1, "00000", 10, 0.25, "CONTINUE")),
        Decision(10, "00001", 20, 0.5, "STOP"),
    )
    write_decisions(root, "00000", [second])
    write_decisions(root, "00001", [first, third])
    assert storage.read_json(tmp_path / "runs/00001/decisions.json") == [
        [0, "00001", 10, 0.5, "CONTINUE"],
        [10, "00001", 20, 0.5, "STOP"],
    ]
    assert read_decisions(root) == [first, second, third]
    (tmp_path / "runs" / "00000" / "decisions.json").write_text("[[0")
    assert read_decisions(root) == [first, third]


@pytest.mark.parametrize("name", ["../../victim", "a", "00001/..", "", "1", "00001-", "\u0660\u0660\u0660\u0660\u0661"])
@pytest.mark.parametrize("damage", ["name", "entry"])
def test_a_name_or_an_entry_that_no_search_writes_is_left_out(
    tmp_path: Path, name: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A name is that of a folder, whose checkpoints may be deleted."""
    entry = {"state": "stopped", "reason": "", "repeat": 0, "sampled": {}}
    other = {name: entry} if damage == "name" else {"00001": entry | {"repeat": 10**32}}
    write_search(tmp_path)
    storage.write_json(tmp_path / "trials.json", {"00000": entry | {"state": "pending"}, **other})
    assert list(TrialRecords(str(tmp_path))) == ["00000"]
    assert "trials.json: damaged, and left out: " in capsys.readouterr().out
    search = read_experiment(str(tmp_path))
    assert {*search.damaged} == {*other} | {"00000"}  # its draw lacks what the space has


def write_search(root: Path) -> TrialRecords:
    spec = search_spec(SPACE, overrides={"train.iterations": 20}, samples=2, trials=4)
    storage.write_json(root / "experiment.json", spec)
    records = TrialRecords(str(root))
    records.add(
        [
            {"trial": f"{n:05d}-{r}", "repeat": r, "sampled": {"model.stam_depth@0": n + 1, "optimizer.lr@0": 0.25}}
            for n in (0, 1)
            for r in (0, 1)
        ]
    )
    return records


@pytest.mark.parametrize("state", ["finished", "stopped"])
def test_what_a_trial_did_after_it_was_stopped_does_not_count(tmp_path: Path, state: str) -> None:
    """The stop reaches it after a while, and how long that takes is chance. One that finished has no stop."""
    write_search(tmp_path).note("00001-1", state)
    run = run_folder(str(tmp_path), "00001-1")
    write_metrics(run, [{"iteration": 10, METRIC: 0.1}, {"iteration": 15}, {"iteration": 20, METRIC: 0.2}])
    write_decisions(
        str(tmp_path), "00001-1", [Decision(0, "00001-1", 5, 0.0, "GO"), Decision(2, "00001-1", 15, 0.1, "")]
    )
    found = read_experiment(str(tmp_path)).trials[3]
    assert (found.iteration, found.accuracy) == ((15, 0.1) if state == "stopped" else (20, 0.2))
    assert (found.id, found.state, found.run, found.repeat) == ("00001-1", state, run, 1)
    assert found.sampled == {"model.stam_depth@0": 2, "optimizer.lr@0": 0.25}
    assert (found.config.seed, found.config.model.stam_depth, found.config.label) == (6, 2, "x")


@pytest.mark.parametrize(("driver", "state"), [(True, "running"), (False, "interrupted")])
def test_trials_of_a_dead_driver_are_interrupted(tmp_path: Path, driver: bool, state: str) -> None:
    records = write_search(tmp_path)
    records.note("00000-0", "running")
    records.note("00000-1", "failed", "nan")
    if driver:
        write_driver(tmp_path)
    found = read_experiment(str(tmp_path))
    assert [trial.state for trial in found.trials] == [state, "failed", "pending", "pending"]
    assert [trial.reason for trial in found.trials] == ["", "nan", "", ""]
    assert found.root == str(tmp_path) and found.spec["samples"] == 2


def test_an_experiment_that_is_absent_or_damaged_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"^{tmp_path}: no experiment here \(no experiment\.json\)$"):
        read_experiment(str(tmp_path))
    write_search(tmp_path)
    write_metrics(run_folder(str(tmp_path), "00000-1"), [])
    (tmp_path / "runs/00000-1/metrics.jsonl").write_text("{")
    search = read_experiment(str(tmp_path))
    assert [trial.id for trial in search.trials] == ["00000-0", "00001-0", "00001-1"]
    assert re.match(rf"{tmp_path}/runs/00000-1/metrics.jsonl: damaged: line 1: ", search.damaged["00000-1"])


def test_a_repeated_reader_reads_trials_that_have_ended_once(tmp_path: Path) -> None:
    records = write_search(tmp_path)
    runs = [run_folder(str(tmp_path), f"0000{name}") for name in ("0-0", "0-1", "1-0")]
    for name, state in (("00000-0", "finished"), ("00000-1", "running"), ("00001-0", "stopped")):
        records.note(name, state)
    look = repeated_reader(str(tmp_path))
    for run, last in zip(runs, (20, 5, 5)):
        write_metrics(run, [{"iteration": last}])
    assert [trial.iteration for trial in look().trials] == [20, 5, 5, 0]
    for run in runs:
        write_metrics(run, [{"iteration": 20}, {"iteration": 21}])
    records.note("00001-0", "finished")  # the budget was raised
    assert [trial.iteration for trial in look().trials] == [20, 21, 21, 0]


def test_values_in_tables() -> None:
    config = override_config(Config(), {"optimizer.lr": 0.0123456, "streams": "rgb"}, "t")
    keys = (
        "optimizer.lr",
        "optimizer.momentum",
        "schedule.warmup",
        "streams",
        "init_from.rgb",
        "optimizer.betas",
        "x.y.z",
    )
    assert [config_value(config, key) for key in keys] == ["0.01235", "-", "0", "rgb", "-", "(0.95, 0.999)", "-"]


def test_tables_list_the_best_first() -> None:
    searched: dict[str, Any] = {"model__stam_depth": 2, "optimizer__lr": 0.25}
    failed = trial("00002-0", [], "failed", **searched)
    failed.reason = "nan"
    trials = [
        *(trial("00000-0", [0.0], **searched), trial("00000-1", [0.5], "stopped", **searched)),
        *(failed, trial("00001-0", [0.1, 0.75], "running", **searched)),
    ]
    columns, rows = trial_table(experiment(trials))
    assert columns == ["trial", "state", "iterations", "best val. mean class acc.", "model.stam_depth", "optimizer.lr"]
    assert rows == [
        ["00001-0", "running", "25", "75.0 %", "2", "0.25"],
        ["00000-1", "stopped", "15", "50.0 %", "2", "0.25"],
        ["00000-0", "finished", "15", "0.0 %", "2", "0.25"],
        ["00002-0", "failed: nan", "0", "-", "2", "0.25"],
    ]
    columns, rows = configuration_table(experiment(trials))
    assert columns == [
        *("configuration", "repeats validated", "mean of best val. mean class acc.", "standard deviation"),
        *("model.stam_depth", "optimizer.lr"),
    ]
    assert rows == [
        ["00001", "1", "75.0 %", "-", "2", "0.25"],
        ["00000", "2", "25.0 %", "35.4 points", "2", "0.25"],  # 0.25 * sqrt(2)
        ["00002", "0", "-", "-", "2", "0.25"],
    ]


@pytest.mark.parametrize(
    ("iteration", "rates", "stream"),
    [
        # A start of 0.1, 1,000 iterations after a warm-up of 100: under 1e-4, after 100 and before 500.
        (200, {"rgb": 0.9e-4}, "rgb"),
        (200, {"rgb": 1e-4}, ""),
        (499, {"rgb": 0.1, "flow": 0.9e-4}, "flow"),
        (500, {"rgb": 0.9e-4}, ""),
        (100, {"rgb": 0.9e-4}, ""),
        (101, {"rgb": 0.9e-4}, "rgb"),
    ],
)
def test_a_learning_rate_that_fell_too_early_is_named(iteration: int, rates: dict[str, float], stream: str) -> None:
    config = override_config(Config(), {"optimizer.lr": 0.1, "train.iterations": 1000, "schedule.warmup": 100}, "t")
    line = {"iteration": iteration, "train_loss": 1.0, **{f"learning_rate_{key}": rate for key, rate in rates.items()}}
    assert learning_rates(line) == rates
    warning = f"the learning rate of the {stream} stream fell from 0.1 to 9e-05 by iteration {iteration} of 1000"
    assert collapsed_rate(config, [{"iteration": 1}, line]) == (warning if stream else "")
    one = Trial("00000", "running", "", {}, 0, config, [line])
    assert one.warning == (warning if stream else "")


def test_early_is_before_half_the_horizon_of_the_schedule() -> None:
    """A trial of 100 iterations, laid out for 1,000."""
    changes = {"schedule.name": "cosine", "schedule.horizon": 1000, "train.iterations": 100, "optimizer.lr": 0.1}
    config = override_config(Config(), changes, "t")
    line = {"iteration": 90, "learning_rate_rgb": 1e-5}
    assert collapsed_rate(config, [line]).endswith("fell from 0.1 to 1e-05 by iteration 90 of 100")
