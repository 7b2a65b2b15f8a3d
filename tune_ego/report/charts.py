"""The figures of a report, each from the numbers alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from tune_ego.report.drawing import BLUE, GREEN, INK, MUTED, ORANGE, PAPER, RED, WIDTH, drawn, log_labels, panels, short
from tune_ego.results.experiment import METRIC

_STATES = {
    "finished": (BLUE, 0.9, 1.1),
    "stopped": (MUTED, 0.3, 0.8),
    "failed": (RED, 0.8, 1.0),
    "running": (GREEN, 0.9, 1.1),
    "interrupted": (GREEN, 0.9, 1.1),
}
"""State -> colour, opacity, width of its curve."""
_UNITS = {
    "train_loss": "loss, nats",
    "val_loss": "loss, nats",
    "gaze_loss": "mean squared error",
    METRIC: "mean recall of the classes",
    "learning_rate": "learning rate",
}
_OF_STREAMS = {
    "train_loss": "sum over streams",
    "val_loss": "sum over streams",
    "gaze_loss": "sum over streams",
    "learning_rate": "lowest of the streams",
}
"""What stands for the two of them."""
_PERCENT = PercentFormatter(1.0, decimals=0, symbol=" %")
_ABSENT, _FOOT = "-", -0.05
"""The text of a parameter that a trial does not have, and where its line crosses the axis."""
_LOW_HIGH = LinearSegmentedColormap.from_list("low_high", ["#4a90c2", "#9a9a9a", "#e69f00"])
"""Told apart by colour-blind people, and seen on white and on black."""


@drawn("curves", "Learning curves of all trials")
def learning_curves(numbers: dict[str, Any]) -> Figure | None:
    """A panel for each logged series over the iterations; stopped trials are faded, the best one is on top."""
    curves = numbers["curves"]
    if not curves["trials"]:
        return None
    keys = list(curves["logged"])
    figure, axes = panels(len(keys), 2, 2.7)
    states: set[str] = set()
    for axis, key in zip(axes, keys):
        for trial in sorted(curves["trials"], key=lambda t: (t["trial"] in curves["best"], t["state"] != "stopped")):
            if key not in trial["series"]:
                continue
            best = trial["trial"] in curves["best"]
            colour, opacity, width = (ORANGE, 1.0, 2.2) if best else _STATES.get(trial["state"], (GREEN, 0.9, 1.1))
            states |= set() if best else {trial["state"]}
            x, y = trial["series"][key]
            axis.plot(x, y, color=colour, alpha=opacity, linewidth=width, marker="." if len(x) < 6 else "")
        where = f", {numbers['experiment']['validation']}" if key == METRIC else ""
        axis.set_title(curves["logged"][key] + where)
        axis.set_xlabel("iteration")
        of_streams = f", {_OF_STREAMS[key]}" if curves["streams"] > 1 and key in _OF_STREAMS else ""
        axis.set_ylabel(_UNITS[key] + of_streams)
        if key == METRIC:
            axis.yaxis.set_major_formatter(_PERCENT)
        if key == "learning_rate":
            axis.set_yscale("log")
            log_labels(axis.yaxis)
    entries = [Line2D([], [], color=ORANGE, linewidth=2.2, label="the best")]
    for state in sorted(states):
        colour, opacity, width = _STATES.get(state, (GREEN, 0.9, 1.1))
        entries.append(Line2D([], [], color=colour, alpha=max(opacity, 0.6), linewidth=width, label=state))
    figure.legend(handles=entries, loc="outside upper center", ncols=len(entries))
    return figure


@drawn("choices", "Validation accuracy by the value of each searched parameter")
def choices(numbers: dict[str, Any]) -> Figure | None:
    """A panel for each searched parameter: a dot for each trial, and mean and spread of each value."""
    parameters = numbers["choices"]["parameters"]
    if not parameters:
        return None
    columns = min(3, len(parameters))
    figure, axes = panels(len(parameters), columns, 2.5)
    trials = {trial["trial"]: trial for trial in numbers["trials"]}
    spreads = [value["mean"] + (value["spread"] or 0) for parameter in parameters for value in parameter["values"]]
    highest = max([numbers["answer"]["all_trials"]["best"] or 0, *spreads])
    for axis, parameter in zip(axes, parameters):
        if parameter["form"] == "choice":
            _named_values(axis, parameter, trials)
        else:
            _range_of_values(axis, parameter, trials)
        when = f"\nwhere {parameter['when']}" if parameter["when"] else ""
        axis.set_title(parameter["key"] + when)
        axis.yaxis.set_major_formatter(_PERCENT)
        axis.set_ylim(0, 1.08 * highest or 1)  # the same in all
        axis.set_ylabel("best val. mean class acc.")
    return figure


def _dot(trials: dict[str, Any]) -> int:
    """Area of a trial's dot, square points."""
    return 9 if len(trials) > 60 else 28


