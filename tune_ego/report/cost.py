"""Cost of a search, from the lines that its trials logged. Apart from numbers.py, which is long."""

from __future__ import annotations

from typing import Any

from tune_ego.results.experiment import REPORT_SECONDS, VALIDATION_SECONDS, Experiment, Trial


def trial_seconds(trial: Trial) -> float:
    """Return the seconds that a trial spent in training, validation and reporting.

    Training time is the number of clips divided by the logged clips/s. The start of a trial is not in the log, nor are
    iterations that were repeated after an interruption.
    """
    seconds, before, batch = 0.0, 0, trial.config.train.batch_size
    for line in trial.metrics:
        speed = line.get("clips_per_second", 0.0)
        seconds += (line["iteration"] - before) * batch / speed if speed > 0 else 0.0
        seconds += line.get(VALIDATION_SECONDS, 0.0) + line.get(REPORT_SECONDS, 0.0)
        before = line["iteration"]
    return seconds


def cost_numbers(search: Experiment) -> dict[str, Any]:
    """Return the hours of all trials, multiplied by their GPUs or, without GPUs, by their workers."""
    gpus = float(search.spec.get("gpus_per_worker", 0.0))
    workers = search.trials[0].config.compute.most_workers if search.trials else 1
    hours = [trial_seconds(trial) / 3600 for trial in search.trials]
    speeds = [
        line["clips_per_second"] for trial in search.trials for line in trial.metrics[1:] if "clips_per_second" in line
    ]
    started = [hour for hour in hours if hour > 0]
    return {
        "gpus_per_trial": gpus * workers,
        "workers_per_trial": workers,
        "trial_hours": sum(hours),
        "gpu_hours": sum(hours) * gpus * workers if gpus else None,
        "worker_hours": sum(hours) * workers,
        "mean_trial_hours": sum(started) / len(started) if started else None,
        "longest_trial_hours": max(started, default=None),
        "median_clips_per_second": sorted(speeds)[len(speeds) // 2] if speeds else None,
    }
