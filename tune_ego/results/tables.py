"""Tables of trials and configurations as rows of text, for `status`, `tune`, the report and the demo."""

from __future__ import annotations

from typing import Any

from tune_ego.config import Config
from tune_ego.results.experiment import Configuration, Experiment, Trial, by_configuration


def config_value(config: Config, key: str) -> str:
    """Return a dotted key's value as text; `-` where the configuration has no such key."""
    node: Any = config
    for part in key.split("."):
        node = getattr(node, part, None)
    if isinstance(node, float):
        return f"{node:.4g}"
    return "-" if node is None else str(node)


def trial_table(experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """Return (column names, rows) of the trials, best first."""
    keys = experiment.space.searched_keys
    columns = ["trial", "state", "iterations", "best val. mean class acc.", *keys]
    rows = []
    for trial in sorted(experiment.trials, key=_accuracy, reverse=True):
        accuracy = "-" if trial.accuracy is None else f"{100 * trial.accuracy:.1f} %"
        state = f"{trial.state}: {trial.reason}" if trial.reason else trial.state
        rows.append(
            [trial.id, state, str(trial.iteration), accuracy, *(config_value(trial.config, key) for key in keys)]
        )
    return columns, rows


def configuration_table(experiment: Experiment) -> tuple[list[str], list[list[str]]]:
    """Return (column names, rows) of the configurations with mean and spread of their repeats, best first."""
    keys = experiment.space.searched_keys
    columns = ["configuration", "repeats validated", "mean of best val. mean class acc.", "standard deviation", *keys]
    rows = []
    for configuration in sorted(by_configuration(experiment.trials), key=_accuracy, reverse=True):
        mean = "-" if configuration.accuracy is None else f"{100 * configuration.accuracy:.1f} %"
        spread = "-" if configuration.spread is None else f"{100 * configuration.spread:.1f} points"
        values = [config_value(configuration.config, key) for key in keys]
        rows.append([configuration.id, str(len(configuration.accuracies)), mean, spread, *values])
    return columns, rows


def _accuracy(validated: Trial | Configuration) -> float:
    return -1 if validated.accuracy is None else validated.accuracy