def _named_values(axis: Axes, parameter: dict[str, Any], trials: dict[str, Any]) -> None:
    for place, value in enumerate(parameter["values"]):
        heights = [trials[member]["accuracy"] for member in value["members"]]
        offsets = np.random.default_rng(place).uniform(-0.18, 0.18, len(heights))
        axis.scatter(place + offsets, heights, s=_dot(trials), color=BLUE, alpha=0.5, linewidths=0)
        axis.errorbar([place + 0.3], [value["mean"]], [value["spread"] or 0], fmt="D", ms=4.5, color=ORANGE, capsize=3)
    axis.set_xticks(range(len(parameter["values"])))
    names = [f"{short(value['value'], 14)}\n{value['trials']} trials" for value in parameter["values"]]
    axis.set_xticklabels(names, fontsize=8 if len(names) < 5 else 6.5)
    axis.set_xlim(-0.5, len(names) - 0.5 + 0.1)
    axis.grid(False, axis="x")


def _range_of_values(axis: Axes, parameter: dict[str, Any], trials: dict[str, Any]) -> None:
    low, high = parameter["range"]
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    if parameter["form"] == "loguniform":
        axis.set_xscale("log")
        log_labels(axis.xaxis)
        axis.set_xlim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)
        if high / low < 100:  # two powers of ten or fewer would be the only numbers
            middle = float(np.sqrt(low * high))
            axis.set_xticks([low, middle, high], [f"{end:.2g}" for end in (low, middle, high)])
        axis.xaxis.set_minor_formatter(NullFormatter())
    for value in parameter["values"]:
        places = [trials[member]["numbers"][parameter["key"]] for member in value["members"]]
        heights = [trials[member]["accuracy"] for member in value["members"]]
        axis.scatter(places, heights, s=_dot(trials), color=BLUE, alpha=0.5, linewidths=0)
        axis.plot([min(places), max(places)], [value["mean"]] * 2, color=ORANGE, linewidth=2)
        axis.errorbar(
            [float(np.median(places))],
            [value["mean"]],
            [value["spread"] or 0],
            fmt="D",
            ms=4.5,
            color=ORANGE,
            capsize=3,
        )
    axis.set_xlabel(f"{parameter['key']}{', log scale' if parameter['form'] == 'loguniform' else ''}")


@drawn("stopping", "How many iterations each trial ran, and where it was stopped")
def stopping(numbers: dict[str, Any]) -> Figure | None:
    """A bar for each trial, the longest first, and the rungs."""
    trials = sorted((t for t in numbers["trials"] if t["iterations"]), key=lambda t: -t["iterations"])
    if not trials:
        return None
    figure = Figure((WIDTH, min(5.0, 1.4 + 0.16 * len(trials))), layout="constrained")
    axis = figure.add_subplot()
    states = list(dict.fromkeys(trial["state"] for trial in trials))
    for state in states:
        places = [place for place, trial in enumerate(trials) if trial["state"] == state]
        colour, opacity, _ = _STATES.get(state, (GREEN, 0.9, 1.1))
        lengths = [trials[place]["iterations"] for place in places]
        axis.barh(places, lengths, height=0.8, color=colour, alpha=max(opacity, 0.55), label=state, linewidth=0)
    for rung in numbers["stopping"]["rungs"]:
        axis.axvline(rung["iterations"], color=ORANGE, linewidth=1.4, linestyle="--")
    handles, labels = axis.get_legend_handles_labels()
    if numbers["stopping"]["rungs"]:
        handles.append(Line2D([], [], color=ORANGE, linestyle="--"))
        labels.append("rung")
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    axis.set_ylim(len(trials) - 0.5, -0.5)
    axis.set_xlabel("iterations")
    axis.set_ylabel("trials, the longest first")
    if len(trials) <= 30:
        axis.set_yticks(range(len(trials)), [trial["trial"] for trial in trials], fontsize=7.5)
    axis.grid(False, axis="y")
    return figure


