"""Callbacks of a running search: they keep its record, print its progress and clean up after stopped trials."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import ray
from ray import tune
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from tune_ego import ray_private
from tune_ego.console import console, percent, say
from tune_ego.results import checkpoint_files, driver, experiment, trial_records
from tune_ego.results.decisions import trial_decisions
from tune_ego.results.experiment import METRIC
from tune_ego.results.trial_records import TrialRecords
from tune_ego.runs.placement import placement_group_prefix
from tune_ego.search.scheduler import STOP
from tune_ego.search_space import SearchSpace

_NAMES = {"asha": "ASHA", "median": "the median rule"}
# Seconds.
_RELEASE_AFTER = 3.0
"""Wait between a trial's end and the removal of its placement groups, which Ray Train may do itself."""
_SWEEP_EVERY = 1.0
_CONTROLLERS_END_WITHIN = 30.0
_LAST_SWEEPS = 5


class Watcher(tune.Callback):  # type: ignore[misc]
    """Callback that writes `trials.json`, prints events, and removes what stopped trials leave behind."""

    def __init__(self, root: str, space: SearchSpace, budget: int, records: TrialRecords) -> None:
        self.root, self.space, self.budget, self.records = root, space, budget, records
        self.ended: dict[str, float] = {}
        """Trial -> time of its end, by the monotonic clock."""
        self.cleared: set[str] = set()
        self.next_sweep = 0.0
        self.warned: set[str] = set()

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        self.records.note(name, "running")
        say(f"  {name}: starts")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial.config["trial"]
        if METRIC in result:
            if not console.is_terminal:  # on a terminal the progress table shows it
                accuracy = percent(result[METRIC])
                say(f"  {name}: iteration {result['iteration']}, validation mean class accuracy {accuracy}")
            if name not in self.warned:
                self._warn(name, trial.config)

    def _warn(self, name: str, draw: dict[str, Any]) -> None:
        config = self.space.config(draw["sampled"], draw["repeat"])
        warning = experiment.collapsed_rate(config, experiment.read_metrics(self._run(name)))
        if warning:
            self.warned.add(name)
            say(f"  {name}: {warning}")

    def _run(self, name: str) -> str:
        return trial_records.run_folder(self.root, name)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        failure = experiment.read_failure(self._run(name))
        if failure is not None:
            self._end(name, "failed", f"failed: {failure.reason}", failure.reason)
        elif any(decision.action == STOP for decision in trial_decisions(self.root, name)[-1:]):
            self._end(name, "stopped", f"stopped by {_NAMES[self.space.scheduler.name]}")
        elif self.budget in checkpoint_files.checkpoint_iterations(self._run(name)):
            self._end(name, "finished")
        else:
            self._end(name, "interrupted")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        name = trial.config["trial"]
        say(f"  {name}: failed and is restarted")
        self._sweep([name])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        reason = (str(trial.get_pickled_error() or "").strip() or "died").splitlines()[-1]
        self._end(trial.config["trial"], "failed", f"failed: {reason}", reason)

    def _end(self, name: str, state: str, message: str = "", reason: str = "") -> None:
        self.records.note(name, state, reason)
        say(f"  {name}: {message or state}")
        self.ended[name] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now >= self.next_sweep:
            self.next_sweep = now + _SWEEP_EVERY
            released = [name for name, moment in self.ended.items() if now >= moment + _RELEASE_AFTER]
            self._sweep(released)
            self._remove_checkpoints_of_stopped(set(released) - self.cleared)
            self.cleared |= set(released)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        end = time.monotonic() + _CONTROLLERS_END_WITHIN
        while ray_private.live_controllers() and time.monotonic() < end:
            time.sleep(0.1)
        for _ in range(_LAST_SWEEPS):  # a group that a controller requested just before its end may appear late
            self._sweep(trial.config["trial"] for trial in trials)
            time.sleep(0.2)
        self._remove_checkpoints_of_stopped(self.records)  # also of trials that an earlier driver ran

    def _sweep(self, names: Iterable[str]) -> None:
        """Remove the placement groups of trials that have ended. A live controller may create another."""
        prefixes = tuple(placement_group_prefix(self._run(name)) for name in names)
        for group, record in placement_group_table().items() if prefixes else ():
            if record["state"] != "REMOVED" and record["name"].startswith(prefixes):
                remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))

    def _remove_checkpoints_of_stopped(self, names: Iterable[str]) -> None:
        """Delete the checkpoints of trials that the scheduler stopped: they are never resumed."""
        driver.confirm(self.root)
        for name in names:
            if self.records.state(name) == "stopped" and not self.space.scheduler.keep_stopped:
                checkpoint_files.remove_checkpoints(self._run(name))
