"""Reading an experiment of which some records may be damaged: those are named, and the others read."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.results import driver, experiment
from tune_ego.results.experiment import Decision, Experiment, Trial

_READERS = 16
"""Threads that read files."""
_NEEDED = {
    "space": str,
    "space_source": str,
    "overrides": dict,
    "samples": int,
    "trials": int,
    "data": str,
    "data_settings": dict,
    "seed": int,
    "version": str,
    "ray": str,
}
"""Key of experiment.json -> its type."""
_STATES = ("pending", "running", "interrupted", *experiment.ENDED)
_MISREAD = (KeyError, TypeError, AttributeError, IndexError, OverflowError)
_DAMAGE = (ValueError, OSError, *_MISREAD)
"""What reading raises where a file does not hold what was written."""


@dataclass
class Found:
    """An experiment as far as its files can be read."""

    experiment: Experiment
    alive: bool
    """Whether a process drives the search now."""
    decisions: list[Decision] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)
    """Trial -> what is wrong with its record."""


def read(root: str) -> Found:
    """Read an experiment's folder or URI; raises `UserError` where it is something else."""
    opened = _open(storage.absolute(root))
    found = Found(opened, _is_driven(opened.root))
    records = experiment.read_records(opened.root)
    if not isinstance(records, dict):
        raise UserError(f"{storage.join(opened.root, experiment.TRIALS_FILE)}: damaged: expected trials by name")

    def read_one(item: tuple[str, Any]) -> tuple[Trial | None, list[Decision]]:
        try:
            return _read_trial(opened, *item, dead=not found.alive)
        except _DAMAGE as error:
            found.damaged[item[0]] = _what(error)
            return None, []

    with ThreadPoolExecutor(_READERS) as pool:
        for trial, made in pool.map(read_one, records.items()):
            opened.trials += [trial] if trial else []
            found.decisions += made
    found.decisions.sort()
    return found


def _is_driven(root: str) -> bool:
    """As `driver.is_alive`; a damaged `driver.json` is of nobody."""
    try:
        return driver.is_alive(root)
    except (UserError, *_MISREAD):
        return False


def _read_trial(opened: Experiment, name: str, record: Any, dead: bool) -> tuple[Trial, list[Decision]]:
    """A trial and what was decided of it; raises one of `_DAMAGE` where one of its files is not as it was written."""
    if not isinstance(record, dict) or record.get("state") not in _STATES:
        state = record.get("state") if isinstance(record, dict) else record
        raise ValueError(f"its entry in {experiment.TRIALS_FILE} has an unknown state: {state!r}")
    run = experiment.run_folder(opened.root, name)
    try:
        trial = experiment.read_trial(opened, name, record, dead)
    except _MISREAD:  # of a stopped trial all three files are looked into
        _check_lines(run, experiment.read_metrics(run))
        _decisions(opened.root, name)
        raise
    _check_lines(run, trial.metrics)
    _check_end(trial)
    return trial, _decisions(opened.root, name)


def _what(error: Exception) -> str:
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return f"{experiment.METRICS_FILE} is not lines of JSON ({error})"
    if isinstance(error, KeyError):
        return f"its entry in {experiment.TRIALS_FILE} has no {error}, or one that the search space does not know"
    return str(error)


def _open(root: str) -> Experiment:
    """The experiment without its trials."""
    uri = storage.join(root, experiment.EXPERIMENT_FILE)
    if not storage.exists(uri):
        run = storage.exists(storage.join(root, experiment.METRICS_FILE))
        what = (
            "this is a run; `report` is for a search, --evaluation for its final run" if run else "no experiment here"
        )
        raise UserError(f"{root}: {what} (no {experiment.EXPERIMENT_FILE})")
    spec = storage.read_json(uri)
    missing = [key for key in _NEEDED if key not in spec] if isinstance(spec, dict) else ["everything"]
    if missing:
        raise UserError(f"{uri}: not an experiment of tune_ego: {', '.join(missing)} missing")
    wrong = [key for key, kind in _NEEDED.items() if isinstance(spec[key], bool) or not isinstance(spec[key], kind)]
    wrong += [] if _is_number(spec.get("gpus_per_worker", 0)) else ["gpus_per_worker"]
    if wrong:
        told = ", ".join(f"{key} is {spec[key]!r:.40}" for key in wrong)
        raise UserError(f"{uri}: damaged: {told}")
    opened = Experiment(root, spec, [])
    try:
        assert opened.space.samples
    except UserError:
        raise
    except (TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{uri}: not an experiment of tune_ego ({error})") from error
    return opened


def _check_lines(run: str, lines: list[Any]) -> None:
    """Raise `ValueError` for lines of metrics that no run writes."""
    before = 0
    for number, line in enumerate(lines, start=1):
        place = f"{run}/{experiment.METRICS_FILE}: line {number}"
        if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
            raise ValueError(f"{place} has no iteration")
        if line["iteration"] <= before:
            raise ValueError(f"{place}: iteration {line['iteration']} comes after {before}")
        before = line["iteration"]
        for key, value in line.items():
            if not _is_number(value):
                raise ValueError(f"{place}: {key} is {value!r}")


def _check_end(trial: Trial) -> None:
    """Raise `ValueError` for a trial whose metrics do not go as far as its state says."""
    budget, file = trial.config.train.iterations, f"{trial.run}/{experiment.METRICS_FILE}"
    if trial.state == "finished" and trial.iteration < budget:
        raise ValueError(f"it has finished, but {file} ends at iteration {trial.iteration} of {budget}")
    if trial.state == "stopped" and not trial.metrics:
        raise ValueError(f"it was stopped, but {file} has no line of it")


def _decisions(root: str, trial: str) -> list[Decision]:
    """What the scheduler decided of a trial; raises `ValueError` where the file says something else."""
    place = f"{experiment.run_folder(root, trial)}/{experiment.DECISIONS_FILE}"
    try:
        found = experiment.trial_decisions(root, trial)
    except _MISREAD as error:
        raise ValueError(f"{place}: damaged: expected lists of {', '.join(Decision._fields)}") from error
    for decision in found:
        whole = isinstance(decision.order, int) and isinstance(decision.iteration, int)
        if not (
            whole and decision.trial == trial and _is_number(decision.accuracy) and isinstance(decision.action, str)
        ):
            raise ValueError(f"{place}: damaged: {list(decision)} is no decision of it")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