@drawn("parallel", "Parallel coordinates of the searched parameters and the accuracy")
def parallel(numbers: dict[str, Any]) -> Figure | None:
    """A line for each validated trial through its values; orange ones are the best."""
    trials = [trial for trial in reversed(numbers["trials"]) if trial["accuracy"] is not None]
    keys = numbers["parallel"]["keys"]
    if not trials or not keys:
        return None
    figure = Figure((WIDTH, 4.2), layout="constrained")
    axis = figure.add_subplot()
    forms: dict[str, str] = {}
    for parameter in sorted(numbers["choices"]["parameters"], key=lambda one: str(one["form"]) == "choice"):
        forms.setdefault(parameter["key"], parameter["form"])  # a range, where one branch at least has one
    columns = [numbers["experiment"]["keys"].index(key) for key in keys]
    heights = []
    for place, (key, column) in enumerate(zip(keys, columns)):
        texts = [trial["values"][column] for trial in trials]
        known = [trial["numbers"].get(key) for trial in trials]
        heights.append(_heights(axis, place, forms.get(key, "choice"), texts, known))
    accuracies = [trial["accuracy"] for trial in trials]
    low, high = min(accuracies), max(accuracies)
    ranks = [(accuracy - low) / ((high - low) or 1) for accuracy in accuracies]
    _ticks(axis, len(keys), [0, 0.5, 1], [f"{100 * (low + part * (high - low)):.0f} %" for part in (0, 0.5, 1)])
    places = range(len(keys) + 1)
    faint = 0.25 if len(trials) > 60 else 0.6
    for number, rank in enumerate(ranks):
        line = [*(column[number] for column in heights), rank]
        axis.plot(
            places, line, color=_LOW_HIGH(rank), alpha=faint + (0.95 - faint) * rank**2, linewidth=0.9 + 1.2 * rank**2
        )
    for place in places:
        axis.axvline(place, color=MUTED, linewidth=0.8)
    names = [key.replace(".", ".\n", 1) for key in keys]
    axis.set_xticks(places, [*names, "best val. mean\nclass accuracy"], fontsize=8, fontweight="bold")
    axis.tick_params(axis="both", length=0)
    axis.set_yticks([])
    axis.set_ylim(-0.06, 1.06)
    axis.set_xlim(-0.3, len(keys) + 0.5)
    axis.grid(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(False)
    return figure


def _heights(axis: Axes, place: int, form: str, texts: list[str], numbers: list[float | None]) -> list[float]:
    """Where each trial crosses the axis of a parameter, 0 to 1; draws the axis' ticks.

    Trials of a branch without the parameter cross it at the foot.
    """
    known = [number for number in numbers if number is not None]
    if form == "choice" or not known:
        values = dict(zip(texts, numbers))
        names = sorted(set(texts) - {_ABSENT}, key=lambda name: (values[name] is None, values[name] or 0, name))
        step = {name: (n / (len(names) - 1) if len(names) > 1 else 0.5) for n, name in enumerate(names)}
        _ticks(axis, place, list(step.values()), [short(name, 16) for name in names])
        jitter = np.random.default_rng(place).uniform(-0.02, 0.02, len(texts))
        return [step[text] + float(off) if text in step else _FOOT for text, off in zip(texts, jitter)]
    scale = np.log10 if form == "loguniform" and min(known) > 0 else np.asarray
    low, high = float(scale(min(known))), float(scale(max(known)))
    parts = (0, 0.5, 1)
    ends = [low + part * (high - low) for part in parts]
    _ticks(axis, place, list(parts), [f"{10**v if scale is np.log10 else v:.2g}" for v in ends])
    width = (high - low) or 1
    return [_FOOT if number is None else (float(scale(number)) - low) / width for number in numbers]


def _ticks(axis: Axes, place: int, heights: list[float], texts: list[str]) -> None:
    for height, text in zip(heights, texts):
        box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        axis.text(place + 0.03, height, text, fontsize=7.5, va="center", ha="left", bbox=box, zorder=5)


@drawn("importance", "Importance of each searched parameter")
def importance(numbers: dict[str, Any]) -> Figure | None:
    entries = sorted(numbers["importance"]["entries"], key=lambda entry: entry["share"])
    if not entries:
        return None
    figure = Figure((WIDTH, 0.8 + 0.26 * len(entries)), layout="constrained")
    axis = figure.add_subplot()
    names = [entry["key"] + (f"  (where {entry['when']})" if entry["when"] else "") for entry in entries]
    axis.barh(range(len(entries)), [entry["share"] for entry in entries], color=BLUE, height=0.65)
    for place, entry in enumerate(entries):
        told = f"{100 * entry['share']:.1f} %"
        axis.annotate(told, (entry["share"], place), (4, 0), textcoords="offset points", va="center", color=INK)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.set_major_formatter(_PERCENT)
    axis.set_xlabel("share of the importance")
    axis.set_xlim(0, max(entry["share"] for entry in entries) * 1.12)
    axis.grid(False, axis="y")
    return figure


@drawn("confusion", "Confusion matrix, classes by their number of test clips, each row divided by its sum")
def confusion(numbers: dict[str, Any]) -> Figure | None:
    """Row-normalised, on a white sheet in both themes; the classes without clips are left out of the rows."""
    evaluation = numbers["evaluation"]
    classes = evaluation.get("classes", [])
    rows = [place for place, one in enumerate(classes) if one["clips"]]
    if not rows:
        return None
    counts = np.array(evaluation["confusion"], float)[rows]
    shares = counts / counts.sum(axis=1, keepdims=True)
    figure = Figure((WIDTH, min(15.0, max(3.2, 0.125 * len(rows) + 1.6))), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    many = len(rows) > 40
    shown = [classes[place] for place in rows]
    labels = [f"{short(one['action'], 44)} ({one['clips']}) #{one['rank']}" for one in shown]
    axis.set_yticks(range(len(rows)), labels, fontsize=6.6 if many else 8.5)
    ranks = [one["rank"] for one in classes if not many or one["rank"] % 5 == 0 or one["rank"] == 1]
    axis.set_xticks([rank - 1 for rank in ranks], ranks)
    axis.set_xlabel("predicted class, by its # on the left")
    axis.set_ylabel("true class (clips) #")
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.4, pad=0.01)
    bar.set_label("share of the true class's clips")
    bar.ax.yaxis.set_major_formatter(_PERCENT)
    return figure


@drawn("recall", "Recall of each class, classes by their number of test clips")
def recall(numbers: dict[str, Any]) -> Figure | None:
    """Bars of the fused (or only) stream's recall; the other streams as dots."""
    evaluation = numbers["evaluation"]
    classes = [one for one in evaluation.get("classes", []) if one["clips"]]
    if not classes:
        return None
    main = evaluation["confusion_of"]
    figure = Figure((WIDTH, 3.0), layout="constrained")
    axis = figure.add_subplot()
    ranks = [one["rank"] for one in classes]
    axis.bar(ranks, [one["recall"][main] for one in classes], color=BLUE, alpha=0.55, width=0.8, label=main)
    others = [name for name in classes[0]["recall"] if name != main]
    for name, colour, marker in zip(others, (RED, INK), ("^", "_")):
        axis.scatter(
            ranks,
            [one["recall"][name] for one in classes],
            s=14 if len(classes) > 40 else 45,
            color=colour,
            marker=marker,
            label=name,
        )
    axis.set_xlabel("class, by its number in the confusion matrix: most test clips on the left")
    axis.set_ylabel("recall")
    axis.yaxis.set_major_formatter(_PERCENT)
    axis.set_xlim(0.3, ranks[-1] + 0.7)
    axis.set_ylim(0, 1.02)
    axis.grid(False, axis="x")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


@drawn("distributions", "How the accuracies of the two experiments' trials are distributed")
def distributions(pair: list[dict[str, Any]]) -> Figure | None:
    """The share of each experiment's validated trials that reach at least an accuracy."""
    seen = [[trial["accuracy"] for trial in one["trials"] if trial["accuracy"] is not None] for one in pair]
    if not any(seen):
        return None
    figure = Figure((WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, max(max(values, default=0) for values in seen) * 1.02 or 1, 21)
    for values, colour, style, letter in zip(seen, (BLUE, ORANGE), ("-", "--"), "AB"):
        if values:
            left.hist(
                values, bins=edges.tolist(), color=colour, histtype="step", linewidth=1.8, linestyle=style, label=letter
            )
            right.step(
                sorted(values), 1 - np.arange(len(values)) / len(values), color=colour, linestyle=style, linewidth=1.8
            )
    left.set_ylabel("trials")
    right.set_ylabel("share of trials that reach it")
    right.yaxis.set_major_formatter(_PERCENT)
    for axis in (left, right):
        axis.set_xlabel("best validation mean class accuracy")
        axis.xaxis.set_major_formatter(_PERCENT)
    left.legend()
    return figure
