"""Early stopping of trials: Ray Tune's schedulers, with their decisions recorded on disk."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tune_ego.results.decisions import Decision, read_decisions, write_decisions
from tune_ego.results.experiment import METRIC
from tune_ego.search_space import SearchSpace

STOP = TrialScheduler.STOP


class _StandInTrial:
    """Stand-in for Ray's trial: the part that its schedulers read. It is the same after the driver was restarted."""

    def __init__(self, trial_id: str) -> None:
        self.trial_id = trial_id


class _StandInController:
    """Stand-in for Tune's controller: the part that the median rule reads. No trial is paused."""

    @staticmethod
    def get_live_trials() -> list[Any]:
        return []


class RecordedScheduler(FIFOScheduler):  # type: ignore[misc]
    """A scheduler of Ray whose state survives the driver. (Ray itself restores a search with empty rungs.)

    The state is rebuilt from the recorded reports. A resumed run reports its earlier validations again and gets the
    recorded decisions. No trial is stopped at its last iteration, where it ends anyway.
    """

    def __init__(self, root: str, space: SearchSpace, budget: int) -> None:
        super().__init__()
        self._root, self._budget = root, budget
        self._scheduler = _scheduler_of_ray(space, budget)
        self._trials: dict[str, _StandInTrial] = {}
        self._decisions: dict[str, list[Decision]] = {}
        """Trial -> its decisions, in order."""
        self._count = 0

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        done = self._scheduler.set_search_properties(metric, mode, **spec)
        for decision in read_decisions(self._root):
            self._decide(decision.trial, decision.iteration, decision.accuracy, decision.action)
        return bool(done)

    def _decide(self, trial: str, iteration: int, accuracy: float, recorded: str | None = None) -> str:
        if trial not in self._trials:
            self._trials[trial] = _StandInTrial(trial)
            self._scheduler.on_trial_add(None, self._trials[trial])
        result = {"iteration": iteration, METRIC: accuracy}
        action = TrialScheduler.CONTINUE if recorded is None and iteration >= self._budget else recorded
        if action is not None and isinstance(self._scheduler, MedianStoppingRule):
            # `on_trial_complete` only records the report. `on_trial_result` may decide to stop the trial, and raises an
            # AssertionError at its next report: a finished trial reports again when the budget is raised.
            self._scheduler.on_trial_complete(None, self._trials[trial], result)
        else:
            decision = str(self._scheduler.on_trial_result(_StandInController, self._trials[trial], result))
            action = decision if action is None else action
        self._decisions.setdefault(trial, []).append(Decision(self._count, trial, iteration, accuracy, action))
        self._count += 1
        return action

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        name, iteration = trial.config["trial"], result["iteration"]
        for decision in self._decisions.get(name, []):
            if decision.iteration == iteration:
                return decision.action
        action = self._decide(name, iteration, result[METRIC])
        write_decisions(self._root, name, self._decisions[name])
        return action


def _scheduler_of_ray(space: SearchSpace, budget: int) -> TrialScheduler:
    settings = space.scheduler
    match settings.name:
        case "asha":
            return AsyncHyperBandScheduler(
                time_attr="iteration",
                max_t=budget,
                grace_period=settings.grace,
                reduction_factor=settings.reduction,
                stop_last_trials=False,
            )
        case "median":
            return MedianStoppingRule(
                time_attr="iteration", grace_period=settings.grace, min_samples_required=settings.least_trials
            )
        case "fifo":
            return FIFOScheduler()
        case unknown:
            raise ValueError(f"no scheduler {unknown!r}")
