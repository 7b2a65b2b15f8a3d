"""Charts of a report; each is drawn from the report's numbers alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter, PercentFormatter

from tune_ego.report.drawing import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    ORANGE,
    PAPER,
    RED,
    WIDTH,
    as_svg,
    log_labels,
    panels,
    shorten,
)
from tune_ego.results.experiment import METRIC

_STATE_STYLES = {
    "finished": (BLUE, 0.9, 1.1),
    "stopped": (MUTED, 0.3, 0.8),
    "failed": (RED, 0.8, 1.0),
    "running": (GREEN, 0.9, 1.1),
    "interrupted": (GREEN, 0.9, 1.1),
}
"""State of a trial -> colour, opacity and line width of its curve."""
_DEFAULT_STYLE = (GREEN, 0.9, 1.1)
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
"""Metric of a two-stream model -> how its value is made of the two streams' values."""
_PERCENT = PercentFormatter(1.0, decimals=0, symbol=" %")
_ABSENT, _FOOT = "-", -0.05
"""Text of a parameter that a trial does not have, and the height at which the trial's line crosses the axis."""
_LOW_HIGH = LinearSegmentedColormap.from_list("low_high", ["#4a90c2", "#9a9a9a", "#e69f00"])
"""Colours from worst to best, which colour-blind readers can distinguish on white and on black."""


@as_svg("curves", "Learning curves of all trials")
def learning_curves(numbers: dict[str, Any]) -> Figure | None:
    """Draw a panel for each logged metric over the iterations. Stopped trials are faded; the best trials are on top."""
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
            colour, opacity, width = (ORANGE, 1.0, 2.2) if best else _STATE_STYLES.get(trial["state"], _DEFAULT_STYLE)
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
        colour, opacity, width = _STATE_STYLES.get(state, _DEFAULT_STYLE)
        entries.append(Line2D([], [], color=colour, alpha=max(opacity, 0.6), linewidth=width, label=state))
    figure.legend(handles=entries, loc="outside upper center", ncols=len(entries))
    return figure


@as_svg("choices", "Validation accuracy by the value of each searched parameter")
def choices(numbers: dict[str, Any]) -> Figure | None:
    """Draw a panel for each searched parameter: a dot for each trial, and mean and standard deviation of each value."""
    parameters = numbers["choices"]["parameters"]
    if not parameters:
        return None
    columns = min(3, len(parameters))
    figure, axes = panels(len(parameters), columns, 2.5)
    trials = {trial["trial"]: trial for trial in numbers["trials"]}
    spreads = [value["mean"] + (value["spread"] or 0) for parameter in parameters for value in parameter["values"]]
    highest = max([numbers["answer"]["all_trials"]["best"] or 0, *spreads])
    for axis, parameter in zip(axes, parameters):
        match parameter["form"]:
            case "choice":
                _draw_choice(axis, parameter, trials)
            case "uniform" | "loguniform" | "randint":
                _draw_range(axis, parameter, trials)
            case _:
                raise ValueError(f"{parameter['key']}: unknown form of values {parameter['form']!r}")
        when = f"\nwhere {parameter['when']}" if parameter["when"] else ""
        axis.set_title(parameter["key"] + when)
        axis.yaxis.set_major_formatter(_PERCENT)
        axis.set_ylim(0, 1.08 * highest or 1)  # the same in all panels
        axis.set_ylabel("best val. mean class acc.")
    return figure


def _dot_area(trials: dict[str, Any]) -> int:
    """Return the area of a trial's dot, square points."""
    return 9 if len(trials) > 60 else 28


def _draw_choice(axis: Axes, parameter: dict[str, Any], trials: dict[str, Any]) -> None:
    """Draw a column of dots for each value of a choice."""
    for place, value in enumerate(parameter["values"]):
        heights = [trials[member]["accuracy"] for member in value["members"]]
        offsets = np.random.default_rng(place).uniform(-0.18, 0.18, len(heights))
        axis.scatter(place + offsets, heights, s=_dot_area(trials), color=BLUE, alpha=0.5, linewidths=0)
        axis.errorbar([place + 0.3], [value["mean"]], [value["spread"] or 0], fmt="D", ms=4.5, color=ORANGE, capsize=3)
    axis.set_xticks(range(len(parameter["values"])))
    names = [f"{shorten(value['value'], 14)}\n{value['trials']} trials" for value in parameter["values"]]
    axis.set_xticklabels(names, fontsize=8 if len(names) < 5 else 6.5)
    axis.set_xlim(-0.5, len(names) - 0.5 + 0.1)
    axis.grid(False, axis="x")


