"""Numbers of a report: the content of `report.json`, computed from an experiment's files.

Accuracies are fractions in [0, 1]. The key of a time ends with its unit. Nothing is drawn here.
"""

from __future__ import annotations

from datetime import datetime, timezone
from functools import reduce
from statistics import mean, stdev
from typing import Any

from tune_ego import __version__
from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.evaluation.tables import PUBLISHED, PUBLISHED_CLASSES, SOURCES, views_name
from tune_ego.report.cost import cost_numbers, trial_seconds
from tune_ego.report.importance import importance_numbers
from tune_ego.report.provenance import reproduction
from tune_ego.report.repeats import repeats_numbers
from tune_ego.report.stopping import stopping_numbers
from tune_ego.results.experiment import METRIC, Configuration, Experiment, Trial, by_configuration
from tune_ego.results.tables import config_value

_NUMERIC_FORMS = ("uniform", "loguniform", "randint")
_MOST_BINS, _LEAST_IN_BIN = 4, 3
"""Bins of a numeric range at most; trials in a bin at least."""
_MOST_AXES = 13
"""Most parameters with an axis in the parallel coordinates."""
_POINTS, _LEAST_POINTS, _MOST_POINTS = 8000, 12, 400
"""Points in a panel of learning curves, summed over all trials; least and most points of one curve."""
SERIES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "gaze_loss": "gaze loss",
    METRIC: "validation mean class accuracy",
    "learning_rate": "learning rate",
}
"""Key of metrics.jsonl -> title of its learning curves."""


def experiment_numbers(
    search: Experiment, evaluation: dict[str, Any], options: list[str], reference: str | None = None
) -> dict[str, Any]:
    """Return all numbers of one experiment.

    Args:
        search: The experiment.
        evaluation: The result of `read_evaluation`.
        options: Options of the `report` command, as words of its command line.
        reference: Configuration that the others are compared with over their repeats; None: the best one.
    """
    trials = sorted(search.trials, key=lambda trial: -1 if trial.accuracy is None else trial.accuracy, reverse=True)
    best, importance = _best_configuration(search), importance_numbers(search)
    return {
        "report": {"version": __version__, "made": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        "experiment": _overview(search),
        "damaged": [{"trial": trial, "reason": reason} for trial, reason in sorted(search.damaged.items())],
        "answer": _answer(search, best),
        "choices": _choices(search),
        "repeats": repeats_numbers(search, reference),
        "trials": [_trial_row(search, trial) for trial in trials],
        "curves": _curves(trials, best),
        "stopping": stopping_numbers(search),
        "parallel": _parallel(search.space.searched_keys, importance),
        "importance": importance,
        "published": published_numbers(search, best, evaluation),
        "evaluation": evaluation,
        "cost": cost_numbers(search),
        "reproduce": reproduction(search, evaluation, options),
    }


def _best_configuration(search: Experiment) -> Configuration | None:
    try:
        return search.best
    except UserError:  # nothing has been validated yet
        return None


def _overview(search: Experiment) -> dict[str, Any]:
    """Return name, state, settings and numbers of trials of an experiment."""
    states = [trial.state for trial in search.trials]
    base = search.space.base
    config = search.trials[0].config if search.trials else None
    return {
        "name": search.root.rpartition("/")[2],
        "root": search.root,
        "state": _describe_state(search),
        "started": search.spec.get("started", ""),
        "trials_planned": search.spec["trials"],
        "trials_drawn": len(states) + len(search.damaged),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "searcher": search.space.searcher,
        "scheduler": search.space.scheduler.name,
        "samples": search.space.samples,
        "repeats": search.space.repeats,
        "budget_iterations": config.train.iterations if config else base.get("train", {}).get("iterations"),
        "validation": validation_name(search),
        "keys": search.space.searched_keys,
    }


def _describe_state(search: Experiment) -> str:
    """Return the state of a search in words that complete "The search is"."""
    trials, spec = search.trials, search.spec
    ended = f"{sum(trial.ended for trial in trials)} of {spec['trials']} trials have ended"
    if search.alive:
        return f"running: {ended}; this report shows the results so far"
    if not trials:
        return "empty: no trial has been started, or none can be read"
    failed = all(trial.state == "failed" for trial in trials)
    if failed and len(trials) >= spec["trials"] and not search.damaged:
        return f"over, and every trial failed; the first one failed with: {trials[0].reason}"
    if failed or sum(trial.ended for trial in trials) < spec["trials"] - len(search.damaged):
        return f"interrupted: {ended}; to resume: tune-ego resume {search.root}"
    return f"over: {ended}"


def validation_name(search: Experiment) -> str:
    """Return the name of the clips on which the validation accuracies were measured."""
    kinds = {trial.config.data for trial in search.trials}
    names = sorted(f"{data.validation} fold {data.fold} of split {data.split}" for data in kinds)
    return " and ".join(names) or "unknown: there is no trial"


def raw_value(config: Config, key: str) -> Any:
    """Return the value of a dotted key in a configuration; None where the configuration has no such key."""
    return reduce(lambda node, part: getattr(node, part, None), key.split("."), config)  # type: ignore[arg-type,return-value]


def _spread(values: list[float]) -> dict[str, float | None]:
    """Return mean, sample standard deviation (None for one value) and maximum."""
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None, "best": max(values)}


