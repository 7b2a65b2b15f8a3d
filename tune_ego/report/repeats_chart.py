"""Chart of configurations with intervals over their repeats. Apart from `charts.py`, which is long."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from tune_ego.report.drawing import BLUE, MUTED, ORANGE, WIDTH, as_svg, shorten

_MOST_ROWS = 40


@as_svg("repeats", "Accuracy of each configuration with its 95 % interval, and its difference from one of them")
def draw_repeats(numbers: dict[str, Any]) -> Figure | None:
    """Draw a line for each configuration, best first: means with intervals, and the paired difference from one."""
    rows = numbers["repeats"]["rows"][:_MOST_ROWS]
    if not rows:
        return None
    figure = Figure((WIDTH, 1.1 + 0.3 * len(rows)), layout="constrained")
    accuracies, differences = figure.subplots(1, 2, sharey=True)
    places = [len(rows) - number for number in range(len(rows))]
    for key, label, colour, shift in (("last", "last validation", BLUE, 0.12), ("test", "test", ORANGE, -0.12)):
        _draw_intervals(accuracies, [row[key] for row in rows], [place + shift for place in places], label, colour)
    _draw_intervals(differences, [row["difference"] for row in rows], [p + 0.12 for p in places], "", BLUE)
    _draw_intervals(differences, [row["test_difference"] for row in rows], [p - 0.12 for p in places], "", ORANGE)
    differences.axvline(0, color=MUTED, linewidth=0.8)
    labels = [row["label"] for row in rows]
    labelled = all(labels) and len(set(labels)) == len(rows)
    texts = labels if labelled else [", ".join(row["values"]) for row in rows]
    names = [f"{row['configuration']}: {shorten(text, 40)}" for row, text in zip(rows, texts)]
    accuracies.set_yticks(places, names)
    accuracies.set_ylim(0.5, len(rows) + 0.5)
    accuracies.set_xlabel("mean class accuracy, mean and 95 % interval")
    reference = numbers["repeats"]["reference"]
    differences.set_xlabel(f"paired difference from {reference}, mean and 95 % interval")
    for axis in (accuracies, differences):
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.grid(False, axis="y")
    if len(accuracies.get_legend_handles_labels()[1]) > 1:
        figure.legend(loc="outside upper center", ncols=2)
    return figure


def _draw_intervals(
    axis: Axes, summaries: list[dict[str, Any] | None], places: list[float], label: str, colour: str
) -> None:
    """Draw means as dots and intervals as lines; a single value has no line."""
    drawn = [(summary, place) for summary, place in zip(summaries, places) if summary is not None]
    for summary, place in drawn:
        if summary["low"] is not None:
            axis.plot([summary["low"], summary["high"]], [place, place], color=colour, linewidth=1.4)
    if drawn:
        means = [summary["mean"] for summary, _ in drawn]
        axis.plot(means, [place for _, place in drawn], "o", color=colour, markersize=4, label=label or None)
