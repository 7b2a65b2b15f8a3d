"""Test of the finished trials of a search, one after another."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tune_ego import storage
from tune_ego.console import percent, print_table, say
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import evaluate
from tune_ego.results.checkpoint_files import last_whole_iteration
from tune_ego.results.experiment import EVALUATION_FILE, EXPERIMENT_FILE, Trial
from tune_ego.results.reading import read_experiment, say_damaged


def is_search(uri: str) -> bool:
    """Return whether a folder or URI holds a search."""
    return storage.exists(storage.join(uri, EXPERIMENT_FILE))


def evaluate_trials(
    root: str,
    data: str,
    split: int | None = None,
    fusion_weight: float | None = None,
    call: Callable[[Callable[[], dict[str, Any]]], dict[str, Any]] = lambda work: work(),
    *,
    crops: int = 1,
    flips: bool = False,
) -> None:
    """Test the last checkpoint of each finished trial, as `evaluate` does; print the accuracies.

    Each result is the `evaluation.json` of the trial's run. A trial whose result is there already, for the same
    checkpoint, split, fusion weight and crops, is not tested again. The arguments are those of `evaluate`; `call` calls
    a function that tests one trial, here or on another machine. Raises `UserError` where no trial has finished.
    """
    search = read_experiment(root)
    say_damaged(search)
    finished = [trial for trial in search.trials if trial.state == "finished"]
    if not finished:
        raise UserError(f"{search.root}: no trial has finished")
    rows = []
    for number, trial in enumerate(finished, start=1):
        result = _earlier_result(trial, split, fusion_weight, (crops, flips))
        if result is None:
            say(f"{trial.id}: trial {number} of {len(finished)}")
            result = call(partial(evaluate, trial.run, data, split, None, fusion_weight, crops=crops, flips=flips))
        names = [name for name in ("rgb", "flow", "fused") if name in result]
        accuracies = [percent(result[name]["mean_class_accuracy"]) for name in names]
        rows.append([trial.id, str(result["iteration"]), ", ".join(map(" ".join, zip(names, accuracies)))])
    print_table("Test mean class accuracy of the finished trials", ["trial", "iteration", "accuracy"], rows)


def _earlier_result(
    trial: Trial, split: int | None, fusion_weight: float | None, views: tuple[int, bool]
) -> dict[str, Any] | None:
    """Return the content of a trial's `evaluation.json` if it is that of the same test."""
    uri = storage.join(trial.run, EVALUATION_FILE)
    if not storage.exists(uri):
        return None
    try:
        result = storage.read_json(uri)
        split = trial.config.data.split if split is None else split
        weight = trial.config.fusion_weight if fusion_weight is None else fusion_weight
        same = (result["split"], result["iteration"]) == (split, last_whole_iteration(trial.run))
        same = same and (result.get("crops", 1), result.get("flips", False)) == views
        return result if same and result.get("fusion_weight", weight) == weight else None
    except (UserError, LookupError, TypeError):  # damaged: the test is run again
        return None
