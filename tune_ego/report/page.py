"""HTML pages of reports. A page is one file that loads nothing else.

Every number on a page is in `report.json`: `<span data-key="cost/gpu_hours">` holds the path of its number there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from tune_ego.report import charts
from tune_ego.report.repeats_chart import draw_repeats

SECTIONS = {
    "answer": "Best configuration",
    "choices": "Accuracy by parameter value",
    "repeats": "Configurations over their repeats",
    "curves": "Learning curves",
    "stopping": "Early stopping",
    "parallel": "Parallel coordinates",
    "importance": "Importance of the parameters",
    "published": "Comparison with published results",
    "evaluation": "Test results",
    "attention": "Attention and gaze",
    "cost": "Cost",
    "reproduce": "How to reproduce",
    "trials": "All trials",
}
"""Id -> heading of each section in the report of one experiment."""
COMPARED = {
    "answers": "Best configurations",
    "differences": "Differences in setup",
    "distributions": "Accuracies of all trials",
    "best": "The best trials",
    "parameters": "Accuracy by parameter value",
}
"""Id -> heading of each section in the comparison of two experiments."""
FORMATS: dict[str, Callable[[Any], str]] = {
    "percent": lambda value: f"{100 * value:.1f} %",
    "fine": lambda value: f"{100 * value:.2f} %",
    "points": lambda value: f"{100 * value:.1f}",
    "signed": lambda value: f"{100 * value:+.1f}",
    "count": lambda value: f"{value:,}",
    "plain": str,
    "hours": lambda value: f"{value:.2f} h" if value >= 1 else f"{60 * value:.1f} min",
    "score": lambda value: f"{value:.3f}",
    "speed": lambda value: f"{value:.1f}",
    "general": lambda value: f"{value:.4g}",
}
"""Name of a number format -> function from the number to its text."""


def render(numbers: dict[str, Any], pictures: list[str]) -> str:
    """Return the page of one experiment as HTML.

    Args:
        numbers: Content of `report.json`.
        pictures: Images of `attention_cases` in the order of the cases, as data URIs.
    """
    figures = {
        name: Markup(draw(numbers))
        for name, draw in {
            "curves": charts.learning_curves,
            "choices": charts.choices,
            "repeats": draw_repeats,
            "stopping": charts.stopping,
            "parallel": charts.parallel,
            "importance": charts.importance,
            "confusion": charts.confusion,
            "recall": charts.recall,
        }.items()
    }
    return _page("report.html.jinja", numbers, sections=SECTIONS, figures=figures, pictures=pictures)


def render_comparison(numbers: dict[str, Any]) -> str:
    """Return the page that compares two experiments as HTML; `numbers` is the result of `write_comparison`."""
    figures = {"distributions": Markup(charts.distributions(numbers["experiments"]))}
    return _page("comparison.html.jinja", numbers, sections=COMPARED, figures=figures)


def render_reproduction(numbers: dict[str, Any]) -> str:
    """Return the page of published results beside ours; `numbers` is the result of `reproduction_numbers`."""
    return _page("reproduction.html.jinja", numbers)


def _page(template: str, numbers: dict[str, Any], **variables: Any) -> str:
    """Fill a template; templates name the numbers `r`, and `n(path, format)` prints one of them."""

    def format_number(path: str, name: str) -> Markup:
        value = look_up(numbers, path)
        if value is None:
            return Markup("&ndash;")
        return Markup('<span data-key="{}" data-format="{}">{}</span>').format(path, name, FORMATS[name](value))

    return template_environment().get_template(template).render(r=numbers, n=format_number, **variables)


def template_environment() -> Environment:
    """Return the templates of all pages; `base.html.jinja` has the style that they share."""
    return Environment(
        loader=PackageLoader("tune_ego.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def look_up(numbers: Any, path: str) -> Any:
    """Return the value at a path like `trials/0/accuracy`."""
    return reduce(lambda node, part: node[int(part) if isinstance(node, list) else part], path.split("/"), numbers)