def _draw_range(axis: Axes, parameter: dict[str, Any], trials: dict[str, Any]) -> None:
    """Draw a dot for each trial over a numeric range, and the mean of each bin."""
    low, high = parameter["range"]
    axis.set_xlim(low - 0.04 * (high - low), high + 0.04 * (high - low))
    if parameter["form"] == "loguniform":
        axis.set_xscale("log")
        log_labels(axis.xaxis)
        axis.set_xlim(low * (low / high) ** 0.04, high * (high / low) ** 0.04)
        if high / low < 100:  # the axis would have two powers of ten or fewer as its only labels
            middle = float(np.sqrt(low * high))
            axis.set_xticks([low, middle, high], [f"{end:.2g}" for end in (low, middle, high)])
        axis.xaxis.set_minor_formatter(NullFormatter())
    for value in parameter["values"]:
        places = [trials[member]["numbers"][parameter["key"]] for member in value["members"]]
        heights = [trials[member]["accuracy"] for member in value["members"]]
        axis.scatter(places, heights, s=_dot_area(trials), color=BLUE, alpha=0.5, linewidths=0)
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


@as_svg("stopping", "Iterations of each trial, by state, and the rungs of the scheduler")
def stopping(numbers: dict[str, Any]) -> Figure | None:
    """Draw a bar for each trial, the longest first, and a line for each rung."""
    trials = sorted((t for t in numbers["trials"] if t["iterations"]), key=lambda t: -t["iterations"])
    if not trials:
        return None
    figure = Figure((WIDTH, min(5.0, 1.4 + 0.16 * len(trials))), layout="constrained")
    axis = figure.add_subplot()
    states = list(dict.fromkeys(trial["state"] for trial in trials))
    for state in states:
        places = [place for place, trial in enumerate(trials) if trial["state"] == state]
        colour, opacity, _ = _STATE_STYLES.get(state, _DEFAULT_STYLE)
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


@as_svg("parallel", "Parallel coordinates of the searched parameters and the accuracy")
def parallel(numbers: dict[str, Any]) -> Figure | None:
    """Draw a line for each validated trial through its values, coloured from worst (blue) to best (orange)."""
    trials = [trial for trial in reversed(numbers["trials"]) if trial["accuracy"] is not None]
    keys = numbers["parallel"]["keys"]
    if not trials or not keys:
        return None
    figure = Figure((WIDTH, 4.2), layout="constrained")
    axis = figure.add_subplot()
    forms: dict[str, str] = {}
    for parameter in sorted(numbers["choices"]["parameters"], key=lambda entry: str(entry["form"]) == "choice"):
        forms.setdefault(parameter["key"], parameter["form"])  # a range, where at least one branch has a range
    columns = [numbers["experiment"]["keys"].index(key) for key in keys]
    heights = []
    for place, (key, column) in enumerate(zip(keys, columns)):
        texts = [trial["values"][column] for trial in trials]
        numeric = [trial["numbers"].get(key) for trial in trials]
        heights.append(_draw_axis(axis, place, forms.get(key, "choice"), texts, numeric))
    accuracies = [trial["accuracy"] for trial in trials]
    low, high = min(accuracies), max(accuracies)
    ranks = [(accuracy - low) / ((high - low) or 1) for accuracy in accuracies]
    _draw_ticks(axis, len(keys), [0, 0.5, 1], [f"{100 * (low + part * (high - low)):.0f} %" for part in (0, 0.5, 1)])
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


def _draw_axis(axis: Axes, place: int, form: str, texts: list[str], numbers: list[float | None]) -> list[float]:
    """Draw the ticks of a parameter's axis; return the height at which each trial crosses the axis.

    Args:
        axis: Matplotlib axes to draw in.
        place: Position of the parameter's axis, counted from the left.
        form: Form of the parameter's values: choice, uniform, loguniform or randint.
        texts: Value of each trial as text; `_ABSENT` in a branch without the parameter.
        numbers: Value of each trial; None where the value is no number or absent.

    Returns:
        Heights in [0, 1]; `_FOOT` for trials without the parameter.
    """
    present = [number for number in numbers if number is not None]
    if form == "choice" or not present:
        values = dict(zip(texts, numbers))
        names = sorted(set(texts) - {_ABSENT}, key=lambda name: (values[name] is None, values[name] or 0, name))
        step = {name: (n / (len(names) - 1) if len(names) > 1 else 0.5) for n, name in enumerate(names)}
        _draw_ticks(axis, place, list(step.values()), [shorten(name, 16) for name in names])
        jitter = np.random.default_rng(place).uniform(-0.02, 0.02, len(texts))
        return [step[text] + float(off) if text in step else _FOOT for text, off in zip(texts, jitter)]
    match form:
        case "loguniform":
            logarithmic = min(present) > 0
        case "uniform" | "randint":
            logarithmic = False
        case unknown:
            raise ValueError(f"no axis for values of the form {unknown!r}")
    positions = [None if number is None else math.log10(number) if logarithmic else number for number in numbers]
    ends = [position for position in positions if position is not None]
    low, high = min(ends), max(ends)
    parts = (0, 0.5, 1)
    ticks = [low + part * (high - low) for part in parts]
    _draw_ticks(axis, place, list(parts), [f"{10**tick if logarithmic else tick:.2g}" for tick in ticks])
    width = (high - low) or 1
    return [_FOOT if position is None else (position - low) / width for position in positions]


def _draw_ticks(axis: Axes, place: int, heights: list[float], texts: list[str]) -> None:
    for height, text in zip(heights, texts):
        box = {"facecolor": PAPER, "edgecolor": "none", "alpha": 0.75, "pad": 0.8}
        axis.text(place + 0.03, height, text, fontsize=7.5, va="center", ha="left", bbox=box, zorder=5)


