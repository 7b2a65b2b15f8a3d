"""Reading an experiment of which some records may be damaged: those are named, and the others read."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tune_ego import driver, experiment, storage
from tune_ego.errors import UserError
from tune_ego.experiment import Decision, Experiment, Trial

_READERS = 16
"""Threads that read files."""
_NEEDED = ("space", "space_source", "overrides", "samples", "trials", "data", "data_settings", "seed", "version", "ray")
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OSError)
"""What reading raises where a file does not hold what was written."""
T = TypeVar("T")


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
    found = Found(opened, driver.is_alive(opened.root))
    records = experiment.read_records(opened.root)
    if not isinstance(records, dict):
        raise UserError(f"{storage.join(opened.root, experiment.TRIALS_FILE)}: damaged: expected trials by name")

    def attempt(trial: str, of: Callable[[], T]) -> T | None:
        try:
            return of()
        except _DAMAGE as error:
            found.damaged[trial] = _what(error)
            return None

    def read_one(item: tuple[str, Any]) -> tuple[Trial | None, list[Decision]]:
        name, record = item
        trial = attempt(name, lambda: _checked(experiment.read_trial(opened, name, record, not found.alive)))
        made = attempt(name, lambda: experiment.trial_decisions(opened.root, name)) if trial else None
        return trial, made or []

    with ThreadPoolExecutor(_READERS) as pool:
        for trial, made in pool.map(read_one, records.items()):
            opened.trials += [trial] if trial else []
            found.decisions += made
    found.decisions.sort()
    return found


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
    opened = Experiment(root, spec, [])
    try:
        assert opened.space.samples
    except UserError:
        raise
    except (TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{uri}: not an experiment of tune_ego ({error})") from error
    return opened


def _checked(trial: Trial) -> Trial:
    """Raise `ValueError` for lines of metrics that no run writes."""
    for number, line in enumerate(trial.metrics, start=1):
        if not isinstance(line, dict) or not isinstance(line.get("iteration"), int):
            raise ValueError(f"{trial.run}/{experiment.METRICS_FILE}: line {number} has no iteration")
        for key, value in line.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise ValueError(f"{trial.run}/{experiment.METRICS_FILE}: line {number}: {key} is {value!r}")
    return trial
