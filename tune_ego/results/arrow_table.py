"""The trials of an experiment as an Arrow table. Kept apart from `experiment`, which is imported where PyArrow is not
needed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    from tune_ego.results.experiment import Experiment

_MIXED = (pa.ArrowInvalid, pa.ArrowTypeError)
"""Errors of a column whose values have no common type."""


def trials_table(experiment: Experiment) -> pa.Table:
    """Return one row for each trial, in the order of the trials.

    Columns: `trial` (id), `state`, `iteration` (the last one in its metrics), `val_mean_class_accuracy` (its best, in
    [0, 1], null before the first validation), `best_iteration`, `seed`, `run` (folder or URI), and one for each
    searched key, named by the key. A searched key whose values have no common type is a column of strings.
    """
    trials = experiment.trials
    columns: dict[str, list[Any]] = {
        "trial": [trial.id for trial in trials],
        "state": [trial.state for trial in trials],
        "iteration": [trial.iteration for trial in trials],
        "val_mean_class_accuracy": [trial.accuracy for trial in trials],
        "best_iteration": [trial.best["iteration"] if trial.best else None for trial in trials],
        "seed": [trial.config.seed for trial in trials],
        "run": [trial.run for trial in trials],
    }
    table = pa.table(columns)
    for key in experiment.space.searched_keys:
        if key not in columns:
            table = table.append_column(key, _column([_value(trial.config, key) for trial in trials]))
    return table


def _value(config: Any, key: str) -> Any:
    """Return the value of a dotted key; None where the configuration has no such key (Ranger has no momentum)."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return list(config) if isinstance(config, tuple) else config


def _column(values: list[Any]) -> pa.Array:
    try:
        return pa.array(values)
    except _MIXED:
        return pa.array([None if value is None else str(value) for value in values])
