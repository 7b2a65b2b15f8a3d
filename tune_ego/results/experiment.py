"""Files of runs and experiments, and their reading and writing. No Ray and no torch. Checkpoints: `checkpoint_files`.

<storage>/<name>/   a run: config.yaml, metrics.jsonl, iteration-000100/checkpoint.{pt,json}, final/model.pt
<storage>/<name>/   an experiment: experiment.json, trials.json, tune/ (written by Ray), runs/<trial>/ (a run, with
                    decisions.json)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mean, stdev
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.results import driver, trial_records
from tune_ego.search_space import SearchSpace, parse_space

if TYPE_CHECKING:
    import pyarrow as pa

_READERS = 16
METRIC = "val_mean_class_accuracy"
"""The metric that a search maximises, in [0, 1]. Only lines of validations have it."""
VALIDATION_SECONDS = "validation_seconds"
GPU_BYTES = "gpu_bytes"
"""Peak GPU memory of a worker, bytes; logged on GPUs only."""
FEED_WAIT = "feed_wait"
"""Share of the time since the line before that the loop waited for batches."""
REPORT_SECONDS = "report_seconds"
"""Seconds that reporting and writing the previous line took, with its checkpoint."""
TIMES = ("clips_per_second", VALIDATION_SECONDS, GPU_BYTES, FEED_WAIT, REPORT_SECONDS)
"""The five metrics that differ between two runs whose weights and other metrics are equal to the bit."""
EXPERIMENT_FILE = "experiment.json"
CONFIG_FILE = "config.yaml"
RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
FAILURE_FILE = "failure.json"
ERROR_FILE = "error.txt"
"""Traceback of the last error, if Ray gave up the run."""
LOG_FILE = "log.txt"
EVALUATION_FILE = "evaluation.json"


def picture_file(iteration: int) -> str:
    """Return the path, in a run's folder, of the PNG with attention maps over frames of some validation clips."""
    return f"attention/iteration-{iteration:06d}.png"


