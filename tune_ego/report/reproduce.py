"""What someone needs to do a search again: commands, versions, seeds, and which data it was."""

from __future__ import annotations

import hashlib
import shlex
from typing import Any

from tune_ego import __version__, storage
from tune_ego.errors import UserError
from tune_ego.results.checkpoint_files import MODEL_FILE
from tune_ego.results.experiment import CONFIG_FILE, Experiment

_FINGERPRINTED = ("dataset.json", "clips.parquet")


def reproduction(search: Experiment, evaluation: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """Commands in their order, versions, seeds, the search space's text, and the data set's fingerprints.

    `evaluation` is what `read_evaluation` gave; `options` are those of this report.
    """
    spec, root, data = search.spec, search.root, search.spec["data"]
    folder, _, name = root.rpartition("/")
    commands = [
        {"what": "the search, as it was started", "command": spec.get("command", "not recorded")},
        {"what": "go on with it", "command": shlex.join(["tune-ego", "resume", root])},
        {"what": "the best configuration", "command": shlex.join(["tune-ego", "export", root, "--out", "best.yaml"])},
        {"what": "train and test it", "command": shlex.join(_train("best.yaml", data, folder, f"{name}-final"))},
    ]
    if run := evaluation.get("run"):
        trained_on = evaluation["run_data"] or data
        again = _train(storage.join(run, CONFIG_FILE), trained_on, folder, f"{run.rpartition('/')[2]}-again")
        commands[-1] = {"what": "train and test the run that is shown here again", "command": shlex.join(again)}
    if evaluation.get("checkpoint"):
        commands.append({"what": "the test that is shown here", "command": shlex.join(_test(evaluation, data))})
    commands.append({"what": "this report", "command": shlex.join(["tune-ego", "report", root, *options])})
    return {
        "commands": commands,
        "versions": {
            "tune_ego of the search": spec["version"],
            "ray of the search": spec["ray"],
            "tune_ego of this report": __version__,
        },
        "search_seed": spec["seed"],
        "trial_seeds": sorted({trial.config.seed for trial in search.trials}),
        "data": data,
        "data_settings": spec["data_settings"],
        "fingerprints": _fingerprints(data),
        "space_source": spec["space_source"],
        "space": spec["space"],
        "overrides": spec["overrides"],
    }


def _train(config: str, data: str, folder: str, name: str) -> list[str]:
    return ["tune-ego", "train", config, "--data", data, "--storage", folder, "--name", name]


def _test(evaluation: dict[str, Any], data: str) -> list[str]:
    checkpoint, weight = evaluation["checkpoint"].removesuffix(f"/{MODEL_FILE}"), evaluation["fusion_weight"]
    command = ["tune-ego", "evaluate", checkpoint, "--data", evaluation["run_data"] or data]
    command += ["--split", str(evaluation["split"])]
    return command + (["--fusion-weight", str(weight)] if weight not in (None, evaluation["run_fusion_weight"]) else [])


def _fingerprints(data: str) -> list[dict[str, str]]:
    """SHA-256 of the files that describe the shards, as they are now; why not, where they cannot be read."""
    found = []
    for file in _FINGERPRINTED:
        try:
            digest = hashlib.sha256(storage.read_bytes(storage.join(data, file))).hexdigest()
        except (OSError, UserError) as error:
            digest = f"cannot be read now ({type(error).__name__})"
        found.append({"file": file, "sha256": digest})
    return found
