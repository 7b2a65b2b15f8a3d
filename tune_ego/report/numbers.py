"""Everything that a report shows, computed from an experiment's files into plain containers: `report.json`.

Accuracies are fractions in [0, 1], times are in the unit that their key ends with. No drawing here.
"""

from __future__ import annotations

from datetime import datetime, timezone
from functools import reduce
from statistics import mean, stdev
from typing import Any

from tune_ego import __version__
from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.evaluation.tables import PUBLISHED, PUBLISHED_CLASSES, SOURCES
from tune_ego.report.cost import cost_numbers, trial_seconds
from tune_ego.report.importance import importance_numbers
from tune_ego.report.reading import Found
from tune_ego.report.reproduce import reproduction
from tune_ego.report.stopping import stopping_numbers
from tune_ego.results.experiment import METRIC, Configuration, Experiment, Trial, by_configuration, config_value

RANGES = ("uniform", "loguniform", "randint")
_MOST_BINS, _LEAST_IN_BIN = 4, 3
_MOST_AXES = 13
"""Parameters of the parallel coordinates."""
_POINTS, _LEAST_POINTS, _MOST_POINTS = 8000, 12, 400
"""Points of a panel of learning curves over all trials; of a curve at least and at most."""
SERIES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "gaze_loss": "gaze loss",
    METRIC: "validation mean class accuracy",
    "learning_rate": "learning rate",
}
"""Key of metrics.jsonl -> what it is."""


def experiment_numbers(found: Found, evaluation: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """All numbers of one experiment; `evaluation` is what `read_evaluation` gave, `options` are the command's."""
    search = found.experiment
    trials = sorted(search.trials, key=lambda trial: -1 if trial.accuracy is None else trial.accuracy, reverse=True)
    best, shares = _best(search), importance_numbers(search)
    return {
        "report": {"version": __version__, "made": datetime.now(timezone.utc).isoformat(timespec="seconds")},
        "experiment": _overview(found),
        "damaged": [{"trial": trial, "reason": reason} for trial, reason in sorted(found.damaged.items())],
        "answer": _answer(search, best),
        "choices": _choices(search),
        "trials": [_trial(search, trial) for trial in trials],
        "curves": _curves(trials, best),
        "stopping": stopping_numbers(found),
        "parallel": _parallel(search.space.searched_keys, shares),
        "importance": shares,
        "published": published_numbers(search, best, evaluation),
        "evaluation": evaluation,
        "cost": cost_numbers(search),
        "reproduce": reproduction(search, evaluation, options),
    }


def _best(search: Experiment) -> Configuration | None:
    try:
        return search.best
    except UserError:  # nothing has been validated yet
        return None


def _overview(found: Found) -> dict[str, Any]:
    search = found.experiment
    states = [trial.state for trial in search.trials]
    base = search.space.base
    config = search.trials[0].config if search.trials else None
    return {
        "name": search.root.rpartition("/")[2],
        "root": search.root,
        "state": _state(found),
        "started": search.spec.get("started", ""),
        "trials_planned": search.spec["trials"],
        "trials_drawn": len(states) + len(found.damaged),
        "states": {state: states.count(state) for state in sorted(set(states))},
        "searcher": search.space.searcher,
        "scheduler": search.space.scheduler.name,
        "samples": search.space.samples,
        "repeats": search.space.repeats,
        "budget_iterations": config.train.iterations if config else base.get("train", {}).get("iterations"),
        "validation": validation_name(search),
        "keys": search.space.searched_keys,
    }


def _state(found: Found) -> str:
    """In words that follow "the search is"."""
    trials, spec = found.experiment.trials, found.experiment.spec
    ended = f"{sum(trial.ended for trial in trials)} of {spec['trials']} trials have ended"
    if found.alive:
        return f"running: {ended}, and what follows is what is known so far"
    if not trials:
        return "empty: no trial has been started, or none can be read"
    failed = all(trial.state == "failed" for trial in trials)
    if failed and len(trials) >= spec["trials"] and not found.damaged:
        return f"over, and every trial failed, the first for: {trials[0].reason}"
    if failed or sum(trial.ended for trial in trials) < spec["trials"] - len(found.damaged):
        return f"interrupted: {ended}; to go on: tune-ego resume {found.experiment.root}"
    return f"over: {ended}"


def validation_name(search: Experiment) -> str:
    """Which clips the validation accuracies are of."""
    kinds = {trial.config.data for trial in search.trials}
    names = sorted(f"{data.validation} fold {data.fold} of split {data.split}" for data in kinds)
    return " and ".join(names) or "not known: there is no trial"


def raw_value(config: Config, key: str) -> Any:
    """A dotted key's value in a configuration; None where it has no such key."""
    return reduce(lambda node, part: getattr(node, part, None), key.split("."), config)  # type: ignore[arg-type,return-value]


def _spread(values: list[float]) -> dict[str, float | None]:
    return {"mean": mean(values), "spread": stdev(values) if len(values) > 1 else None, "best": max(values)}


def _trial(search: Experiment, trial: Trial) -> dict[str, Any]:
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
    """The best configuration; None where nothing has been validated."""
    if best is None:
        return None
    lines = [line for trial in best.trials if (line := trial.best) is not None]
    prefix = f"{METRIC}_"
    streams = sorted({key.removeprefix(prefix) for line in lines for key in line if key.startswith(prefix)})
    seen = [trial.accuracy for trial in search.trials if trial.accuracy is not None]
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
        "all_trials": {"validated": len(seen), **_spread(seen), "worst": min(seen)},
        "warnings": [f"{trial.id}: {trial.warning}" for trial in best.trials if trial.warning],
    }


