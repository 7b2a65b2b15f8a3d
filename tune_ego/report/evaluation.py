"""What `evaluation.json` says, in the order in which people can read it: classes by their number of clips."""

from __future__ import annotations

from typing import Any

from tune_ego import experiment, storage
from tune_ego.config import Config, load_config
from tune_ego.errors import UserError
from tune_ego.experiment import Experiment, config_value

_PAIRS = 20
_STREAMS = ("rgb", "flow", "fused")
_NEEDED = ("split", "clips", "iteration", "chance", "clips_trained_on", "trained_on_split", "classes", "attention")


def find_evaluation(search: Experiment, given: str | None) -> tuple[str, str]:
    """(URI of an `evaluation.json`, why there is none) for a search.

    `given` is the file or its run. Without it, that of the one run beside the search whose configuration has the
    best one's values of all searched keys: what `train` makes of what `export` wrote. Raises `UserError` where the
    given one is not there.
    """
    if given is not None:
        uri = storage.absolute(given)
        uri = uri if storage.is_file(uri) else storage.join(uri, experiment.EVALUATION_FILE)
        if not storage.is_file(uri):
            raise UserError(f"{given}: neither an {experiment.EVALUATION_FILE} nor a run that has one")
        return uri, ""
    try:
        best = search.best.config
    except UserError:
        return "", "no trial has been validated yet, so there is nothing to evaluate"
    folder = search.root.rpartition("/")[0]
    found = [run for name in storage.list_names(folder) if (run := storage.join(folder, name)) != search.root]
    found = [run for run in found if _is_final(run, best, search.space.searched_keys)]
    if len(found) == 1:
        return storage.join(found[0], experiment.EVALUATION_FILE), ""
    if found:
        return "", f"{len(found)} runs beside the search have the best configuration; choose one with --evaluation"
    return "", "no evaluated run of the best configuration lies beside the search; name one with --evaluation"


def _is_final(run: str, best: Config, keys: list[str]) -> bool:
    uris = [storage.join(run, file) for file in (experiment.CONFIG_FILE, experiment.EVALUATION_FILE)]
    if not all(map(storage.exists, uris)):
        return False
    try:
        config = load_config(uris[0])
    except UserError:
        return False
    return all(config_value(config, key) == config_value(best, key) for key in keys if key != "seed")


def evaluation_numbers(uri: str, why: str) -> dict[str, Any]:
    """Accuracies, classes and confusion in descending order of test clips; only `why` where there is no evaluation.

    `confusion` is of the last of rgb, flow, fused: counts [true, predicted]. Raises `UserError` for another file.
    """
    if not uri:
        return {"why": why}
    content = storage.read_json(uri)
    missing = [key for key in _NEEDED if key not in content] if isinstance(content, dict) else ["everything"]
    if missing or not (names := [name for name in _STREAMS if name in content]):
        raise UserError(f"{uri}: not what `tune-ego evaluate` writes: {', '.join(missing) or 'streams'} missing")
    classes = content["classes"]
    order = sorted(range(len(classes)), key=lambda index: (-classes[index]["clips"], classes[index]["action"]))
    counts = content[names[-1]]["confusion"]
    measures = ("micro_accuracy", "mean_class_accuracy", "verb_accuracy", "noun_accuracy")
    return {
        "why": "",
        "file": uri,
        "checkpoint": content.get("checkpoint", ""),
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
