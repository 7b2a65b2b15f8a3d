"""The files of runs and experiments, and reading them: no Ray and no torch here. More in `checkpoint_files`.

<storage>/<name>/   a run: config.yaml, metrics.jsonl, iteration-000100/checkpoint.{pt,json}, final/model.pt
<storage>/<name>/   an experiment: experiment.json, trials.json, tune/ (Ray's), runs/<trial>/ (as above, with
                    decisions.json)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mean, stdev
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.results import driver
from tune_ego.search_space import SearchSpace, parse_space

if TYPE_CHECKING:
    import pyarrow as pa

_READERS = 16
"""Threads that read files."""
METRIC = "val_mean_class_accuracy"
VALIDATION_SECONDS = "validation_seconds"
GPU_BYTES = "gpu_bytes"
"""The most of a GPU's memory that a worker has had; logged where there is one."""
FEED_WAIT = "feed_wait"
"""Share of the time since the last line that the loop waited for batches."""
REPORT_SECONDS = "report_seconds"
"""What the last line before took to be reported and written, with its checkpoint where it had one."""
TIMES = ("clips_per_second", VALIDATION_SECONDS, GPU_BYTES, FEED_WAIT, REPORT_SECONDS)
"""What differs between two runs that are the same to the bit."""
EXPERIMENT_FILE = "experiment.json"
TRIALS_FILE = "trials.json"
DECISIONS_FILE = "decisions.json"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
ERROR_FILE = "error.txt"
"""The last traceback of a run that was given up."""
EVALUATION_FILE = "evaluation.json"


def picture_file(iteration: int) -> str:
    """In a run's folder: attention over a frame of some validation clips, PNG."""
    return f"attention/iteration-{iteration:06d}.png"


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
    """Where a learning rate fell under a thousandth of its start before half its horizon; empty where none did."""
    for line in lines:
        early = config.schedule.warmup < line["iteration"] < config.horizon / 2
        for stream, rate in learning_rates(line).items():
            if early and rate < _COLLAPSED * config.optimizer.lr:
                start = f"{config.optimizer.lr:.2g} to {rate:.2g} by iteration {line['iteration']}"
                return f"the learning rate of the {stream} stream fell from {start} of {config.train.iterations}"
    return ""


@dataclass
class Trial:
    """One trial, from its files."""

    id: str
    state: str
    """pending, running, interrupted (with its driver), finished, stopped (by the scheduler) or failed."""
    run: str
    sampled: dict[str, Any]
    """What was drawn for it: name -> value."""
    repeat: int
    """Which of its configuration's repeats it is."""
    config: Config
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    """Why it failed."""

    @property
    def ended(self) -> bool:
        return self.state in ENDED

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [line for line in self.metrics if METRIC in line]

    @property
    def iteration(self) -> int:
        return self.metrics[-1]["iteration"] if self.metrics else 0

    @property
    def warning(self) -> str:
        """What should make its result be doubted; empty where nothing does."""
        return collapsed_rate(self.config, self.metrics)

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

    @cached_property
    def space(self) -> SearchSpace:
        spec = self.spec
        space = parse_space(spec["space"], spec["space_source"], spec["overrides"], check=False)
        return replace(space, samples=spec["samples"])

    @property
    def best(self) -> Configuration:
        """The configuration with the highest mean of its repeats' best validation accuracies.

        One of which not all repeats have been validated comes after all of which they have. Raises `UserError` where
        nothing has been validated yet.
        """
        scored = [found for found in by_configuration(self.trials) if found.accuracies]
        if not scored:
            raise UserError(f"{self.root}: no trial has been validated yet")
        whole = self.space.repeats
        return max(scored, key=lambda found: (len(found.accuracies) == whole, found.accuracy))

    def to_arrow(self) -> pa.Table:
        """Return one row for each trial (`arrow_table.trials_table` lists the columns)."""
        from tune_ego.results.arrow_table import trials_table

        return trials_table(self)

    def to_pandas(self) -> Any:
        """Return the rows of `to_arrow` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()


@dataclass
class Configuration:
    """The trials that differ in nothing but their seed."""

    trials: list[Trial]

    @property
    def id(self) -> str:
        return self.trials[0].id.partition(_REPEAT)[0]

    @property
    def config(self) -> Config:
        """With the first repeat's seed."""
        return self.trials[0].config

    @property
    def accuracies(self) -> list[float]:
        """The best validation mean class accuracies of those that have been validated."""
        return [trial.accuracy for trial in self.trials if trial.accuracy is not None]

    @property
    def accuracy(self) -> float | None:
        """The mean of these."""
        return mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Their standard deviation."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


def by_configuration(trials: list[Trial]) -> list[Configuration]:
    """In the order of their drawing."""
    found: dict[str, Configuration] = {}
    for trial in sorted(trials, key=lambda trial: trial.id):
        found.setdefault(trial.id.partition(_REPEAT)[0], Configuration([])).trials.append(trial)
    return list(found.values())


_REPEAT = "-"


def trial_name(number: int, repeat: int, repeats: int) -> str:
    """Of repeat `repeat` of configuration `number`: 00007, or 00007-2."""
    return f"{number:05d}" + (f"{_REPEAT}{repeat}" if repeats > 1 else "")


ENDED = ("finished", "stopped", "failed")


