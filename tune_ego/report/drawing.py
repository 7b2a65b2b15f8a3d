"""Figures that become part of the page: SVG whose colours are the page's, so they follow its light or dark theme."""

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

# Stand-ins that matplotlib writes and the page's variables replace. The hues are those of Okabe and Ito, which
# colour-blind people tell apart.
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
"""Inches of a figure; it is shown at the page's width, where 8 points are about 11 pixels."""
_STYLE: Any = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a search space's words may have dollars
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


def drawn(name: str, told: str) -> Callable[[Callable[..., Figure | None]], Callable[..., str]]:
    """Make a function that draws a figure return it as SVG for the page; `told` says to a screen reader what it is.

    No figure, no SVG: an empty string.
    """

    def decorate(draw: Callable[..., Figure | None]) -> Callable[..., str]:
        @wraps(draw)
        def wrapped(*args: Any, **kwargs: Any) -> str:
            with rc_context({**_STYLE, "svg.hashsalt": name}):
                figure = draw(*args, **kwargs)
                return "" if figure is None else _svg(figure, name, told)

        return wrapped

    return decorate


def _svg(figure: Figure, name: str, told: str) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<[^>]*>", lambda tag: _for_the_page(tag[0], name), text)  # what is between tags are labels
    text = re.sub(r'<svg height="[^"]*"|<svg ', "<svg ", text, count=1)
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    return text.replace("<svg ", f'<svg role="img" aria-label="{told}" ', 1)


def _for_the_page(tag: str, name: str) -> str:
    """A tag with the page's colours, and with names that are the figure's own: the page holds several."""
    for stand_in, variable in _VARIABLES.items():
        tag = tag.replace(stand_in, f"var(--{variable})")
    tag = re.sub(r'\bid="', f'id="{name}-', tag)
    tag = re.sub(r"url\(#", f"url(#{name}-", tag)
    return re.sub(r'href="#', f'href="#{name}-', tag)


def log_labels(axis: Axis) -> None:
    """Plain numbers for a logarithmic axis: matplotlib's own are mathematics, which is off here."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1, 0.4)))


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of `count` panels in rows of `columns`, `height` inches each."""
    rows = -(-count // columns)
    figure = Figure((WIDTH, rows * height), layout="constrained")
    axes = [figure.add_subplot(rows, columns, place + 1) for place in range(count)]
    return figure, axes


def short(text: str, most: int = 28) -> str:
    """A text cut to so many letters."""
    return text if len(text) <= most else text[: most - 1] + "…"
