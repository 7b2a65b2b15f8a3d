"""What `evaluation.json` says, in the order in which people can read it: classes by their number of clips."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tune_ego import storage
from tune_ego.config import Config, config_keys, load_config
from tune_ego.errors import UserError
from tune_ego.report.numbers import raw_value
from tune_ego.results import experiment
from tune_ego.results.checkpoint_files import run_of
from tune_ego.results.experiment import Experiment

_PAIRS = 20
_STREAMS = ("rgb", "flow", "fused")
_MODEL_PARTS = ("data.split", "streams", "model.", "init_from.")
"""Beginnings of the keys that make another model, whatever a search searches."""
_Count = Annotated[int, Field(ge=0)]


class _Node(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Class(_Node):
    action: str
    clips: _Count


class _Stream(_Node):
    micro_accuracy: float
    mean_class_accuracy: float
    verb_accuracy: float
    noun_accuracy: float
    recall: list[float | None]
    confusion: list[list[_Count]]


class _Attention(_Node):
    auc_judd: float
    auc: float
    nss: float
    f1: float
    precision: float
    recall: float
    frames: int


class _Evaluation(_Node):
    """What is read of `evaluation.json`."""

    split: int
    trained_on_split: int
    clips: _Count
    clips_trained_on: _Count
    chance: float
    iteration: int
    checkpoint: str = ""
    fusion_weight: float | None = None
    rgb: _Stream | None = None
    flow: _Stream | None = None
    fused: _Stream | None = None
    classes: list[_Class]
    attention: dict[str, _Attention | None]

    @model_validator(mode="after")
    def _belongs_together(self) -> _Evaluation:
        clips = [one.clips for one in self.classes]
        streams = {name: stream for name in _STREAMS if (stream := getattr(self, name)) is not None}
        if not streams:
            raise ValueError("streams missing")
        for name, stream in streams.items():
            if [sum(row) for row in stream.confusion] != clips or any(
                len(row) != len(clips) for row in stream.confusion
            ):
                raise ValueError(f"{name}: the confusion matrix is not of these classes and clips")
            if [recall is not None for recall in stream.recall] != [count > 0 for count in clips]:
                raise ValueError(f"{name}: the recall is not of these classes")
        return self


class _Run(NamedTuple):
    """The run of an evaluation."""

    uri: str
    config: Config
    data: str | None
    """The shards that it was trained on, where its files say so."""


def read_evaluation(search: Experiment, given: str | None) -> dict[str, Any]:
    """What a report shows of the evaluation of a search's best configuration; only `why` where there is none.

    `given` is an `evaluation.json` or its run, of whatever configuration: `differs` are the keys in which it is not the
    best one, None where its configuration cannot be read. Without it, that of the one run beside the search that has
    the best one's values: what `train` makes of what `export` wrote. Raises `UserError` where the given one is not
    there, or not what `evaluate` writes.
    """
    uri, why = (_given(given), "") if given is not None else _find(search)
    if not uri:
        return {"why": why}
    try:
        numbers = evaluation_numbers(uri)
    except UserError as error:
        if given is not None:
            raise
        return {"why": str(error)}
    run = _open_run(uri.rpartition("/")[0]) or _open_run(run_of(numbers["checkpoint"]))
    best = _best(search)
    return {
        **numbers,
        "run": run.uri if run else None,
        "run_data": run.data if run else None,
        "run_fusion_weight": run.config.fusion_weight if run else None,
        "differs": _differences(run, search, best) if run and best else [] if best is None else None,
    }


def _given(given: str) -> str:
    uri = storage.absolute(given)
    uri = uri if storage.is_file(uri) else storage.join(uri, experiment.EVALUATION_FILE)
    if not storage.is_file(uri):
        raise UserError(f"{given}: neither an {experiment.EVALUATION_FILE} nor a run that has one")
    return uri


def _find(search: Experiment) -> tuple[str, str]:
    """(URI of the `evaluation.json` of the best configuration's run beside a search, why there is none)."""
    best = _best(search)
    if best is None:
        return "", "no trial has been validated yet, so there is nothing to evaluate"
    folder = search.root.rpartition("/")[0]
    beside = [run for name in storage.list_names(folder) if (run := storage.join(folder, name)) != search.root]
    runs = [_open_run(run) for run in beside if storage.is_file(storage.join(run, experiment.EVALUATION_FILE))]
    found = [run.uri for run in runs if run and not _differences(run, search, best)]
    if len(found) == 1:
        return storage.join(found[0], experiment.EVALUATION_FILE), ""
    if found:
        return "", f"{len(found)} runs beside the search have the best configuration; choose one with --evaluation"
    return "", "no evaluated run of the best configuration lies beside the search; name one with --evaluation"


def _best(search: Experiment) -> Config | None:
    try:
        return search.best.config
    except UserError:  # nothing has been validated yet
        return None


def _open_run(uri: str) -> _Run | None:
    """A run's folder; None where it has no configuration that can be read."""
    config, run = (storage.join(uri, file) for file in (experiment.CONFIG_FILE, experiment.RUN_FILE))
    if not storage.is_file(config):
        return None
    try:
        read = load_config(config)
        content = storage.read_json(run) if storage.is_file(run) else None
    except UserError:
        return None
    return _Run(uri, read, content.get("data") if isinstance(content, dict) else None)


def _differences(run: _Run, search: Experiment, best: Config) -> list[str]:
    """In what a run is not the best configuration's; the length and the like of a final run are its own."""
    keys = [key for key in search.space.searched_keys if key != "seed"]
    keys += [key for key in config_keys() if key.startswith(_MODEL_PARTS) and key not in keys]
    differing = [key for key in keys if raw_value(run.config, key) != raw_value(best, key)]
    return differing + (["data"] if run.data not in (None, search.spec["data"]) else [])


def evaluation_numbers(uri: str) -> dict[str, Any]:
    """Accuracies, classes and confusion in descending order of test clips.

    `confusion` is of the last of rgb, flow, fused: counts [true, predicted]. Raises `UserError` for another file.
    """
    content = storage.read_json(uri)
    try:
        _Evaluation.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        what = f"{place}: {message}" if place else message
        raise UserError(f"{uri}: not what `tune-ego evaluate` writes: {what}") from error
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
    """The pairs of true and predicted class with the most clips, off the diagonal."""
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
    return sorted(pairs, key=lambda pair: (-pair["clips"], -pair["share"], pair["true"]))[:_PAIRS]