def _trial_row(search: Experiment, trial: Trial) -> dict[str, Any]:
    """Return the row of one trial in the table of all trials."""
    keys, best = search.space.searched_keys, trial.best or {}
    numbers = {key: value for key in keys if _is_number(value := raw_value(trial.config, key))}
    return {
        "trial": trial.id,
        "state": trial.state,
        "reason": trial.reason,
        "warning": trial.warning,
        "iterations": trial.iteration,
        "accuracy": trial.accuracy,
        "at_iteration": best.get("iteration"),
        "micro_accuracy": best.get("val_micro_accuracy"),
        "seed": trial.config.seed,
        "values": [config_value(trial.config, key) for key in keys],
        "numbers": numbers,
        "hours": trial_seconds(trial) / 3600,
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _answer(search: Experiment, best: Configuration | None) -> dict[str, Any] | None:
    """Return the best configuration and its accuracies; None where no trial has been validated."""
    if best is None:
        return None
    lines = [line for trial in best.trials if (line := trial.best) is not None]
    prefix = f"{METRIC}_"
    streams = sorted({key.removeprefix(prefix) for line in lines for key in line if key.startswith(prefix)})
    accuracies = [trial.accuracy for trial in search.trials if trial.accuracy is not None]
    keys = [key for key in search.space.searched_keys if raw_value(best.config, key) is not None]
    return {
        "configuration": best.id,
        "trials": [trial.id for trial in best.trials],
        "values": [{"key": key, "value": config_value(best.config, key)} for key in keys],
        "accuracy": best.accuracy,
        "spread": best.spread,
        "repeats_validated": len(best.accuracies),
        "at_iterations": [line["iteration"] for line in lines],
        "micro_accuracy": _mean_micro(lines),
        "streams": [
            {"stream": name, "accuracy": mean(line[prefix + name] for line in lines if prefix + name in line)}
            for name in streams
        ],
        "all_trials": {"validated": len(accuracies), **_spread(accuracies), "worst": min(accuracies)},
        "warnings": [f"{trial.id}: {trial.warning}" for trial in best.trials if trial.warning],
    }


def _mean_micro(lines: list[dict[str, Any]]) -> float | None:
    """Return the mean micro accuracy of validation lines; None where no line has one."""
    accuracies = [line["val_micro_accuracy"] for line in lines if "val_micro_accuracy" in line]
    return mean(accuracies) if accuracies else None


def last_common_iteration(trials: list[Trial]) -> int | None:
    """Return the last iteration at which every validated trial was validated; None where there is no such iteration.

    Trials that were stopped early can be compared with finished trials at this iteration.
    """
    validated = [{line["iteration"] for line in trial.validations} for trial in trials if trial.validations]
    return max(set.intersection(*validated), default=None) if validated else None


def _choices(search: Experiment) -> dict[str, Any]:
    """Return the accuracies reached with each value of each searched parameter.

    The values of a numeric range are grouped into bins. A parameter with several branches has an entry for each.
    """
    trials = [trial for trial in search.trials if trial.accuracy is not None]
    common = last_common_iteration(trials)
    parameters: list[dict[str, Any]] = []
    for key in search.space.searched_keys:
        by_branch: dict[int, list[Trial]] = {}  # numeric ranges: index of the branch -> trials
        by_value: dict[str, list[Trial]] = {}  # choices: value -> trials
        for trial in trials:
            index = search.space.branch_of(trial.sampled).get(key)
            if index is not None and search.space.branches[key][index].domain.form in _NUMERIC_FORMS:
                by_branch.setdefault(index, []).append(trial)
            elif raw_value(trial.config, key) is not None:  # this trial's branch has the parameter
                by_value.setdefault(config_value(trial.config, key), []).append(trial)
        for index, branch_trials in sorted(by_branch.items()):
            branch = search.space.branches[key][index]
            when = ", ".join(f"{name} {'/'.join(map(str, allowed))}" for name, allowed in branch.when.items())
            form, ends = branch.domain.form, list(branch.domain.values)
            rows = _value_rows(_bins(key, branch_trials), common)
            parameters.append({"key": key, "when": when, "form": form, "range": ends, "values": rows})
        if by_value:
            ordered = {value: by_value[value] for value in _in_order(search, key, set(by_value))}
            rows = _value_rows(ordered, common)
            parameters.append({"key": key, "when": "", "form": "choice", "values": rows})
    return {"even_iteration": common, "parameters": parameters}


def _parallel(keys: list[str], importance: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters with an axis: the most important ones, or the first ones where no importance is known."""
    shares = dict.fromkeys(keys, 0.0)
    for entry in importance["entries"]:
        shares[entry["key"]] += entry["share"]
    ordered = sorted(keys, key=lambda key: -shares[key])
    return {
        "keys": ordered[:_MOST_AXES],
        "left_out": ordered[_MOST_AXES:],
        "by_importance": bool(importance["entries"]),
    }


def _in_order(search: Experiment, key: str, values: set[str]) -> list[str]:
    """Return the values of a choice in the order of the search space, unlisted values last."""
    listed = [_format_value(value) for branch in search.space.branches[key] for value in branch.domain.values]
    return sorted(values, key=lambda value: (listed.index(value) if value in listed else len(listed), value))


def _format_value(value: Any) -> str:
    """Return a value of the search space as `config_value` prints it."""
    return f"{value:.4g}" if isinstance(value, float) else str(tuple(value) if isinstance(value, list) else value)


def _bins(key: str, trials: list[Trial]) -> dict[str, list[Trial]]:
    """Return trials in up to four groups of equal size (within one), ascending in the value of `key`."""
    ordered = sorted(trials, key=lambda trial: float(raw_value(trial.config, key)))
    count = max(1, min(_MOST_BINS, len(ordered) // _LEAST_IN_BIN))
    groups: dict[str, list[Trial]] = {}
    for number in range(count):
        part = ordered[len(ordered) * number // count : len(ordered) * (number + 1) // count]
        ends = [config_value(trial.config, key) for trial in (part[0], part[-1])]
        groups.setdefault(" to ".join(dict.fromkeys(ends)), []).extend(part)
    return groups


def _value_rows(groups: dict[str, list[Trial]], common: int | None) -> list[dict[str, Any]]:
    """Return a row for each group of trials; `common` is the last common iteration."""
    rows = []
    for value, trials in groups.items():
        accuracies = [trial.accuracy for trial in trials if trial.accuracy is not None]
        validations = [line for trial in trials for line in trial.validations]
        at_common = [line[METRIC] for line in validations if line["iteration"] == common]
        rows.append(
            {
                "value": value,
                "trials": len(accuracies),
                **_spread(accuracies),
                "mean_at_even": mean(at_common) if at_common else None,
                "members": [trial.id for trial in trials],
            }
        )
    return rows


def _curves(trials: list[Trial], best: Configuration | None) -> dict[str, Any]:
    """Return the learning curves, thinned to a number of points that a figure can show."""
    logged = {key for trial in trials for line in trial.metrics for key in line}
    started = [trial for trial in trials if trial.metrics]
    most = min(_MOST_POINTS, max(_LEAST_POINTS, _POINTS // max(len(started), 1)))
    return {
        "logged": {key: name for key, name in SERIES.items() if key in logged},
        "not_logged": [name for key, name in SERIES.items() if key not in logged],
        "most_points": most,
        "streams": max((len(trial.config.stream_names) for trial in started), default=0),
        "best": [trial.id for trial in best.trials] if best else [],
        "trials": [
            {"trial": trial.id, "state": trial.state, "series": _series(trial, most, logged)} for trial in started
        ],
    }


def _series(trial: Trial, most: int, logged: set[str]) -> dict[str, list[list[float]]]:
    """Return key -> [iterations, values] of one trial, at most `most` points a key."""
    series = {}
    for key in SERIES:
        points = [(line["iteration"], line[key]) for line in trial.metrics if key in line] if key in logged else []
        if points:
            places = sorted({round(n * (len(points) - 1) / max(most - 1, 1)) for n in range(min(most, len(points)))})
            places = places if len(points) > most else list(range(len(points)))
            series[key] = [[points[place][axis] for place in places] for axis in (0, 1)]
    return series


def published_numbers(search: Experiment, best: Configuration | None, evaluation: dict[str, Any]) -> dict[str, Any]:
    """Return the published results and ours; accuracies are fractions.

    Args:
        search: The experiment. Where it searches `label`, each labelled configuration gets a row.
        best: The best configuration, whose row is shown otherwise.
        evaluation: The result of `read_evaluation`; a row for each stream.
    """
    trained_on = evaluation.get("clips_trained_on")
    ours = [
        {
            "model": f"evaluated checkpoint, {row['stream']}",
            "micro": row["micro_accuracy"],
            "mean_class": row["mean_class_accuracy"],
            "on": f"test clips of split {evaluation['split']}{views_name(evaluation)}"
            + (f"; not a test: the model was trained on {trained_on} of these clips" if trained_on else ""),
        }
        for row in evaluation.get("streams", [])
    ]
    has_labels = "label" in search.space.searched_keys
    labelled = [entry for entry in by_configuration(search.trials) if entry.accuracies] if has_labels else []
    for configuration in labelled or ([best] if best else []):
        lines = [line for trial in configuration.trials if (line := trial.best) is not None]
        ours.append(
            {
                "model": f"trial {configuration.config.label or configuration.id}",
                "micro": _mean_micro(lines),
                "mean_class": configuration.accuracy,
                "on": f"validation clips: {validation_name(search)}",
            }
        )
    classes = len(evaluation["classes"]) if evaluation.get("classes") else None
    return {
        "rows": [
            {
                "model": entry.model,
                "micro": None if entry.micro is None else entry.micro / 100,
                "mean_class": entry.mean_class / 100,
                "on": f"test clips of split {entry.split}"
                if entry.split.isdecimal()
                else "test clips, mean of the splits",
                "source": entry.source,
                "start": entry.start,
            }
            for entry in PUBLISHED
        ],
        "sources": SOURCES,
        "ours": ours,
        "classes": classes,
        "published_classes": PUBLISHED_CLASSES,
        "comparable": None if classes is None else classes == PUBLISHED_CLASSES,
    }
