"""Reading of an experiment whose records may be damaged: damaged trials are listed, the others are read."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.results import driver, experiment, trial_records
from tune_ego.results.experiment import Experiment, Trial
from tune_ego.results.trial_records import Decision

_READERS = 16
"""Threads that read files."""
_REQUIRED_KEYS = {
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
"""Required key of experiment.json -> its type."""
_TRIAL_STATES = ("pending", "running", "interrupted", *trial_records.ENDED)
_MISREAD = (KeyError, TypeError, AttributeError, IndexError, OverflowError)
_DAMAGE = (ValueError, OSError, *_MISREAD)
"""Exceptions that reading a damaged file raises."""


@dataclass
class CheckedExperiment:
    """Experiment with the trials whose files are valid, and a list of the damaged ones."""

    experiment: Experiment
    alive: bool
    """Whether a driver process runs the search now."""
    decisions: list[Decision] = field(default_factory=list)
    """Decisions of the scheduler for all trials, in their order."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Name of a damaged trial -> reason."""


def read(root: str) -> CheckedExperiment:
    """Read and check an experiment.

    Args:
        root: Folder or URI of the experiment.

    Raises:
        UserError: The folder holds no experiment, or its `experiment.json` or `trials.json` is damaged.
    """
    opened = _open(storage.absolute(root))
    checked = CheckedExperiment(opened, _is_driven(opened.root))
    records = trial_records.read_records(opened.root)
    if not isinstance(records, dict):
        uri = storage.join(opened.root, trial_records.TRIALS_FILE)
        raise UserError(f"{uri}: damaged: expected a mapping from trial names to records")

    def read_one(item: tuple[str, Any]) -> tuple[Trial | None, list[Decision]]:
        try:
            return _read_trial(opened, *item, dead=not checked.alive)
        except _DAMAGE as error:
            checked.damaged[item[0]] = _describe(error)
            return None, []

    with ThreadPoolExecutor(_READERS) as pool:
        for trial, decisions in pool.map(read_one, records.items()):
            opened.trials += [trial] if trial else []
            checked.decisions += decisions
    checked.decisions.sort()
    return checked


def _is_driven(root: str) -> bool:
    """Return whether a driver runs the search; a damaged `driver.json` counts as no driver."""
    try:
        return driver.is_alive(root)
    except (UserError, *_MISREAD):
        return False


def _read_trial(opened: Experiment, name: str, record: Any, dead: bool) -> tuple[Trial, list[Decision]]:
    """Read a trial and the scheduler's decisions for it.

    Raises one of `_DAMAGE` where a file of the trial is damaged.
    """
    if not isinstance(record, dict) or record.get("state") not in _TRIAL_STATES:
        state = record.get("state") if isinstance(record, dict) else record
        raise ValueError(f"the trial's entry in {trial_records.TRIALS_FILE} has an unknown state: {state!r}")
    run = trial_records.run_folder(opened.root, name)
    try:
        trial = experiment.read_trial(opened, name, record, dead)
    except _MISREAD:  # a stopped trial is read from three files: name the damaged one
        _check_lines(run, experiment.read_metrics(run))
        _read_decisions(opened.root, name)
        raise
    _check_lines(run, trial.metrics)
    _check_end(trial)
    return trial, _read_decisions(opened.root, name)


def _describe(error: Exception) -> str:
    """Return the reason, for a message, that an exception of `_DAMAGE` stands for."""
    if isinstance(error, (json.JSONDecodeError, UnicodeDecodeError)):
        return f"{experiment.METRICS_FILE} does not hold one JSON object a line ({error})"
    if isinstance(error, KeyError):
        return f"the trial's entry in {trial_records.TRIALS_FILE} lacks {error}, or the search space does not define it"
    return str(error)


def _open(root: str) -> Experiment:
    """Read an experiment without its trials."""
    uri = storage.join(root, experiment.EXPERIMENT_FILE)
    if not storage.exists(uri):
        is_run = storage.exists(storage.join(root, experiment.METRICS_FILE))
        reason = "this is a run, not a search; add a final run with --evaluation" if is_run else "no experiment here"
        raise UserError(f"{root}: {reason} (no {experiment.EXPERIMENT_FILE})")
    spec = storage.read_json(uri)
    missing = [key for key in _REQUIRED_KEYS if key not in spec] if isinstance(spec, dict) else ["everything"]
    if missing:
        raise UserError(f"{uri}: not an experiment of tune_ego: {', '.join(missing)} missing")
    kinds = _REQUIRED_KEYS.items()
    wrong = [key for key, kind in kinds if isinstance(spec[key], bool) or not isinstance(spec[key], kind)]
    wrong += [] if _is_finite_number(spec.get("gpus_per_worker", 0)) else ["gpus_per_worker"]
    if wrong:
        values = ", ".join(f"{key} is {spec[key]!r:.40}" for key in wrong)
        raise UserError(f"{uri}: damaged: {values}")
    opened = Experiment(root, spec, [])
    try:
        assert opened.space.samples
    except UserError:
        raise
    except (TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{uri}: not an experiment of tune_ego ({error})") from error
    return opened


def _check_lines(run: str, lines: list[Any]) -> None:
    """Raise `ValueError` where lines of metrics are not such as a run writes."""
    before = 0
    for number, line in enumerate(lines, start=1):
        place = f"{run}/{experiment.METRICS_FILE}: line {number}"
        if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
            raise ValueError(f"{place} has no iteration")
        if line["iteration"] <= before:
            raise ValueError(f"{place}: iteration {line['iteration']} comes after {before}")
        before = line["iteration"]
        for key, value in line.items():
            if not _is_finite_number(value):
                raise ValueError(f"{place}: {key} is {value!r}")


def _check_end(trial: Trial) -> None:
    """Raise `ValueError` where a trial's metrics end earlier than its state implies."""
    budget, file = trial.config.train.iterations, f"{trial.run}/{experiment.METRICS_FILE}"
    if trial.state == "finished" and trial.iteration < budget:
        raise ValueError(f"the trial has finished, but {file} ends at iteration {trial.iteration} of {budget}")
    if trial.state == "stopped" and not trial.metrics:
        raise ValueError(f"the trial was stopped early, but {file} has no line")


def _read_decisions(root: str, trial: str) -> list[Decision]:
    """Read the scheduler's decisions for a trial; raises `ValueError` where the file is damaged."""
    place = f"{trial_records.run_folder(root, trial)}/{trial_records.DECISIONS_FILE}"
    try:
        decisions = trial_records.trial_decisions(root, trial)
    except _MISREAD as error:
        raise ValueError(f"{place}: damaged: expected lists of {', '.join(Decision._fields)}") from error
    for decision in decisions:
        whole = isinstance(decision.order, int) and isinstance(decision.iteration, int)
        numeric = _is_finite_number(decision.accuracy)
        if not (whole and decision.trial == trial and numeric and isinstance(decision.action, str)):
            raise ValueError(f"{place}: damaged: {list(decision)} is not a decision for trial {trial}")
    return decisions


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
