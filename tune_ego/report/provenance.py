"""Information to reproduce a search: commands, versions, seeds, and checksums of the data set."""

from __future__ import annotations

import hashlib
import shlex
from typing import Any

from tune_ego import __version__, storage
from tune_ego.errors import UserError
from tune_ego.results.checkpoint_files import MODEL_FILE
from tune_ego.results.experiment import CONFIG_FILE, Experiment

_DESCRIBING_FILES = ("dataset.json", "clips.parquet")


def reproduction(search: Experiment, evaluation: dict[str, Any], options: list[str]) -> dict[str, Any]:
    """Return commands in the order of their use, versions, seeds, the search space, and checksums of the data set.

    Args:
        search: The experiment.
        evaluation: The result of `read_evaluation`.
        options: Options of the `report` command, as words of its command line.
    """
    spec, root, data = search.spec, search.root, search.spec["data"]
    folder, _, name = root.rpartition("/")
    final = _train_command("best.yaml", data, folder, f"{name}-final")
    export = ["tune-ego", "export", root, "--out", "best.yaml"]
    commands = [
        {"what": "start the search", "command": spec.get("command", "not recorded")},
        {"what": "resume the search", "command": shlex.join(["tune-ego", "resume", root])},
        {"what": "export the best configuration", "command": shlex.join(export)},
        {"what": "train and test the best configuration", "command": shlex.join(final)},
    ]
    if run := evaluation.get("run"):
        trained_on = evaluation["run_data"] or data
        again = _train_command(storage.join(run, CONFIG_FILE), trained_on, folder, f"{run.rpartition('/')[2]}-again")
        commands[-1] = {"what": "train and test the run shown here again", "command": shlex.join(again)}
    if evaluation.get("checkpoint"):
        command = shlex.join(_evaluate_command(evaluation, data))
        commands.append({"what": "evaluate the checkpoint shown here again", "command": command})
    commands.append({"what": "write this report again", "command": shlex.join(["tune-ego", "report", root, *options])})
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
        "fingerprints": _checksums(data),
        "space_source": spec["space_source"],
        "space": spec["space"],
        "overrides": spec["overrides"],
    }


def _train_command(config: str, data: str, folder: str, name: str) -> list[str]:
    return ["tune-ego", "train", config, "--data", data, "--storage", folder, "--name", name]


def _evaluate_command(evaluation: dict[str, Any], data: str) -> list[str]:
    checkpoint, weight = evaluation["checkpoint"].removesuffix(f"/{MODEL_FILE}"), evaluation["fusion_weight"]
    command = ["tune-ego", "evaluate", checkpoint, "--data", evaluation["run_data"] or data]
    command += ["--split", str(evaluation["split"])]
    return command + (["--fusion-weight", str(weight)] if weight not in (None, evaluation["run_fusion_weight"]) else [])


def _checksums(data: str) -> list[dict[str, str]]:
    """Return the current SHA-256 of the files that describe the shards, or the reason where a file cannot be read."""
    checksums = []
    for file in _DESCRIBING_FILES:
        try:
            digest = hashlib.sha256(storage.read_bytes(storage.join(data, file))).hexdigest()
        except (OSError, UserError) as error:
            digest = f"cannot be read now ({type(error).__name__})"
        checksums.append({"file": file, "sha256": digest})
    return checksums
