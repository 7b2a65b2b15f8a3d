"""Published results beside ours with intervals: the numbers of the page that `reproduce` writes."""

from __future__ import annotations

from statistics import mean
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.evaluation.tables import LU, PAPER, PUBLISHED, PUBLISHED_CLASSES, SOURCES, Published
from tune_ego.results.experiment import EVALUATION_FILE, Experiment, by_configuration
from tune_ego.results.intervals import mean_interval, paired_difference

METRICS = {"micro": "micro_accuracy", "mean_class": "mean_class_accuracy"}
"""Name of an accuracy in the numbers -> its key in `evaluation.json`."""


class Row(NamedTuple):
    """A published result, and the trials that repeat it."""

    published: str
    """`Published.model`."""
    source: str
    label: str
    """`label` of the trials' configuration."""
    stream: str
    """Stream of their test that is compared."""
    reference: tuple[str, str] | None = None
    """(label, stream) of the row that it is compared with."""
    paired: bool = True
    """Whether runs of both rows with one seed belong together: they start from the same weights."""


ROWS = (
    Row("RGB, no attention (-o)", LU, "lu_o", "rgb"),
    Row("flow, no attention (-o)", LU, "lu_o", "flow"),
    Row("fused, no attention (-o)", LU, "lu_o", "fused"),
    Row("RGB, no gaze loss (-v)", LU, "lu_v", "rgb", ("lu_o", "rgb"), paired=False),
    Row("flow, no gaze loss (-v)", LU, "lu_v", "flow", ("lu_o", "flow"), paired=False),
    Row("fused, no gaze loss (-v)", LU, "lu_v", "fused", ("lu_o", "fused"), paired=False),
    Row("RGB (-a)", LU, "lu_a", "rgb", ("lu_v", "rgb")),
    Row("flow (-a)", LU, "lu_a", "flow", ("lu_v", "flow")),
    Row("fused (-a)", LU, "lu_a", "fused", ("lu_v", "fused")),
    Row('RGB, "Orig."', PAPER, "lu_original", "rgb"),
    Row("(1) RGB, mixed precision", PAPER, "1_mixed_precision", "rgb", ("lu_original", "rgb")),
    Row("(2) + Ranger", PAPER, "2_ranger", "rgb", ("1_mixed_precision", "rgb")),
    Row("(3) + Ranger, 3 stacked blocks", PAPER, "3_stacked_stam", "rgb", ("2_ranger", "rgb")),
)
"""Rows of the page, in its order."""


def reproduction_numbers(searches: list[Experiment]) -> dict[str, Any]:
    """Return the published and our test accuracies, as fractions, for each of `ROWS`.

    Ours are means over seeds with 95 % intervals. `from_published` is our mean minus the published value, with the
    interval of our mean. `from_reference` is the difference from the row that this one is compared with, beside the
    published difference; it has an interval where the runs of both are pairs. A row without tested trials has None.

    Args:
        searches: Searches whose finished trials `evaluate` has tested. A trial's `label` says which row it belongs to.
    """
    tested: dict[str, dict[int, dict[str, Any]]] = {}
    for search in searches:
        for configuration in by_configuration(search.trials):
            finished = [trial for trial in configuration.trials if trial.state == "finished"]
            tests = {trial.config.seed: _read_test(trial.run) for trial in finished}
            tested[configuration.config.label] = {seed: test for seed, test in tests.items() if test is not None}
    return {
        "rows": [_row(row, tested) for row in ROWS],
        "sources": SOURCES,
        "searches": [_conditions(search) for search in searches],
        "not_comparable": _not_comparable([test for tests in tested.values() for test in tests.values()]),
    }


def _conditions(search: Experiment) -> dict[str, Any]:
    """Return what a search was run with: weights, iterations, seeds, data, changes of its search space, versions."""
    configs = [trial.config for trial in search.trials]
    starts = {uri for config in configs for uri in (config.init_from.rgb, config.init_from.flow) if uri is not None}
    return {
        "root": search.root,
        "data": search.spec["data"],
        "iterations": sorted({config.train.iterations for config in configs}),
        "seeds": sorted({config.seed for config in configs}),
        "starts_from": sorted(map(str, starts)) or ["random weights"],
        "changes": {key: str(value) for key, value in search.spec["overrides"].items()},
        "versions": [search.spec["version"], *search.spec.get("resumed_with", [])],
    }


def _not_comparable(tests: list[dict[str, Any]]) -> str:
    """Return the reason why these tests are not those of the published results; "" if they are."""
    classes, splits = ({count(test) for test in tests} for count in (lambda test: len(test["classes"]), _split))
    if classes - {PUBLISHED_CLASSES}:
        return f"{max(classes - {PUBLISHED_CLASSES})} classes here, {PUBLISHED_CLASSES} in EGTEA Gaze+."
    if splits - {1}:
        return f"tested on split {max(splits - {1})}, the published results are of split 1."
    return ""


def _split(test: dict[str, Any]) -> int:
    return int(test["split"])


def _read_test(run: str) -> dict[str, Any] | None:
    """Return the content of a run's `evaluation.json`; None if it has none, or it is no test."""
    uri = storage.join(run, EVALUATION_FILE)
    if not storage.exists(uri):
        return None
    try:
        content: dict[str, Any] = storage.read_json(uri)
        return None if content.get("clips_trained_on") else content
    except (UserError, AttributeError):  # damaged: as if it was not there
        return None


def _row(row: Row, tested: dict[str, dict[int, dict[str, Any]]]) -> dict[str, Any]:
    published = _published(row)
    before = None
    if row.reference is not None:
        before = next(other for other in ROWS if (other.label, other.stream) == row.reference)
    numbers: dict[str, Any] = {"model": row.published, "source": row.source, "label": row.label, "stream": row.stream}
    numbers["reference"] = before.published if before is not None else None
    for metric in METRICS:
        value = getattr(published, metric) / 100
        ours = _accuracies(tested, row.label, row.stream, metric)
        interval = mean_interval(list(ours.values()))
        low, high = (interval.low, interval.high) if interval is not None else (None, None)
        centre = mean(ours.values()) if ours else None
        numbers[metric] = {
            "published": value,
            "mean": centre,
            "low": low,
            "high": high,
            "seeds": len(ours),
            "from_published": None if centre is None else centre - value,
            "from_published_low": None if low is None else low - value,
            "from_published_high": None if high is None else high - value,
            "published_from_reference": None,
            "from_reference": None,
        }
        if before is not None:
            theirs = _accuracies(tested, before.label, before.stream, metric)
            numbers[metric]["published_from_reference"] = value - getattr(_published(before), metric) / 100
            numbers[metric]["from_reference"] = _difference(ours, theirs, paired=row.paired)
    return numbers


def _difference(ours: dict[int, float], theirs: dict[int, float], *, paired: bool) -> dict[str, Any] | None:
    """Return the mean difference, with its interval if runs with one seed are pairs."""
    if not paired:
        return {"mean": mean(ours.values()) - mean(theirs.values()), "low": None} if ours and theirs else None
    interval = paired_difference(ours, theirs)
    return None if interval is None else {**interval._asdict(), "holds_zero": interval.holds_zero}


def _published(row: Row) -> Published:
    return next(one for one in PUBLISHED if (one.model, one.source) == (row.published, row.source) and one.split == "1")


def _accuracies(tested: dict[str, dict[int, dict[str, Any]]], label: str, stream: str, metric: str) -> dict[int, float]:
    """Return seed -> test accuracy."""
    tests = tested.get(label, {})
    return {seed: float(test[stream][METRICS[metric]]) for seed, test in tests.items() if stream in test}
