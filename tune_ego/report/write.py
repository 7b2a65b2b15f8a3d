"""Writing of reports: read an experiment, compute its numbers, draw the page, write both files."""

from __future__ import annotations

from typing import Any

from tune_ego import storage
from tune_ego.console import percent, say
from tune_ego.errors import UserError
from tune_ego.report import page
from tune_ego.report.accuracy import read_evaluation
from tune_ego.report.numbers import experiment_numbers
from tune_ego.report.published import reproduction_numbers
from tune_ego.results.checkpoint_files import MODEL_FILE
from tune_ego.results.experiment import Experiment
from tune_ego.results.reading import read_experiment

_HTML = ".html"


def write_report(
    root: str,
    out: str = "report.html",
    evaluation: str | None = None,
    checkpoint: str | None = None,
    data: str | None = None,
    reference: str | None = None,
) -> dict[str, Any]:
    """Write the page of one experiment, and its numbers beside the page; return the numbers.

    Args:
        root: Folder or URI of the experiment.
        out: Path or URI of the page, ending in `.html`. The numbers go to the same name with `.json`.
        evaluation: An `evaluation.json` or its run; see `read_evaluation`.
        checkpoint: Checkpoint or run whose attention is drawn; None: the evaluated checkpoint.
        data: Folder or URI of the shards; None: no attention is drawn.
        reference: Configuration that the others are compared with over their repeats; None: the best one.

    Raises:
        UserError: An input is missing or damaged, or `out` cannot be written.
    """
    numbers_out = _numbers_file(out)
    if checkpoint is not None and data is None:
        raise UserError("--checkpoint: attention is drawn on test clips; name their shards with --data")
    search = read_experiment(root)
    given = {"--evaluation": evaluation, "--checkpoint": checkpoint, "--data": data, "--reference": reference}
    options = [word for name, value in given.items() if value is not None for word in (name, value)]
    numbers = experiment_numbers(search, read_evaluation(search, evaluation), options, reference)
    cases, pictures = _attention(checkpoint or numbers["evaluation"].get("checkpoint"), data)
    numbers["attention_cases"] = cases
    _write_page(out, numbers_out, page.render(numbers, pictures), numbers)
    for trial in numbers["damaged"]:
        say(f"{trial['trial']}: damaged: {trial['reason']}")
    if numbers["answer"] is None:
        say(f"search {numbers['experiment']['name']} is {numbers['experiment']['state']}")
    else:
        accuracy = percent(numbers["answer"]["accuracy"])
        say(f"best configuration: {numbers['answer']['configuration']}, validation mean class accuracy {accuracy}")
    return numbers


def _attention(checkpoint: str | None, data: str | None) -> tuple[dict[str, Any], list[str]]:
    """Return the numbers of the attention cases and their images as data URIs; without shards, `why` and no images."""
    if data is None:
        return {"why": "add --data SHARDS, and --checkpoint RUN where no run was evaluated"}, []
    if checkpoint is None:
        raise UserError("--data: no run was evaluated, so no attention can be drawn; name a run with --checkpoint")
    from tune_ego.report.pictures import attention_cases  # late: imports torch, which a report without pictures spares

    # The run instead of its final weights: the run's config.yaml describes the model.
    return attention_cases(checkpoint.removesuffix(f"/{MODEL_FILE}"), data)


def write_comparison(roots: tuple[str, str], out: str = "report.html") -> dict[str, Any]:
    """Write the page that compares two experiments, and its numbers beside the page; return the numbers."""
    numbers_out = _numbers_file(out)
    pair = []
    for root in roots:
        search = read_experiment(root)
        pair.append(experiment_numbers(search, read_evaluation(search, None), []))
    numbers = {
        "experiments": pair,
        "best_values": _best_values(pair),
        "differences": _search_differences(pair),
        "not_comparable": _comparison_warnings(pair),
    }
    _write_page(out, numbers_out, page.render_comparison(numbers), numbers)
    return numbers


def write_reproduction(searches: list[Experiment], out: str) -> dict[str, Any]:
    """Write the page of published results beside those of these searches, and its numbers; return the numbers."""
    numbers_out = _numbers_file(out)
    numbers = reproduction_numbers(searches)
    _write_page(out, numbers_out, page.render_reproduction(numbers), numbers)
    return numbers


def _best_values(pair: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the best configurations' values of each parameter that either experiment searched.

    A value is `-` where the best configuration does not have the parameter.
    """
    best = [{row["key"]: row["value"] for row in (numbers["answer"] or {"values": []})["values"]} for numbers in pair]
    keys = list({**best[0], **best[1]})

    def text(numbers: dict[str, Any], values: dict[str, str], key: str) -> str:
        return values.get(key, "-" if key in numbers["experiment"]["keys"] else "not searched")

    return [{"key": key, "a": text(pair[0], best[0], key), "b": text(pair[1], best[1], key)} for key in keys]


def _search_differences(pair: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the settings, data and versions in which two experiments differ."""

    def facts(numbers: dict[str, Any]) -> dict[str, str]:
        experiment, reproduce = numbers["experiment"], numbers["reproduce"]
        overview = {
            key.replace("_", " "): str(experiment[key])
            for key in ("searcher", "scheduler", "samples", "repeats", "budget_iterations", "validation")
        }
        data = {"data": reproduce["data"], "data settings": str(reproduce["data_settings"])}
        return {**overview, **data, "searched parameters": ", ".join(experiment["keys"]), **reproduce["versions"]}

    a, b = map(facts, pair)
    return [{"what": name, "a": a[name], "b": b[name]} for name in a if a[name] != b[name]]


def _comparison_warnings(pair: list[dict[str, Any]]) -> list[str]:
    """Return the reasons why the accuracies of two experiments may not be comparable."""
    a, b = pair
    warnings = []
    if a["experiment"]["validation"] != b["experiment"]["validation"]:
        warnings.append("The two searches were validated on different clips: their accuracies cannot be compared.")
    if a["reproduce"]["data"] != b["reproduce"]["data"]:
        warnings.append("The shards lie in different places: compare the accuracies only if the data is the same.")
    if a["experiment"]["budget_iterations"] != b["experiment"]["budget_iterations"]:
        warnings.append("The budgets differ: trials of one search had more iterations than trials of the other.")
    return warnings


def _numbers_file(out: str) -> str:
    """Return the path of the JSON file beside a page; raises `UserError` where another file would be overwritten."""
    if not out.endswith(_HTML):
        raise UserError(f"--out {out}: the report is an HTML page; its name has to end with {_HTML}")
    numbers = out.removesuffix(_HTML) + ".json"
    if storage.exists(numbers) and not _is_report(numbers):
        raise UserError(
            f"--out {out}: the numbers would overwrite {numbers}, which no report wrote; choose another name"
        )
    return numbers


def _is_report(uri: str) -> bool:
    try:
        content = storage.read_json(uri)
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and not {"report", "experiments", "searches"}.isdisjoint(content)


def _write_page(out: str, numbers_out: str, text: str, numbers: dict[str, Any]) -> None:
    storage.write_json(storage.absolute(numbers_out), numbers)
    storage.write_text(storage.absolute(out), text)
    say(f"report: {out} ({len(text.encode()) / 1e6:.1f} MB); its numbers: {numbers_out}")