class TrialRecords:
    """`trials.json` in the hands of the one process that writes it: each trial's draw, state and reason."""

    def __init__(self, root: str) -> None:
        self._uri = storage.join(root, TRIALS_FILE)
        self._records: dict[str, dict[str, Any]] = read_records(root)

    def __contains__(self, trial: str) -> bool:
        return trial in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def state(self, trial: str) -> str:
        return str(self._records[trial]["state"])

    def draws(self) -> list[dict[str, Any]]:
        """What Tune gets as configuration of each trial that has not ended."""
        return [
            {"trial": trial, "repeat": record["repeat"], "sampled": record["sampled"]}
            for trial, record in self._records.items()
            if record["state"] not in ENDED
        ]

    def add(self, draws: list[dict[str, Any]]) -> None:
        for draw in draws:
            rest = {"repeat": draw["repeat"], "sampled": draw["sampled"]}
            self._records[draw["trial"]] = {"state": "pending", "reason": "", **rest}
        self._write()

    def note(self, trial: str, state: str, reason: str = "") -> None:
        self._records[trial] |= {"state": state, "reason": reason}
        self._write()

    def reopen(self, states: Container[str]) -> None:
        """Trials in one of these states wait again."""
        for record in self._records.values():
            if record["state"] in states:
                record |= {"state": "pending", "reason": ""}
        self._write()

    def _write(self) -> None:
        storage.write_json(self._uri, self._records)


def read_records(root: str) -> dict[str, dict[str, Any]]:
    uri = storage.join(root, TRIALS_FILE)
    return storage.read_json(uri) if storage.exists(uri) else {}


def run_folder(root: str, trial: str) -> str:
    return storage.join(root, "runs", trial)


class Decision(NamedTuple):
    """What the scheduler was told of a trial, and what it said."""

    order: int
    """Its place among all of the search."""
    trial: str
    iteration: int
    accuracy: float
    action: str
    """CONTINUE or STOP."""


def write_decisions(root: str, trial: str, decisions: list[Decision]) -> None:
    storage.write_json(storage.join(run_folder(root, trial), DECISIONS_FILE), decisions)


def trial_decisions(root: str, trial: str) -> list[Decision]:
    uri = storage.join(run_folder(root, trial), DECISIONS_FILE)
    return [Decision(*line) for line in storage.read_json(uri)] if storage.exists(uri) else []


def read_decisions(root: str) -> list[Decision]:
    """All of a search, in the order in which they were made."""
    trials = storage.list_names(storage.join(root, "runs"))
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda trial: trial_decisions(root, trial), trials)
        return sorted(decision for decisions in found for decision in decisions)


def read_trial(found: Experiment, trial: str, record: dict[str, Any], dead: bool) -> Trial:
    """One trial of an opened experiment, from its entry in `trials.json`; `dead`: nobody drives the search."""
    run, state, drawn, repeat = run_folder(found.root, trial), record["state"], record["sampled"], record["repeat"]
    state = "interrupted" if state == "running" and dead else state
    metrics = read_metrics(run)
    decisions = trial_decisions(found.root, trial) if state == "stopped" else []
    if decisions:  # what it did before the scheduler's word reached it depends on how long that took
        metrics = [line for line in metrics if line["iteration"] <= decisions[-1].iteration]
    return Trial(trial, state, run, drawn, repeat, found.space.config(drawn, repeat), metrics, record["reason"])


def read_experiment(root: str, known: Mapping[str, Trial] = MappingProxyType({})) -> Experiment:
    """An experiment from its folder or URI alone, running or not; trials `known` to have ended are not read again."""
    uri = storage.join(root, EXPERIMENT_FILE)
    if not storage.exists(uri):
        raise UserError(f"{root}: no experiment here (no {EXPERIMENT_FILE})")
    found = Experiment(storage.absolute(root), storage.read_json(uri), [])
    dead = not driver.is_alive(found.root)

    def read(trial: str, record: dict[str, Any]) -> Trial:
        if trial in known and known[trial].state == record["state"]:
            return known[trial]
        try:
            return read_trial(found, trial, record, dead)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{run_folder(found.root, trial)}: its files or its entry are damaged ({error!r})"
            ) from error

    with ThreadPoolExecutor(_READERS) as pool:
        found.trials += pool.map(lambda item: read(*item), read_records(found.root).items())
    return found


def follower(root: str) -> Callable[[], Experiment]:
    """What reads an experiment again and again, and trials that have ended once."""
    known: dict[str, Trial] = {}

    def look() -> Experiment:
        found = read_experiment(root, known)
        known.update({trial.id: trial for trial in found.trials if trial.ended})
        return found

    return look


def config_value(config: Config, key: str) -> str:
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


def configuration_table(experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of the configurations with the mean and spread of their repeats, best first."""
    keys = experiment.space.searched_keys
    columns = ["configuration", "repeats validated", "mean of best val. mean class acc.", "standard deviation", *keys]
    rows = []
    found = by_configuration(experiment.trials)
    for one in sorted(found, key=lambda one: -1 if one.accuracy is None else one.accuracy, reverse=True):
        middle = "-" if one.accuracy is None else f"{100 * one.accuracy:.1f} %"
        spread = "-" if one.spread is None else f"{100 * one.spread:.1f} points"
        values = [config_value(one.config, key) for key in keys]
        rows.append([one.id, str(len(one.accuracies)), middle, spread, *values])
    return columns, rows