@as_svg("importance", "Importance of each searched parameter")
def importance(numbers: dict[str, Any]) -> Figure | None:
    """Draw a bar for each parameter, the most important one at the top."""
    entries = sorted(numbers["importance"]["entries"], key=lambda entry: entry["share"])
    if not entries:
        return None
    figure = Figure((WIDTH, 0.8 + 0.26 * len(entries)), layout="constrained")
    axis = figure.add_subplot()
    names = [entry["key"] + (f"  (where {entry['when']})" if entry["when"] else "") for entry in entries]
    axis.barh(range(len(entries)), [entry["share"] for entry in entries], color=BLUE, height=0.65)
    for place, entry in enumerate(entries):
        label = f"{100 * entry['share']:.1f} %"
        axis.annotate(label, (entry["share"], place), (4, 0), textcoords="offset points", va="center", color=INK)
    axis.set_yticks(range(len(names)), names)
    axis.xaxis.set_major_formatter(_PERCENT)
    axis.set_xlabel("share of the importance")
    axis.set_xlim(0, max(entry["share"] for entry in entries) * 1.12)
    axis.grid(False, axis="y")
    return figure


@as_svg("confusion", "Confusion matrix, classes by their number of test clips, each row divided by its sum")
def confusion(numbers: dict[str, Any]) -> Figure | None:
    """Draw the row-normalised confusion matrix [true, predicted]; classes without clips have no row."""
    evaluation = numbers["evaluation"]
    classes = evaluation.get("classes", [])
    rows = [place for place, entry in enumerate(classes) if entry["clips"]]
    if not rows:
        return None
    counts = np.array(evaluation["confusion"], float)[rows]
    shares = counts / counts.sum(axis=1, keepdims=True)
    figure = Figure((WIDTH, min(15.0, max(3.2, 0.125 * len(rows) + 1.6))), layout="constrained")
    axis = figure.add_subplot()
    image = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    many = len(rows) > 40
    shown = [classes[place] for place in rows]
    labels = [f"{shorten(entry['action'], 44)} ({entry['clips']}) #{entry['rank']}" for entry in shown]
    axis.set_yticks(range(len(rows)), labels, fontsize=6.6 if many else 8.5)
    every_rank = [entry["rank"] for entry in classes]
    ranks = [rank for rank in every_rank if not many or rank % 5 == 0 or rank == 1]
    axis.set_xticks([rank - 1 for rank in ranks], ranks)
    axis.set_xlabel("predicted class, by its # on the left")
    axis.set_ylabel("true class (clips) #")
    axis.grid(False)
    bar = figure.colorbar(image, ax=axis, shrink=0.4, pad=0.01)
    bar.set_label("share of the true class's clips")
    bar.ax.yaxis.set_major_formatter(_PERCENT)
    return figure


@as_svg("recall", "Recall of each class, classes by their number of test clips")
def recall(numbers: dict[str, Any]) -> Figure | None:
    """Draw the recall of the fused (or only) stream as bars, and that of the other streams as markers."""
    evaluation = numbers["evaluation"]
    classes = [entry for entry in evaluation.get("classes", []) if entry["clips"]]
    if not classes:
        return None
    main = evaluation["confusion_of"]
    figure = Figure((WIDTH, 3.0), layout="constrained")
    axis = figure.add_subplot()
    ranks = [entry["rank"] for entry in classes]
    axis.bar(ranks, [entry["recall"][main] for entry in classes], color=BLUE, alpha=0.55, width=0.8, label=main)
    others = [name for name in classes[0]["recall"] if name != main]
    for name, colour, marker in zip(others, (RED, INK), ("^", "_")):
        axis.scatter(
            ranks,
            [entry["recall"][name] for entry in classes],
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


@as_svg("distributions", "Distributions of the accuracies of the two experiments' trials")
def distributions(pair: list[dict[str, Any]]) -> Figure | None:
    """Draw, for both experiments, a histogram of the trials' accuracies and the share that reaches each accuracy."""
    accuracies = [
        [trial["accuracy"] for trial in numbers["trials"] if trial["accuracy"] is not None] for numbers in pair
    ]
    if not any(accuracies):
        return None
    figure = Figure((WIDTH, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    edges = np.linspace(0, max(max(values, default=0) for values in accuracies) * 1.02 or 1, 21)
    for values, colour, style, letter in zip(accuracies, (BLUE, ORANGE), ("-", "--"), "AB"):
        if values:
            left.hist(
                values, bins=edges.tolist(), color=colour, histtype="step", linewidth=1.8, linestyle=style, label=letter
            )
            right.step(
                sorted(values), 1 - np.arange(len(values)) / len(values), color=colour, linestyle=style, linewidth=1.8
            )
    left.set_ylabel("trials")
    right.set_ylabel("share of trials that reach the accuracy")
    right.yaxis.set_major_formatter(_PERCENT)
    for axis in (left, right):
        axis.set_xlabel("best validation mean class accuracy")
        axis.xaxis.set_major_formatter(_PERCENT)
    left.legend()
    return figure
