"""The files of runs and experiments, and reading them: no Ray and no torch here.

<storage>/<name>/   a run: config.yaml, metrics.jsonl, iteration-000100/checkpoint.pt, final/model.pt
<storage>/<name>/   an experiment: experiment.json, trials.json, runs/<trial>/ (runs as above), tune/ (Ray's)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.config import Config, load_config
from tune_ego.errors import UserError
from tune_ego.search_space import SearchSpace, parse_space

METRIC = "val_mean_class_accuracy"
EXPERIMENT_FILE = "experiment.json"
TRIALS_FILE = "trials.json"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
CHECKPOINT_FILE = "checkpoint.pt"
MODEL_FILE = "final/model.pt"


def read_metrics(run: str) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; none where it has not logged yet."""
    uri = storage.join(run, METRICS_FILE)
    if not storage.exists(uri):
        return []
    return [json.loads(line) for line in storage.read_text(uri).splitlines()]


def write_metrics(run: str, lines: list[dict[str, Any]]) -> None:
    storage.write_text(storage.join(run, METRICS_FILE), "".join(json.dumps(line) + "\n" for line in lines))


class Failure(NamedTuple):
    """Why a run failed in a way that Ray should not try again."""

    reason: str
    final: bool
    """Nothing outside the run can mend it: its loss left the finite numbers."""


def read_failure(run: str) -> Failure | None:
    uri = storage.join(run, FAILURE_FILE)
    return Failure(**storage.read_json(uri)) if storage.exists(uri) else None


def write_failure(run: str, failure: Failure) -> None:
    storage.write_json(storage.join(run, FAILURE_FILE), failure._asdict())


_COLLAPSED = 1e-3


def learning_rates(line: dict[str, Any]) -> dict[str, float]:
    """Stream -> learning rate, from a line of metrics."""
    prefix = "learning_rate_"
    return {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix)}


def collapsed_rate(config: Config, lines: list[dict[str, Any]]) -> str:
    """Where a learning rate fell under a thousandth of its start before half the iterations; empty where none did."""
    for line in lines:
        early = config.schedule.warmup < line["iteration"] < config.train.iterations / 2
        for stream, rate in learning_rates(line).items():
            if early and rate < _COLLAPSED * config.optimizer.lr:
                start = f"{config.optimizer.lr:.2g} to {rate:.2g} by iteration {line['iteration']}"
                return f"the learning rate of the {stream} stream fell from {start} of {config.train.iterations}"
    return ""


_CHECKPOINT_PREFIX = "iteration-"


def checkpoint_name(iteration: int) -> str:
    return f"{_CHECKPOINT_PREFIX}{iteration:06d}"


def is_checkpoint_name(name: str) -> bool:
    return name.startswith(_CHECKPOINT_PREFIX) and name.removeprefix(_CHECKPOINT_PREFIX).isdecimal()


def checkpoints(run: str) -> list[str]:
    """URIs of the folders of a run's checkpoints, oldest first."""
    names = [name for name in storage.list_names(run) if is_checkpoint_name(name)]
    return [storage.join(run, name) for name in sorted(names, key=lambda name: (len(name), name))]


def find_checkpoint(uri: str) -> str:
    """The file meant by a file, a checkpoint's folder or a run's folder (its last whole checkpoint).

    Raises `UserError` for another folder; what is not there stays as given.
    """
    uri = storage.absolute(uri)
    if storage.is_file(uri) or not storage.exists(uri):
        return uri
    for folder in [*reversed(checkpoints(uri)), uri]:
        file = storage.join(folder, CHECKPOINT_FILE)
        if storage.exists(file):
            return file
    raise UserError(f"{uri}: no checkpoint in this folder; give a run, of a search one below runs/")


@dataclass
class Trial:
    """One trial, from its files."""

    id: str
    state: str
    """pending, running, finished, stopped (by ASHA) or failed."""
    run: str
    config: Config | None
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    """Why it failed."""

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if METRIC in line]

    @property
    def iteration(self) -> int:
        return self.metrics[-1]["iteration"] if self.metrics else 0

    @property
    def warning(self) -> str:
        """What should make its result be doubted; empty where nothing does."""
        return collapsed_rate(self.config, self.metrics) if self.config else ""

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation with the highest mean class accuracy (the earliest of equals)."""
        return max(self.validations, key=lambda line: line[METRIC], default=None)

    @property
    def accuracy(self) -> float | None:
        return self.best[METRIC] if self.best else None


@dataclass
class Experiment:
    root: str
    spec: dict[str, Any]
    """`experiment.json`: search space, data set, seed, versions, the command."""
    trials: list[Trial]

    @property
    def space(self) -> SearchSpace:
        return parse_space(self.spec["space"], self.spec["space_source"], self.spec["overrides"])

    @property
    def best(self) -> Trial:
        """The trial with the highest validation mean class accuracy; raises `UserError` where none has one yet."""
        scored = [trial for trial in self.trials if trial.accuracy is not None]
        if not scored:
            raise UserError(f"{self.root}: no trial has been validated yet")
        return max(scored, key=lambda trial: trial.accuracy or 0.0)


def run_folder(root: str, trial: str) -> str:
    return storage.join(root, "runs", trial)


def read_experiment(root: str) -> Experiment:
    """An experiment from its folder or URI alone, running or not."""
    uri = storage.join(root, EXPERIMENT_FILE)
    if not storage.exists(uri):
        raise UserError(f"{root}: no experiment here (no {EXPERIMENT_FILE})")
    states_uri = storage.join(root, TRIALS_FILE)
    states = storage.read_json(states_uri) if storage.exists(states_uri) else {}
    trials = []
    for trial, record in states.items():
        run = run_folder(root, trial)
        config_uri = storage.join(run, CONFIG_FILE)
        config = load_config(config_uri) if storage.exists(config_uri) else None
        reason = record["reason"]
        trials.append(Trial(trial, record["state"], run, config, read_metrics(run), reason))
    return Experiment(storage.absolute(root), storage.read_json(uri), trials)


def config_value(config: Config | None, key: str) -> str:
    """A dotted key's value as text; `-` where the configuration has no such key."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part, None)
    if isinstance(node, float):
        return f"{node:.4g}"
    return "-" if node is None else str(node)


def trial_table(experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of the trials, best first."""
    keys = experiment.space.searched_keys
    columns = ["trial", "state", "iterations", "best val. mean class acc.", *keys]
    rows = []
    for trial in sorted(
        experiment.trials, key=lambda trial: -1 if trial.accuracy is None else trial.accuracy, reverse=True
    ):
        accuracy = "-" if trial.accuracy is None else f"{100 * trial.accuracy:.1f} %"
        state = f"{trial.state}: {trial.reason}" if trial.reason else trial.state
        rows.append(
            [trial.id, state, str(trial.iteration), accuracy, *(config_value(trial.config, key) for key in keys)]
        )
    return columns, rows
