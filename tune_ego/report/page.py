"""The page: one HTML file that needs nothing else. Every number in it comes from the report's numbers by its place.

A number stands in `<span data-key="cost/gpu_hours">`, the way to it in `report.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tune_ego.report import charts

SECTIONS = {
    "answer": "The answer",
    "choices": "What each choice was worth",
    "curves": "Learning curves",
    "stopping": "Stopped early",
    "parallel": "Parallel coordinates",
    "importance": "Importance of the parameters",
    "published": "Beside the published results",
    "evaluation": "Test",
    "attention": "Attention and gaze",
    "cost": "Cost",
    "reproduce": "How to reproduce",
    "trials": "All trials",
}
"""Id -> heading of what every report of one experiment has."""
COMPARED = {
    "answers": "The answers side by side",
    "differences": "What differs",
    "distributions": "Accuracies of all trials",
    "best": "The best trials",
    "parameters": "What each choice was worth",
}
FORMATS: dict[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{100 * value:.1f} %",
    "fine": lambda value: f"{100 * value:.2f} %",
    "points": lambda value: f"{100 * value:.1f}",
    "count": lambda value: f"{value:,}",
    "plain": str,
    "hours": lambda value: f"{value:.2f} h" if value >= 1 else f"{60 * value:.1f} min",
    "score": lambda value: f"{value:.3f}",
    "speed": lambda value: f"{value:.1f}",
    "general": lambda value: f"{value:.4g}",
}


def render(numbers: dict[str, Any], pictures: list[str]) -> str:
    """The page of one experiment; `pictures` are the images of `attention_cases`, in their order, as data URIs."""
    figures = {
        name: Markup(draw(numbers))
        for name, draw in {
            "curves": charts.learning_curves,
            "choices": charts.choices,
            "stopping": charts.stopping,
            "parallel": charts.parallel,
            "importance": charts.importance,
            "confusion": charts.confusion,
            "recall": charts.recall,
        }.items()
    }
    return _page("report.html.jinja", numbers, sections=SECTIONS, figures=figures, pictures=pictures)


def render_comparison(numbers: dict[str, Any]) -> str:
    """The page of two experiments; `numbers` are `{"experiments": [of one, of the other], "differences": ...}`."""
    figures = {"distributions": Markup(charts.distributions(numbers["experiments"]))}
    return _page("comparison.html.jinja", numbers, sections=COMPARED, figures=figures)


def _page(template: str, numbers: dict[str, Any], **more: Any) -> str:
    environment = Environment(
        loader=PackageLoader("tune_ego.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )

    def number(key: str, kind: str) -> Markup:
        value = look_up(numbers, key)
        if value is None:
            return Markup("&ndash;")
        return Markup('<span data-key="{}" data-format="{}">{}</span>').format(key, kind, FORMATS[kind](value))

    return environment.get_template(template).render(r=numbers, n=number, **more)


def look_up(numbers: Any, key: str) -> Any:
    """The value at a place like `trials/0/accuracy`."""
    return reduce(lambda node, part: node[int(part) if isinstance(node, list) else part], key.split("/"), numbers)
