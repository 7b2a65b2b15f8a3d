"""Reading of searches. Each record is checked: damaged trials are named and left out, the others are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType
from typing import Annotated, Any, Optional

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tune_ego import __version__, storage
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.results import driver, experiment, trial_records
from tune_ego.results.decisions import trial_decisions
from tune_ego.results.experiment import Experiment, Trial

_READERS = 16
"""Threads that read files."""
_DAMAGE = (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError)
"""Exceptions that reading a damaged file raises."""
_Count = Annotated[int, Field(ge=0, le=10**12)]


class _Spec(BaseModel):
    """Content of `experiment.json`, the keys that are needed to read a search."""

    model_config = ConfigDict(strict=True, extra="allow")
    space: str
    space_source: str
    overrides: dict[str, Any]
    samples: _Count
    trials: _Count
    data: str
    data_settings: dict[str, Any]
    seed: _Count
    version: str
    ray: str
    gpus_per_worker: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    concurrent: Optional[_Count] = None
    track: list[str] = []
    node_types: list[str] = []
    resumed_with: list[str] = []


def say_damaged(search: Experiment) -> None:
    """Print a line for each damaged trial, which is left out."""
    for name, damage in search.damaged.items():
        say(f"{name}: damaged, and left out: {damage}")


def read_experiment(root: str, ended_trials: Mapping[str, Trial] = MappingProxyType({})) -> Experiment:
    """Read an experiment from its folder or URI, running or not.

    Args:
        root: The folder or URI.
        ended_trials: Trials from an earlier call that had ended, by name. They are not read again unless their state
            has changed.

    Raises:
        UserError: There is no experiment, or its `experiment.json` or `trials.json` is damaged.
    """
    search = _open(storage.absolute(root))
    search.alive = driver.is_alive(search.root)

    def read_one(item: tuple[str, Any]) -> Trial | str:
        trial, record = item
        try:
            trial_records.check_record(trial, record)
            if trial in ended_trials and ended_trials[trial].state == record["state"]:
                return ended_trials[trial]
            return _read_trial(search, trial, record)
        except _DAMAGE as error:
            return _describe(error)

    records = trial_records.read_records(search.root)
    with ThreadPoolExecutor(_READERS) as pool:
        for name, trial in zip(records, pool.map(read_one, records.items())):
            if isinstance(trial, Trial):
                search.trials.append(trial)
            else:
                search.damaged[name] = trial
    return search


def repeated_reader(root: str) -> Callable[[], Experiment]:
    """Return a function that reads the experiment at each call, and each trial that has ended only once."""
    ended_trials: dict[str, Trial] = {}

    def read() -> Experiment:
        search = read_experiment(root, ended_trials)
        ended_trials.update({trial.id: trial for trial in search.trials if trial.ended})
        return search

    return read


def _read_trial(search: Experiment, trial: str, record: dict[str, Any]) -> Trial:
    """Read a trial, given its valid entry in `trials.json`. Raises one of `_DAMAGE` where a file of it is damaged."""
    run, state = trial_records.run_folder(search.root, trial), record["state"]
    state = "interrupted" if state == "running" and not search.alive else state
    metrics = experiment.read_metrics(run)
    decisions = trial_decisions(search.root, trial)
    if state == "stopped" and decisions:  # workers log on until Ray ends them, which takes a while
        metrics = [line for line in metrics if line["iteration"] <= decisions[-1].iteration]
    stored = "" if search.spec["version"] == __version__ else storage.join(run, experiment.CONFIG_FILE)
    config = search.space.resumed_config(stored, record["sampled"], record["repeat"])
    read = Trial(trial, state, run, record["sampled"], record["repeat"], config, metrics, record["reason"], decisions)
    _check_end(read)
    return read


def _check_end(trial: Trial) -> None:
    """Raise `ValueError` where a trial's metrics end earlier than its state implies."""
    budget, file = trial.config.train.iterations, f"{trial.run}/{experiment.METRICS_FILE}"
    if trial.state == "finished" and trial.iteration < budget:
        raise ValueError(f"the trial has finished, but {file} ends at iteration {trial.iteration} of {budget}")
    if trial.state == "stopped" and not trial.metrics:
        raise ValueError(f"the trial was stopped early, but {file} has no line")


def _describe(error: Exception) -> str:
    """Return an exception of `_DAMAGE` as text for a message."""
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
    try:
        _Spec.model_validate(spec)
    except ValidationError as error:
        errors = error.errors()
        missing = [str(one["loc"][0]) for one in errors if one["type"] == "missing"]
        if missing or not isinstance(spec, dict):
            raise UserError(
                f"{uri}: not an experiment of tune_ego: {', '.join(missing) or 'everything'} missing"
            ) from error
        values = ", ".join(f"{key} is {spec[key]!r:.40}" for key in dict.fromkeys(str(one["loc"][0]) for one in errors))
        raise UserError(f"{uri}: damaged: {values}") from error
    opened = Experiment(root, spec, [])
    try:
        opened.space  # noqa: B018 - built here, and kept
    except UserError:
        raise
    except _DAMAGE as error:
        raise UserError(f"{uri}: not an experiment of tune_ego ({error})") from error
    return opened