def read_metrics(run: str) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`; an empty list if nothing is logged yet."""
    uri = storage.join(run, METRICS_FILE)
    if not storage.exists(uri):
        return []
    return [json.loads(line) for line in storage.read_text(uri).splitlines()]


def write_metrics(run: str, lines: list[dict[str, Any]]) -> None:
    """Replace a run's `metrics.jsonl`."""
    storage.write_text(storage.join(run, METRICS_FILE), "".join(json.dumps(line) + "\n" for line in lines))


class Failure(NamedTuple):
    """A failure of a run after which Ray should not retry."""

    reason: str
    final: bool
    """Whether `resume` cannot help either: a loss was not finite."""


def read_failure(run: str) -> Failure | None:
    """Return the recorded failure of a run, or None."""
    uri = storage.join(run, FAILURE_FILE)
    return Failure(**storage.read_json(uri)) if storage.exists(uri) else None


def write_failure(run: str, failure: Failure) -> None:
    """Record the failure of a run."""
    storage.write_json(storage.join(run, FAILURE_FILE), failure._asdict())


_COLLAPSED = 1e-3  # share of the initial learning rate


def learning_rates(line: dict[str, Any]) -> dict[str, float]:
    """Return stream -> learning rate from a line of metrics."""
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
    """One trial, as read from its files."""

    id: str
    state: str
    """pending, running, interrupted (its driver died), finished, stopped (early, by the scheduler) or failed."""
    run: str
    """Folder or URI of its run."""
    sampled: dict[str, Any]
    """Drawn values: `key@branch` -> value."""
    repeat: int
    """Index among the repeats of its configuration, from 0."""
    config: Config
    metrics: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    """Reason of its failure; empty if it has not failed."""

    @property
    def ended(self) -> bool:
        """Whether the trial has finished, was stopped early or has failed."""
        return self.state in trial_records.ENDED

    @property
    def validations(self) -> list[dict[str, Any]]:
        """Lines of metrics with a validation."""
        return [line for line in self.metrics if METRIC in line]

    @property
    def iteration(self) -> int:
        """The last logged iteration; 0 before the first line."""
        return self.metrics[-1]["iteration"] if self.metrics else 0

    @property
    def warning(self) -> str:
        """Warning about the trial's result; empty where there is none."""
        return collapsed_rate(self.config, self.metrics)

    @property
    def best(self) -> dict[str, Any] | None:
        """Line of the validation with the highest mean class accuracy; the earliest of equal ones."""
        return max(self.validations, key=lambda line: line[METRIC], default=None)

    @property
    def accuracy(self) -> float | None:
        """Mean class accuracy of the best validation, in [0, 1]; None before the first validation."""
        return self.best[METRIC] if self.best else None


@dataclass
class Experiment:
    """A search, as read from its files."""

    root: str
    """Its folder or URI."""
    spec: dict[str, Any]
    """Content of `experiment.json`: search space, data set, seed, versions, command."""
    trials: list[Trial]

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, with the overrides and the number of samples of `spec`."""
        spec = self.spec
        space = parse_space(spec["space"], spec["space_source"], spec["overrides"], check=False)
        return replace(space, samples=spec["samples"])

    @property
    def best(self) -> Configuration:
        """Configuration with the highest mean, over its repeats, of their best validation accuracies.

        Configurations whose repeats have all been validated come first. Raises `UserError` if no trial has been
        validated yet.
        """
        validated = [configuration for configuration in by_configuration(self.trials) if configuration.accuracies]
        if not validated:
            raise UserError(f"{self.root}: no trial has been validated yet")
        repeats = self.space.repeats
        return max(validated, key=lambda one: (len(one.accuracies) == repeats, one.accuracy))

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
        """Name of the trials without the index of the repeat."""
        return trial_records.configuration_name(self.trials[0].id)

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
        """Mean of `accuracies`; None if it is empty."""
        return mean(self.accuracies) if self.accuracies else None

    @property
    def spread(self) -> float | None:
        """Standard deviation of `accuracies`, with n - 1; None for fewer than two."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


def by_configuration(trials: list[Trial]) -> list[Configuration]:
    """Group trials by configuration, in the order in which they were drawn."""
    configurations: dict[str, Configuration] = {}
    for trial in sorted(trials, key=lambda trial: trial.id):
        name = trial_records.configuration_name(trial.id)
        configurations.setdefault(name, Configuration([])).trials.append(trial)
    return list(configurations.values())


def read_trial(experiment: Experiment, trial: str, record: dict[str, Any], dead: bool) -> Trial:
    """Read one trial of an experiment, given its entry in `trials.json`; `dead`: no process drives the search."""
    run, state, sampled = trial_records.run_folder(experiment.root, trial), record["state"], record["sampled"]
    repeat = record["repeat"]
    state = "interrupted" if state == "running" and dead else state
    metrics = read_metrics(run)
    decisions = trial_records.trial_decisions(experiment.root, trial) if state == "stopped" else []
    if decisions:  # a trial trains on until it is stopped; how far it gets depends on timing
        metrics = [line for line in metrics if line["iteration"] <= decisions[-1].iteration]
    started = "" if experiment.spec.get("version") == __version__ else storage.join(run, CONFIG_FILE)
    config = experiment.space.resumed_config(started, sampled, repeat)
    return Trial(trial, state, run, sampled, repeat, config, metrics, record["reason"])


def read_experiment(root: str, ended_trials: Mapping[str, Trial] = MappingProxyType({})) -> Experiment:
    """Read an experiment from its folder or URI, running or not.

    Args:
        root: The folder or URI.
        ended_trials: Trials from an earlier call that had ended, by name. They are not read again unless their state
            has changed.

    Raises:
        UserError: There is no experiment, or files of a trial are damaged.
    """
    uri = storage.join(root, EXPERIMENT_FILE)
    if not storage.exists(uri):
        raise UserError(f"{root}: no experiment here (no {EXPERIMENT_FILE})")
    experiment = Experiment(storage.absolute(root), storage.read_json(uri), [])
    dead = not driver.is_alive(experiment.root)

    def read(trial: str, record: dict[str, Any]) -> Trial:
        if trial in ended_trials and ended_trials[trial].state == record["state"]:
            return ended_trials[trial]
        try:
            return read_trial(experiment, trial, record, dead)
        except UserError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{trial_records.run_folder(experiment.root, trial)}: its files or its entry are damaged ({error!r})"
            ) from error

    with ThreadPoolExecutor(_READERS) as pool:
        experiment.trials += pool.map(lambda item: read(*item), trial_records.read_records(experiment.root).items())
    return experiment


def repeated_reader(root: str) -> Callable[[], Experiment]:
    """Return a function that reads the experiment at each call, and each trial that has ended only once."""
    ended_trials: dict[str, Trial] = {}

    def read() -> Experiment:
        experiment = read_experiment(root, ended_trials)
        ended_trials.update({trial.id: trial for trial in experiment.trials if trial.ended})
        return experiment

    return read
