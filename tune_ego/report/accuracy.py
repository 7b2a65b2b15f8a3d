"""Test accuracies of a report: `evaluation.json`, with its classes in descending order of test clips."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.config_io import config_keys, load_config
from tune_ego.errors import UserError
from tune_ego.report.numbers import raw_value
from tune_ego.results import experiment
from tune_ego.results.checkpoint_files import run_of
from tune_ego.results.experiment import Experiment

_MOST_CONFUSED = 20
"""Most pairs of confused classes that a report lists."""
_STREAMS = ("rgb", "flow", "fused")
_MODEL_PARTS = ("data.split", "streams", "model.", "init_from.")
"""Prefixes of the keys that have to be equal for two runs to be the same model, searched or not."""
_Count = Annotated[int, Field(ge=0)]


class _EvaluationPart(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Class(_EvaluationPart):
    action: str
    clips: _Count


class _StreamResult(_EvaluationPart):
    micro_accuracy: float
    mean_class_accuracy: float
    verb_accuracy: float
    noun_accuracy: float
    recall: list[float | None]
    confusion: list[list[_Count]]


class _Attention(_EvaluationPart):
    auc_judd: float
    auc: float
    nss: float
    f1: float
    precision: float
    recall: float
    frames: int


class _Evaluation(_EvaluationPart):
    """Schema of the part of `evaluation.json` that a report reads."""

    split: int
    trained_on_split: int
    clips: _Count
    clips_trained_on: _Count
    chance: float
    iteration: int
    checkpoint: str = ""
    fusion_weight: float | None = None
    rgb: _StreamResult | None = None
    flow: _StreamResult | None = None
    fused: _StreamResult | None = None
    classes: list[_Class]
    attention: dict[str, _Attention | None]

    @model_validator(mode="after")
    def _check_sizes(self) -> _Evaluation:
        clips = [entry.clips for entry in self.classes]
        streams = {name: stream for name in _STREAMS if (stream := getattr(self, name)) is not None}
        if not streams:
            raise ValueError("streams missing")
        for name, stream in streams.items():
            rows = stream.confusion
            if [sum(row) for row in rows] != clips or any(len(row) != len(clips) for row in rows):
                raise ValueError(f"{name}: the confusion matrix does not match the classes and their clips")
            if [recall is not None for recall in stream.recall] != [count > 0 for count in clips]:
                raise ValueError(f"{name}: the recall does not match the classes")
        return self


class _Run(NamedTuple):
    """Run whose checkpoint was evaluated."""

    uri: str
    config: Config
    data: str | None
    """Folder or URI of the shards for training; None where `run.json` has none."""


def read_evaluation(search: Experiment, given: str | None) -> dict[str, Any]:
    """Return the numbers of the evaluation that a report shows.

    Args:
        search: The experiment.
        given: An `evaluation.json`, or its run, of any configuration. None: the evaluation of the only run in the
            search's parent folder that has the best configuration (`export` and `train` make such a run).

    Returns:
        The result of `evaluation_numbers` and facts about the run. `differs` lists the keys in which the run differs
        from the best configuration; None where the run's configuration cannot be read. Without an evaluation the only
        key is `why`, the reason.

    Raises:
        UserError: `given` does not exist or was not written by `evaluate`.
    """
    uri, why = (_evaluation_file(given), "") if given is not None else _find_evaluation(search)
    if not uri:
        return {"why": why}
    try:
        numbers = evaluation_numbers(uri)
    except UserError as error:
        if given is not None:
            raise
        return {"why": str(error)}
    run = _open_run(uri.rpartition("/")[0]) or _open_run(run_of(numbers["checkpoint"]))
    best = _best_config(search)
    return {
        **numbers,
        "run": run.uri if run else None,
        "run_data": run.data if run else None,
        "run_fusion_weight": run.config.fusion_weight if run else None,
        "differs": _config_differences(run, search, best) if run and best else [] if best is None else None,
    }


def _evaluation_file(given: str) -> str:
    """Return the URI of the `evaluation.json` that `--evaluation` names."""
    uri = storage.absolute(given)
    uri = uri if storage.is_file(uri) else storage.join(uri, experiment.EVALUATION_FILE)
    if not storage.is_file(uri):
        raise UserError(f"{given}: neither an {experiment.EVALUATION_FILE} nor a run that has one")
    return uri


def _find_evaluation(search: Experiment) -> tuple[str, str]:
    """Find the evaluated run of the best configuration in the search's parent folder.

    Returns:
        URI of the run's `evaluation.json`, or an empty string, and the reason where the URI is empty.
    """
    best = _best_config(search)
    if best is None:
        return "", "no trial has been validated yet, so there is nothing to evaluate"
    folder = search.root.rpartition("/")[0]
    neighbours = [run for name in storage.list_names(folder) if (run := storage.join(folder, name)) != search.root]
    runs = [_open_run(run) for run in neighbours if storage.is_file(storage.join(run, experiment.EVALUATION_FILE))]
    matching = [run.uri for run in runs if run and not _config_differences(run, search, best)]
    if len(matching) == 1:
        return storage.join(matching[0], experiment.EVALUATION_FILE), ""
    if matching:
        return "", f"{len(matching)} runs beside the search have the best configuration; choose one with --evaluation"
    return "", "no evaluated run of the best configuration lies beside the search; choose a run with --evaluation"


def _best_config(search: Experiment) -> Config | None:
    try:
        return search.best.config
    except UserError:  # nothing has been validated yet
        return None


def _open_run(uri: str) -> _Run | None:
    """Read the run in a folder; None where the folder has no readable configuration."""
    config_uri = storage.join(uri, experiment.CONFIG_FILE)
    if not storage.is_file(config_uri):
        return None
    try:
        config = load_config(config_uri)
    except UserError:
        return None
    record = experiment.read_run_record(uri)
    return _Run(uri, config, record["data"] if record is not None else None)


def _config_differences(run: _Run, search: Experiment, best: Config) -> list[str]:
    """Return the keys in which a run differs from the best configuration.

    Compared are the searched keys, except the seed, the keys of `_MODEL_PARTS`, and the data set. Other keys, such as
    `train.iterations`, may differ in a final run.
    """
    keys = [key for key in search.space.searched_keys if key != "seed"]
    keys += [key for key in config_keys() if key.startswith(_MODEL_PARTS) and key not in keys]
    differing = [key for key in keys if raw_value(run.config, key) != raw_value(best, key)]
    return differing + (["data"] if run.data not in (None, search.spec["data"]) else [])


def evaluation_numbers(uri: str) -> dict[str, Any]:
    """Read an `evaluation.json`; return accuracies, classes and confusion matrix in descending order of test clips.

    `confusion` holds counts [true class, predicted class] of the last stream among rgb, flow and fused.

    Raises:
        UserError: The file was not written by `evaluate`.
    """
    content = storage.read_json(uri)
    try:
        _Evaluation.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        reason = f"{place}: {message}" if place else message
        raise UserError(f"{uri}: not written by `tune-ego evaluate`: {reason}") from error
    names = [name for name in _STREAMS if content.get(name) is not None]
    classes = content["classes"]
    order = sorted(range(len(classes)), key=lambda index: (-classes[index]["clips"], classes[index]["action"]))
    counts = content[names[-1]]["confusion"]
    measures = ("micro_accuracy", "mean_class_accuracy", "verb_accuracy", "noun_accuracy")
    return {
        "why": "",
        "file": uri,
        "checkpoint": content.get("checkpoint", ""),
        "fusion_weight": content.get("fusion_weight"),
        **{key: content[key] for key in ("split", "clips", "iteration", "chance", "clips_trained_on")},
        "trained_on_split": content["trained_on_split"],
        "streams": [{"stream": name, **{key: content[name].get(key) for key in measures}} for name in names],
        "confusion_of": names[-1],
        "confusion": [[counts[true][predicted] for predicted in order] for true in order],
        "classes": [
            {
                "rank": rank,
                **classes[index],
                "recall": {name: content[name]["recall"][index] for name in names},
            }
            for rank, index in enumerate(order, start=1)
        ],
        "confused": _confused(counts, classes),
        "attention": [{"name": name, **scores} for name, scores in content["attention"].items() if scores is not None],
    }


def _confused(counts: list[list[int]], classes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the pairs of true and predicted class with the most clips, without the diagonal."""
    pairs = [
        {
            "true": classes[true]["action"],
            "predicted": classes[predicted]["action"],
            "clips": count,
            "share": count / sum(row),
        }
        for true, row in enumerate(counts)
        for predicted, count in enumerate(row)
        if count and true != predicted
    ]
    return sorted(pairs, key=lambda pair: (-pair["clips"], -pair["share"], pair["true"]))[:_MOST_CONFUSED]
