"""Configurations with 95 % intervals over their repeats, and their paired differences from one of them."""

from __future__ import annotations

from statistics import mean
from typing import Any

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.results.experiment import EVALUATION_FILE, METRIC, Configuration, Experiment, Trial, by_configuration
from tune_ego.results.intervals import Interval, mean_interval, paired_difference
from tune_ego.results.tables import config_value

_STREAMS = ("fused", "rgb", "flow")
"""Streams of an evaluation, the one that counts first."""


def repeats_numbers(search: Experiment, reference: str | None = None) -> dict[str, Any]:
    """Return a row for each validated configuration, the best one first; no rows where the search has no repeats.

    Configurations are ordered by the mean accuracy at the last validation of their repeats, and compared at it. The
    best of many validations, which is given too, is biased upwards. Differences are those of repeats with the same
    seed. A trial has a test accuracy where `evaluate` has tested it.

    Args:
        search: The search.
        reference: Id of the configuration that the others are compared with; None: the best one.

    Raises:
        UserError: The search has no validated configuration of this id.
    """
    if search.space.repeats < 2:
        if reference is not None:
            raise UserError(f"--reference {reference}: the search has no repeats, so there are no paired differences")
        return {"reference": None, "rows": []}
    last = {one.id: last_accuracies(one) for one in by_configuration(search.trials)}
    tested = {one.id: _test_accuracies(one.trials) for one in by_configuration(search.trials)}
    validated = [one for one in by_configuration(search.trials) if last[one.id]]
    validated.sort(
        key=lambda one: (len(last[one.id]) == search.space.repeats, mean(last[one.id].values())), reverse=True
    )
    ids = [one.id for one in validated]
    if reference is not None and reference not in ids:
        raise UserError(f"--reference {reference}: no validated configuration; there are {', '.join(ids) or 'none'}")
    if not validated:
        return {"reference": None, "rows": []}
    reference = reference or ids[0]
    return {
        "reference": reference,
        "rows": [
            {
                "configuration": one.id,
                "values": [config_value(one.config, key) for key in search.space.searched_keys],
                "trials": [trial.id for trial in one.trials],
                "iterations": sorted({trial.validations[-1]["iteration"] for trial in one.trials if trial.validations}),
                "last": _summary(list(last[one.id].values())),
                "best": _summary(one.accuracies),
                "test": _summary(list(tested[one.id].values())),
                "difference": _difference(last[one.id], last[reference]) if one.id != reference else None,
                "test_difference": _difference(tested[one.id], tested[reference]) if one.id != reference else None,
            }
            for one in validated
        ],
    }


def last_accuracies(configuration: Configuration) -> dict[int, float]:
    """Return seed -> validation mean class accuracy at the last validation of each repeat that has one."""
    validated = [trial for trial in configuration.trials if trial.validations]
    return {trial.config.seed: trial.validations[-1][METRIC] for trial in validated}


def _test_accuracies(trials: list[Trial]) -> dict[int, float]:
    """Return seed -> test mean class accuracy of each trial that was tested."""
    accuracies = {}
    for trial in trials:
        uri = storage.join(trial.run, EVALUATION_FILE)
        if not storage.exists(uri):
            continue
        try:
            content = storage.read_json(uri)
            stream = next(name for name in _STREAMS if name in content)
            accuracy = float(content[stream]["mean_class_accuracy"])
        except (UserError, LookupError, StopIteration, TypeError, ValueError):  # damaged: as if it was not there
            continue
        if 0 <= accuracy <= 1 and not content.get("clips_trained_on"):
            accuracies[trial.config.seed] = accuracy
    return accuracies


def _summary(values: list[float]) -> dict[str, Any] | None:
    """Return mean and interval; the ends are None for one value."""
    if not values:
        return None
    interval = mean_interval(values)
    low, high = (interval.low, interval.high) if interval is not None else (None, None)
    return {"mean": mean(values), "low": low, "high": high, "size": len(values)}


def _difference(ours: dict[int, float], theirs: dict[int, float]) -> dict[str, Any] | None:
    interval = paired_difference(ours, theirs)
    return None if interval is None else _as_numbers(interval)


def _as_numbers(interval: Interval) -> dict[str, Any]:
    return {**interval._asdict(), "holds_zero": interval.holds_zero}
