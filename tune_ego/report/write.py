"""`report`: read, compute, draw, write."""

from __future__ import annotations

from typing import Any

from tune_ego import storage
from tune_ego.console import percent, say
from tune_ego.errors import UserError
from tune_ego.report import page, reading
from tune_ego.report.accuracy import read_evaluation
from tune_ego.report.numbers import experiment_numbers
from tune_ego.results.checkpoint_files import MODEL_FILE

_HTML = ".html"


def write_report(
    root: str,
    out: str = "report.html",
    evaluation: str | None = None,
    checkpoint: str | None = None,
    data: str | None = None,
) -> dict[str, Any]:
    """Write the page `out` (`.html`) and its numbers beside it (`.json`); returns the numbers.

    `evaluation` as in `read_evaluation`. With shards in `data` the attention of `checkpoint`, else of what was
    evaluated, is drawn. Raises `UserError` for what is not there or not what it should be.
    """
    numbers_out = _numbers_file(out)
    if checkpoint is not None and data is None:
        raise UserError("--checkpoint: the pictures are of clips; say with --data where the shards are")
    found = reading.read(root)
    given = {"--evaluation": evaluation, "--checkpoint": checkpoint, "--data": data}
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    numbers = experiment_numbers(found, read_evaluation(found.experiment, evaluation), options)
    cases, pictures = _cases(checkpoint or numbers["evaluation"].get("checkpoint"), data)
    numbers["attention_cases"] = cases
    _write(out, numbers_out, page.render(numbers, pictures), numbers)
    for one in numbers["damaged"]:
        say(f"{one['trial']}: damaged: {one['reason']}")
    if numbers["answer"] is None:
        say(f"{numbers['experiment']['name']} is {numbers['experiment']['state']}")
    else:
        say(f"best: {numbers['answer']['configuration']}, {percent(numbers['answer']['accuracy'])} in validation")
    return numbers


def _cases(checkpoint: str | None, data: str | None) -> tuple[dict[str, Any], list[str]]:
    """(numbers of the attention cases, their images as data URIs); without shards `why` there are none."""
    if data is None:
        return {"why": "they need the shards: --data SHARDS, and --checkpoint RUN where nothing was evaluated"}, []
    if checkpoint is None:
        raise UserError("--data: nothing was evaluated whose attention could be drawn; name a run with --checkpoint")
    from tune_ego.report.pictures import attention_cases  # torch

    # Of final weights their run, which tells what model they are of.
    return attention_cases(checkpoint.removesuffix(f"/{MODEL_FILE}"), data)


def write_comparison(roots: tuple[str, str], out: str = "report.html") -> dict[str, Any]:
    """Write the page that compares two experiments, and its numbers beside it; returns the numbers."""
    numbers_out = _numbers_file(out)
    pair = []
    for root in roots:
        found = reading.read(root)
        pair.append(experiment_numbers(found, read_evaluation(found.experiment, None), []))
    numbers = {
        "experiments": pair,
        "best_values": _best_values(pair),
        "differences": _differences(pair),
        "not_comparable": _not_comparable(pair),
    }
    _write(out, numbers_out, page.render_comparison(numbers), numbers)
    return numbers


def _best_values(pair: list[dict[str, Any]]) -> list[dict[str, str]]:
    """The best configurations' values of what one of the two searched; `-` where it has no such key."""
    found = [{row["key"]: row["value"] for row in (one["answer"] or {"values": []})["values"]} for one in pair]
    told = [
        {
            key: values.get(key, "-" if key in one["experiment"]["keys"] else "not searched")
            for key in {**found[0], **found[1]}
        }
        for one, values in zip(pair, found)
    ]
    return [{"key": key, "a": told[0][key], "b": told[1][key]} for key in told[0]]


def _differences(pair: list[dict[str, Any]]) -> list[dict[str, str]]:
    def facts(one: dict[str, Any]) -> dict[str, str]:
        overview = {
            key.replace("_", " "): str(one["experiment"][key])
            for key in ("searcher", "scheduler", "samples", "repeats", "budget_iterations", "validation")
        }
        data = {"data": one["reproduce"]["data"], "data settings": str(one["reproduce"]["data_settings"])}
        searched = ", ".join(one["experiment"]["keys"])
        return {**overview, **data, "searched parameters": searched, **one["reproduce"]["versions"]}

    a, b = map(facts, pair)
    return [{"what": what, "a": a[what], "b": b[what]} for what in a if a[what] != b[what]]


def _not_comparable(pair: list[dict[str, Any]]) -> list[str]:
    """Why one accuracy should not be held against the other."""
    a, b = pair
    found = []
    if a["experiment"]["validation"] != b["experiment"]["validation"]:
        found.append("The two were validated on other clips: their accuracies cannot be compared.")
    if a["reproduce"]["data"] != b["reproduce"]["data"]:
        found.append("The two have other data: compare their accuracies only if it is the same in another place.")
    if a["experiment"]["budget_iterations"] != b["experiment"]["budget_iterations"]:
        found.append("The two have other budgets: a trial of one had more time than one of the other.")
    return found


def _numbers_file(out: str) -> str:
    if not out.endswith(_HTML):
        raise UserError(f"--out {out}: the report is a page; let its name end with {_HTML}")
    numbers = out.removesuffix(_HTML) + ".json"
    if storage.exists(numbers) and not _is_a_reports(numbers):
        raise UserError(f"--out {out}: the numbers would go to {numbers}, which is there and no report's")
    return numbers


def _is_a_reports(uri: str) -> bool:
    try:
        content = storage.read_json(uri)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not {"report", "experiments"}.isdisjoint(content)


def _write(out: str, numbers_out: str, text: str, numbers: dict[str, Any]) -> None:
    storage.write_json(storage.absolute(numbers_out), numbers)
    storage.write_text(storage.absolute(out), text)
    say(f"{out}: {len(text.encode()) / 1e6:.1f} MB, and every number of it in {numbers_out}")