def _mean_micro(lines: list[dict[str, Any]]) -> float | None:
    """None where no validation has it."""
    known = [line["val_micro_accuracy"] for line in lines if "val_micro_accuracy" in line]
    return mean(known) if known else None


def even_iteration(trials: list[Trial]) -> int | None:
    """The last iteration at which all validated trials have a validation: there they can be compared."""
    validated = [{line["iteration"] for line in trial.validations} for trial in trials if trial.validations]
    return max(set.intersection(*validated), default=None) if validated else None


def _choices(search: Experiment) -> dict[str, Any]:
    """What each value of each searched parameter was worth; a range in bins, in each branch on its own."""
    trials = [trial for trial in search.trials if trial.accuracy is not None]
    even = even_iteration(trials)
    parameters: list[dict[str, Any]] = []
    for key in search.space.searched_keys:
        drawn: dict[int, list[Trial]] = {}
        named: dict[str, list[Trial]] = {}
        for trial in trials:
            index = search.space.branch_of(trial.sampled).get(key)
            if index is not None and search.space.branches[key][index].domain.form in RANGES:
                drawn.setdefault(index, []).append(trial)
            elif raw_value(trial.config, key) is not None:  # this trial's branch has the parameter
                named.setdefault(config_value(trial.config, key), []).append(trial)
        for index, chosen in sorted(drawn.items()):
            branch = search.space.branches[key][index]
            when = ", ".join(f"{name} {'/'.join(map(str, allowed))}" for name, allowed in branch.when.items())
            groups = _bins(key, chosen)
            form, ends = branch.domain.form, list(branch.domain.values)
            parameters.append({"key": key, "when": when, "form": form, "range": ends, "values": _worth(groups, even)})
        if named:
            ordered = {value: named[value] for value in _in_order(search, key, set(named))}
            parameters.append({"key": key, "when": "", "form": "choice", "values": _worth(ordered, even)})
    return {"even_iteration": even, "parameters": parameters}


