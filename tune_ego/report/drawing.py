"""SVG charts whose colours are CSS variables of the page, so that charts follow the page's light or dark theme."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from functools import wraps
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

# Placeholder colours: matplotlib writes them into the SVG, and `_adapt_tag` replaces them by CSS variables. The
# variables' hues are those of Okabe and Ito, which colour-blind readers can distinguish.
INK, LINE, MUTED, PAPER = "#010101", "#010102", "#010103", "#010104"
BLUE, ORANGE, RED, GREEN = "#010105", "#010106", "#010107", "#010108"
_VARIABLES = {
    INK: "ink",
    LINE: "line",
    MUTED: "muted",
    PAPER: "paper",
    BLUE: "blue",
    ORANGE: "orange",
    RED: "red",
    GREEN: "green",
}
WIDTH = 11.5
"""Width of a figure, inches. At the width of the page, 8 points are about 11 pixels."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # values of a search space may contain dollar signs
    "font.family": "sans-serif",
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.1,
    "image.interpolation": "nearest",
}


def as_svg(name: str, label: str) -> Callable[[Callable[..., Figure | None]], Callable[..., str]]:
    """Decorate a function that draws a figure: the decorated function returns the figure as SVG text.

    Where the function returns None, the decorated function returns an empty string.

    Args:
        name: Prefix of the ids in the SVG, unique on the page.
        label: Description of the chart for screen readers.
    """

    def decorate(draw: Callable[..., Figure | None]) -> Callable[..., str]:
        @wraps(draw)
        def wrapped(*args: Any, **kwargs: Any) -> str:
            with rc_context({**_STYLE, "svg.hashsalt": name}):
                figure = draw(*args, **kwargs)
                return "" if figure is None else _svg(figure, name, label)

        return wrapped

    return decorate


def _svg(figure: Figure, name: str, label: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _adapt_tag(tag[0], name), text)  # not the text between tags
    text = re.sub(r'<svg height="[^"]*"|<svg ', "<svg ", text, count=1)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def _adapt_tag(tag: str, name: str) -> str:
    """Return an SVG tag with the page's colour variables, and with ids that are unique among the page's figures."""
    for placeholder, variable in _VARIABLES.items():
        tag = tag.replace(placeholder, f"var(--{variable})")
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    return re.sub(r'href="#', f'href="#{name}-', tag)


def log_labels(axis: Axis) -> None:
    """Label a logarithmic axis with plain numbers: matplotlib's default labels need `text.parse_math`, which is off."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """Return a figure and its `count` panels, in rows of `columns`, each row `height` inches high."""
    rows = -(-count // columns)
    figure = Figure((WIDTH, rows * height), layout="constrained")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, axes


def shorten(text: str, most: int = 28) -> str:
    """Return a text cut to at most `most` characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
