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
"""Peak GPU memory of a worker, bytes; logged on GPUs only."""
FEED_WAIT = "feed_wait"
"""Share of the time since the last line that the loop waited for batches."""
REPORT_SECONDS = "report_seconds"
"""Seconds that reporting and writing the previous line took, with its checkpoint."""
TIMES = ("clips_per_second", VALIDATION_SECONDS, GPU_BYTES, FEED_WAIT, REPORT_SECONDS)
"""Metrics that differ between two runs whose weights are equal to the bit."""
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
    """Return a warning if a learning rate fell below a thousandth of its start before half of its horizon, else ""."""
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
    """Values drawn for the trial: name -> value."""
    repeat: int
    """Number of the repeat of its configuration, from 0."""
    config: Config
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    """Reason of its failure."""

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
        """Warning about the trial's result; empty where there is none."""
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
        """Configuration with the highest mean of its repeats' best validation accuracies.

        Configurations whose repeats have all been validated come first. Raises `UserError` where no trial has been
        validated yet.
        """
        scored = [configuration for configuration in by_configuration(self.trials) if configuration.accuracies]
        if not scored:
            raise UserError(f"{self.root}: no trial has been validated yet")
        whole = self.space.repeats
        return max(scored, key=lambda one: (len(one.accuracies) == whole, one.accuracy))

    def to_arrow(self) -> pa.Table:
        """Return one row for each trial (`arrow_table.trials_table` lists the columns)."""
        from tune_ego.results.arrow_table import trials_table

        return trials_table(self)

    def to_pandas(self) -> Any:
        """Return the rows of `to_arrow` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()


@dataclass
class Configuration:
    """Trials that differ in their seed only."""

    trials: list[Trial]

    @property
    def id(self) -> str:
        return self.trials[0].id.partition(_REPEAT)[0]

    @property
    def config(self) -> Config:
        """Configuration of the first repeat."""
        return self.trials[0].config

    @property
    def accuracies(self) -> list[float]:
        """Best validation mean class accuracy of each validated repeat."""
        return [trial.accuracy for trial in self.trials if trial.accuracy is not None]

    @property
    def accuracy(self) -> float | None:
        """Mean of `accuracies`."""
        return mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of `accuracies`."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


def by_configuration(trials: list[Trial]) -> list[Configuration]:
    """Group trials by configuration, in the order in which they were drawn."""
    configurations: dict[str, Configuration] = {}
    for trial in sorted(trials, key=lambda trial: trial.id):
        configurations.setdefault(trial.id.partition(_REPEAT)[0], Configuration([])).trials.append(trial)
    return list(configurations.values())


_REPEAT = "-"


def trial_name(number: int, repeat: int, repeats: int) -> str:
    """Return the name of repeat `repeat` of configuration `number`: 00007, or 00007-2."""
    return f"{number:05d}" + (f"{_REPEAT}{repeat}" if repeats > 1 else "")


ENDED = ("finished", "stopped", "failed")


class TrialRecords:
    """The file `trials.json` for the driver, its only writer: each trial's draw, state and reason."""

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
        """Return the trials that have not ended, as the configurations that Tune passes to them."""
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
    """A report of a trial to the scheduler, and the scheduler's decision."""

    order: int
    """Position among all decisions of the search."""
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
    """Return all decisions of a search, in the order in which they were made."""
    trials = storage.list_names(storage.join(root, "runs"))
    with ThreadPoolExecutor(_READERS) as pool:
        by_trial = pool.map(lambda trial: trial_decisions(root, trial), trials)
        return sorted(decision for decisions in by_trial for decision in decisions)


def read_trial(experiment: Experiment, trial: str, record: dict[str, Any], dead: bool) -> Trial:
    """Read one trial of an experiment, given its entry in `trials.json`; `dead`: the search has no live driver."""
    run, state, drawn, repeat = run_folder(experiment.root, trial), record["state"], record["sampled"], record["repeat"]
    state = "interrupted" if state == "running" and dead else state
    metrics = read_metrics(run)
    decisions = trial_decisions(experiment.root, trial) if state == "stopped" else []
    if decisions:  # the trial may have logged more iterations before it was stopped: their number depends on timing
        metrics = [line for line in metrics if line["iteration"] <= decisions[-1].iteration]
    return Trial(trial, state, run, drawn, repeat, experiment.space.config(drawn, repeat), metrics, record["reason"])


def read_experiment(root: str, known: Mapping[str, Trial] = MappingProxyType({})) -> Experiment:
    """Read an experiment, running or not, from its folder or URI. Trials that are `known` to have ended are reused."""
    uri = storage.join(root, EXPERIMENT_FILE)
    if not storage.exists(uri):
        raise UserError(f"{root}: no experiment here (no {EXPERIMENT_FILE})")
    experiment = Experiment(storage.absolute(root), storage.read_json(uri), [])
    dead = not driver.is_alive(experiment.root)

    def read(trial: str, record: dict[str, Any]) -> Trial:
        if trial in known and known[trial].state == record["state"]:
            return known[trial]
        try:
            return read_trial(experiment, trial, record, dead)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{run_folder(experiment.root, trial)}: its files or its entry are damaged ({error!r})"
            ) from error

    with ThreadPoolExecutor(_READERS) as pool:
        experiment.trials += pool.map(lambda item: read(*item), read_records(experiment.root).items())
    return experiment


def follower(root: str) -> Callable[[], Experiment]:
    """Return a function that reads the experiment at each call, and each trial that has ended only once."""
    known: dict[str, Trial] = {}

    def look() -> Experiment:
        experiment = read_experiment(root, known)
        known.update({trial.id: trial for trial in experiment.trials if trial.ended})
        return experiment

    return look
