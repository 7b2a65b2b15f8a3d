"""Configurations with 95 % intervals over their repeats, and their paired differences from one of them."""

from __future__ import annotations

from collections import Counter
from statistics import mean
from typing import Any

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.evaluation.tables import views_name
from tune_ego.results.experiment import EVALUATION_FILE, METRIC, Configuration, Experiment, Trial, by_configuration
from tune_ego.results.intervals import Interval, mean_interval, paired_difference
from tune_ego.results.tables import config_value

_STREAMS = ("fused", "rgb", "flow")
"""Streams of an evaluation, the one that counts first."""
_GAZE = "nss"
"""Gaze score of an attention map: the normalised scanpath saliency, minus that of a Gaussian at the centre."""


def repeats_numbers(search: Experiment, reference: str | None = None) -> dict[str, Any]:
    """Return a row for each validated configuration, the best one first; no rows where the search has no repeats.

    Configurations are ordered by the mean accuracy at the last validation of their repeats, and compared at it. The
    best of many validations, which is given too, is biased upwards. Differences are those of repeats with the same
    seed. A trial has a test accuracy where `evaluate` has tested it; where tests have different crops, only those with
    the most frequent ones count. `streams` has that of rgb and flow, and the
    gaze score `nss` of their attention, minus that of a Gaussian at the centre.

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
    tests = _read_tests(search.trials)
    tested = {one.id: _tests(one.trials, tests) for one in by_configuration(search.trials)}
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
                "label": one.config.label,
                "values": [config_value(one.config, key) for key in search.space.searched_keys],
                "trials": [trial.id for trial in one.trials],
                "iterations": sorted({trial.validations[-1]["iteration"] for trial in one.trials if trial.validations}),
                "last": _summary(list(last[one.id].values())),
                "best": _summary(one.accuracies),
                "difference": _difference(last[one.id], last[reference]) if one.id != reference else None,
                **_compare_tests(tested[one.id], tested[reference] if one.id != reference else {}),
            }
            for one in validated
        ],
    }


def last_accuracies(configuration: Configuration) -> dict[int, float]:
    """Return seed -> validation mean class accuracy at the last validation of each repeat that has one."""
    validated = [trial for trial in configuration.trials if trial.validations]
    return {trial.config.seed: trial.validations[-1][METRIC] for trial in validated}


def _read_tests(trials: list[Trial]) -> dict[str, dict[str, Any]]:
    """Return trial -> content of its `evaluation.json`, of those that were tested with the most frequent crops."""
    tests: dict[str, dict[str, Any]] = {}
    for trial in trials:
        uri = storage.join(trial.run, EVALUATION_FILE)
        try:
            content = storage.read_json(uri) if storage.exists(uri) else None
        except UserError:  # damaged: as if it was not there
            continue
        if isinstance(content, dict):
            tests[trial.id] = content
    views = Counter(views_name(test) for test in tests.values()).most_common(1)
    return {trial: test for trial, test in tests.items() if views_name(test) == views[0][0]}


def _tests(trials: list[Trial], tests: dict[str, dict[str, Any]]) -> dict[str, dict[int, float]]:
    """Return measure -> seed -> value of each trial that was tested; `tests` is the result of `_read_tests`.

    Measures: `test`, the mean class accuracy that counts; for each stream `rgb/test`, and `rgb/nss` of its attention.
    """
    measures: dict[str, dict[int, float]] = {}
    for trial in trials:
        try:
            values = _test_values(tests[trial.id])
        except (LookupError, AttributeError, StopIteration, TypeError, ValueError):
            continue  # not tested, or damaged
        for name, value in values.items():
            measures.setdefault(name, {})[trial.config.seed] = value
    return measures


def _test_values(evaluation: dict[str, Any]) -> dict[str, float]:
    """Return measure -> value of an `evaluation.json`; nothing where the run was trained on test clips.

    Raises `ValueError` for an accuracy that is no fraction, and what else a damaged file leads to.
    """
    if evaluation.get("clips_trained_on"):
        return {}
    accuracies = {name: evaluation[name]["mean_class_accuracy"] for name in _STREAMS if name in evaluation}
    if not all(0 <= value <= 1 for value in accuracies.values()):
        raise ValueError(f"accuracies {accuracies}")
    attention = evaluation.get("attention") or {}
    centre = attention.get("centre")
    scores = {name: attention.get(name) for name in _STREAMS[1:]}  # None where no frame of the clips has gaze
    return {
        "test": next(iter(accuracies.values())),
        **{f"{name}/test": value for name, value in accuracies.items() if name != "fused"},
        **{f"{name}/{_GAZE}": score[_GAZE] - centre[_GAZE] for name, score in scores.items() if score and centre},
    }


def _compare_tests(ours: dict[str, dict[int, float]], reference: dict[str, dict[int, float]]) -> dict[str, Any]:
    """Return mean, interval and difference of each measure of `_tests`; those of streams under `streams`."""

    def compare(measure: str, name: str) -> dict[str, Any]:
        values = ours.get(measure, {})
        difference = _difference(values, reference.get(measure, {}))
        return {name: _summary(list(values.values())), f"{name}_difference": difference}

    return {
        **compare("test", "test"),
        "streams": {
            stream: {**compare(f"{stream}/test", "test"), **compare(f"{stream}/{_GAZE}", _GAZE)}
            for stream in _STREAMS[1:]
        },
    }


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