def _parallel(keys: list[str], importance: dict[str, Any]) -> dict[str, Any]:
    """Which parameters get an axis: the most important ones, where importance is known, else the first ones."""
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
    """The values of a choice as the search space lists them."""
    listed = [_text(value) for branch in search.space.branches[key] for value in branch.domain.values]
    return sorted(values, key=lambda value: (listed.index(value) if value in listed else len(listed), value))


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(tuple(value) if isinstance(value, list) else value)


def _bins(key: str, trials: list[Trial]) -> dict[str, list[Trial]]:
    """Trials in up to four groups of equally many, ascending in the key's value."""
    ordered = sorted(trials, key=lambda trial: float(raw_value(trial.config, key)))
    count = max(1, min(_MOST_BINS, len(ordered) // _LEAST_IN_BIN))
    groups: dict[str, list[Trial]] = {}
    for number in range(count):
        part = ordered[len(ordered) * number // count : len(ordered) * (number + 1) // count]
        ends = [config_value(trial.config, key) for trial in (part[0], part[-1])]
        groups.setdefault(" to ".join(dict.fromkeys(ends)), []).extend(part)
    return groups


def _worth(groups: dict[str, list[Trial]], even: int | None) -> list[dict[str, Any]]:
    rows = []
    for value, trials in groups.items():
        accuracies = [trial.accuracy for trial in trials if trial.accuracy is not None]
        at_even = [line[METRIC] for trial in trials for line in trial.validations if line["iteration"] == even]
        rows.append(
            {
                "value": value,
                "trials": len(accuracies),
                **_spread(accuracies),
                "mean_at_even": mean(at_even) if at_even else None,
                "members": [trial.id for trial in trials],
            }
        )
    return rows


def _curves(trials: list[Trial], best: Configuration | None) -> dict[str, Any]:
    """The learning curves, thinned to what can be seen."""
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
    """Key -> [iterations, values]."""
    series = {}
    for key in SERIES:
        points = [(line["iteration"], line[key]) for line in trial.metrics if key in line] if key in logged else []
        if points:
            places = sorted({round(n * (len(points) - 1) / max(most - 1, 1)) for n in range(min(most, len(points)))})
            places = places if len(points) > most else list(range(len(points)))
            series[key] = [[points[place][axis] for place in places] for axis in (0, 1)]
    return series


def published_numbers(search: Experiment, best: Configuration | None, evaluation: dict[str, Any]) -> dict[str, Any]:
    """The published results, and ours beside them, fractions; each row says what it was measured on."""
    seen = evaluation.get("clips_trained_on")
    ours = [
        {
            "model": f"evaluated checkpoint, {row['stream']}",
            "micro": row["micro_accuracy"],
            "mean_class": row["mean_class_accuracy"],
            "on": f"test clips of split {evaluation['split']}"
            + (f"; not a test: {seen} of them were trained on" if seen else ""),
        }
        for row in evaluation.get("streams", [])
    ]
    labels = "label" in search.space.searched_keys
    shown = [found for found in by_configuration(search.trials) if found.accuracies] if labels else []
    for found in shown or ([best] if best else []):
        lines = [line for trial in found.trials if (line := trial.best) is not None]
        ours.append(
            {
                "model": f"trial {found.config.label or found.id}",
                "micro": _mean_micro(lines),
                "mean_class": found.accuracy,
                "on": f"validation clips: {validation_name(search)}",
            }
        )
    classes = len(evaluation["classes"]) if evaluation.get("classes") else None
    return {
        "rows": [
            {
                "model": entry.model,
                "micro": entry.micro / 100,
                "mean_class": entry.mean_class / 100,
                "on": f"test clips of split {entry.split}"
                if entry.split.isdecimal()
                else "test clips, mean of the splits",
                "source": entry.source,
            }
            for entry in PUBLISHED
        ],
        "sources": SOURCES,
        "ours": ours,
        "classes": classes,
        "published_classes": PUBLISHED_CLASSES,
        "comparable": None if classes is None else classes == PUBLISHED_CLASSES,
    }
