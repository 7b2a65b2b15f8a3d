"""`export`: write the complete best configuration of a search, with its provenance."""

from __future__ import annotations

from typing import Any

import yaml

from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.config_optimizers import CosineConfig, FlatCosineConfig
from tune_ego.results.experiment import METRIC, Configuration, Experiment
from tune_ego.results.reading import read_experiment, say_damaged

FINAL_ITERATIONS = 3000
"""Iterations of a final run (the paper), unless `train` gets another number."""


def export_best(root: str, out: str) -> Configuration:
    """Write the best configuration, resolved, and its provenance to the YAML file `out`.

    Repeats over seeds count by their mean. The budget becomes the final run's. Raises `UserError` where no trial has
    been validated yet.
    """
    search = read_experiment(root)
    best = search.best
    say_damaged(search)
    content: dict[str, Any] = _final(best.config).model_dump(mode="json")
    content["provenance"] = _provenance(search, best)
    header = (
        f"# The best of {len(search.trials)} trials of {search.root}.\n"
        "# Train it: tune-ego train THIS --data SHARDS --storage DIR --name NAME\n"
    )
    storage.write_text(out, header + yaml.safe_dump(content, sort_keys=False))
    return best


def _final(config: Config) -> Config:
    """Return the configuration with the final run's budget, to which a shorter schedule horizon is raised."""
    changes: dict[str, Any] = {"train.iterations": FINAL_ITERATIONS}
    if config.horizon < FINAL_ITERATIONS and isinstance(config.schedule, (CosineConfig, FlatCosineConfig)):
        changes["schedule.horizon"] = None
    return override_config(config, changes, "export")


def _provenance(search: Experiment, best: Configuration) -> dict[str, Any]:
    repeats = [
        {"trial": trial.id, METRIC: line[METRIC], "at_iteration": line["iteration"], "seed": trial.config.seed}
        for trial in best.trials
        if (line := trial.best) is not None
    ]
    config = best.config
    return {
        "experiment": search.root,
        "trial": best.id,
        METRIC: best.accuracy,
        **({"standard_deviation": best.spread} if best.spread is not None else {}),
        "repeats": repeats,
        "trial_iterations": config.train.iterations,
        "validation": f"{config.data.validation} fold {config.data.fold} of split {config.data.split}",
        "failed": {trial.id: trial.reason for trial in search.trials if trial.state == "failed"},
        "trials": {
            state: sum(trial.state == state for trial in search.trials) for state in {t.state for t in search.trials}
        },
        "data": search.spec["data"],
        "search_seed": search.spec["seed"],
        "searched_with": f"tune_ego {search.spec['version']}, ray {search.spec['ray']}",
        "exported_with": f"tune_ego {__version__}",
    }
