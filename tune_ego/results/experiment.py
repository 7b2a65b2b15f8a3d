"""Files of runs and experiments, and their reading and writing. No Ray and no torch. Checkpoints: `checkpoint_files`.

<storage>/<name>/   a run: config.yaml, metrics.jsonl, iteration-000100/checkpoint.{pt,json}, final/model.pt
<storage>/<name>/   an experiment: experiment.json, trials.json, tune/ (written by Ray), runs/<trial>/ (a run, with
                    decisions.json)
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.console import say_once
from tune_ego.errors import UserError
from tune_ego.results import trial_records
from tune_ego.results.decisions import Decision
from tune_ego.search_space import SearchSpace
from tune_ego.space_io import parse_space

if TYPE_CHECKING:
    import pyarrow as pa

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


def read_metrics(run: str, *, whole: bool = True) -> list[dict[str, Any]]:
    """Return the lines of a run's `metrics.jsonl`; an empty list if nothing is logged yet.

    Raises `UserError` for a damaged line. With `whole=False` the lines before the first damaged one are returned.
    """
    uri = storage.join(run, METRICS_FILE)
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(storage.read_bytes(uri).splitlines() if storage.exists(uri) else (), start=1):
        try:
            line = storage.parse_json(text)
            _check_metrics(line, lines[-1]["iteration"] if lines else 0)
        except ValueError as error:
            if whole:
                raise UserError(f"{uri}: damaged: line {number}: {error}") from error
            break
        lines.append(line)
    return lines


_MOST_ITERATIONS = 10**9


def _check_metrics(line: Any, before: int) -> None:
    """Raise `ValueError` where a line of metrics is not such as a run writes after iteration `before`."""
    iteration = line.get("iteration") if isinstance(line, dict) else None
    if not isinstance(iteration, int) or isinstance(iteration, bool) or iteration > _MOST_ITERATIONS:
        raise ValueError("no iteration")
    if iteration <= before:
        raise ValueError(f"iteration {iteration} comes after {before}")
    for key, value in line.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST_METRIC
        if not number or (key == METRIC and not 0 <= value <= 1):
            raise ValueError(f"{key} is {value!r:.40}")


_LARGEST_METRIC = 1e30


def write_metrics(run: str, lines: list[dict[str, Any]]) -> None:
    """Replace a run's `metrics.jsonl`."""
    storage.write_text(storage.join(run, METRICS_FILE), "".join(json.dumps(line) + "\n" for line in lines))


def note_version(record: dict[str, Any]) -> dict[str, Any]:
    """Return the record of a search or run with this version: as `version` at its start, then in `resumed_with`."""
    versions = [record.get("version", __version__), *record.get("resumed_with", [])]
    later = [*versions, __version__] if versions[-1] != __version__ else versions
    return {**record, "version": later[0], **({"resumed_with": later[1:]} if later[1:] else {})}


def describe_versions(record: dict[str, Any]) -> str:
    """Return the versions of tune_ego that ran a search or run, as text; "" where all of it ran with this version."""
    versions = [str(record.get("version", "")), *map(str, record.get("resumed_with", []))]
    if versions in ([__version__], [""]):
        return ""
    return f"tune_ego {', then '.join(versions)}; this is {__version__}"


class Failure(NamedTuple):
    """A failure of a run after which Ray should not retry."""

    reason: str
    final: bool
    """Whether `resume` cannot help either: a loss was not finite."""


def read_failure(run: str) -> Failure | None:
    """Return the recorded failure of a run, or None. A damaged record is none, and a printed line says so."""
    record = _read_record(storage.join(run, FAILURE_FILE), _FailureRecord)
    return None if record is None else Failure(**record)


def write_failure(run: str, failure: Failure) -> None:
    """Record the failure of a run."""
    storage.write_json(storage.join(run, FAILURE_FILE), failure._asdict())


def read_run_record(run: str) -> dict[str, Any] | None:
    """Return the content of a run's `run.json`, or None. A damaged one is none, and a printed line says so."""
    return _read_record(storage.join(run, RUN_FILE), _RunRecord)


class _FailureRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    reason: str
    final: bool


class _RunRecord(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")
    data: str
    data_fingerprint: str = ""
    version: str = ""
    resumed_with: tuple[str, ...] = Field((), strict=False)


def _read_record(uri: str, model: type[BaseModel]) -> dict[str, Any] | None:
    """Return the content of a JSON file that fits a model, without the model's defaults; else None."""
    if not storage.exists(uri):
        return None
    try:
        return model.model_validate(storage.read_json(uri)).model_dump(mode="json", exclude_unset=True)
    except (UserError, ValidationError):
        say_once(f"{uri}: damaged, and ignored")
        return None


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
    decisions: list[Decision] = field(default_factory=list)
    """Decisions of the scheduler about it, in their order."""

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
    """Trials whose records are valid."""
    damaged: dict[str, str] = field(default_factory=dict)
    """Name of a trial with damaged records -> what is damaged."""
    alive: bool = False
    """Whether a driver runs the search now."""

    @cached_property
    def space(self) -> SearchSpace:
        """The search space, with the overrides and the number of samples of `spec`."""
        spec = self.spec
        space = parse_space(spec["space"], spec["space_source"], spec["overrides"], check=False)
        return replace(space, samples=spec["samples"])

    @property
    def decisions(self) -> list[Decision]:
        """Decisions of the scheduler about all trials, in their order."""
        return sorted(decision for trial in self.trials for decision in trial.decisions)

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
        """Return one row for each trial, in the order of the trials.

        Columns: `trial` (id), `state`, `iteration` (the last one in its metrics), `val_mean_class_accuracy` (its best,
        in [0, 1], null before the first validation), `best_iteration`, `seed`, `run` (folder or URI), and one for each
        searched key, named by the key. A searched key whose values have no common type is a column of strings.
        """
        import pyarrow as pa  # not needed elsewhere in this file

        columns: dict[str, list[Any]] = {
            "trial": [trial.id for trial in self.trials],
            "state": [trial.state for trial in self.trials],
            "iteration": [trial.iteration for trial in self.trials],
            METRIC: [trial.accuracy for trial in self.trials],
            "best_iteration": [trial.best["iteration"] if trial.best else None for trial in self.trials],
            "seed": [trial.config.seed for trial in self.trials],
            "run": [trial.run for trial in self.trials],
        }
        table = pa.table(columns)
        for key in self.space.searched_keys:
            if key not in columns:
                values = [_plain_value(trial.config, key) for trial in self.trials]
                try:
                    column = pa.array(values)
                except (pa.ArrowInvalid, pa.ArrowTypeError):  # no common type
                    column = pa.array([None if value is None else str(value) for value in values])
                table = table.append_column(key, column)
        return table

    def to_pandas(self) -> Any:
        """Return the rows of `to_arrow` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()


def _plain_value(config: Any, key: str) -> Any:
    """Return the value of a dotted key; None where the configuration has no such key (Ranger has no momentum)."""
    for part in key.split("."):
        config = getattr(config, part, None)
    return list(config) if isinstance(config, tuple) else config


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
