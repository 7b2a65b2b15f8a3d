"""Numbers of early stopping: the rungs, the stopped trials and the iterations saved."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from tune_ego.results.decisions import Decision
from tune_ego.results.experiment import Experiment

_STOP = "STOP"  # Ray Tune's name of the action, as in decisions.json


def stopping_numbers(search: Experiment) -> dict[str, Any]:
    """Return the number of trials that reached, and were stopped at, each rung, and the iterations spent and saved.

    Iterations are summed over the trials that finished or were stopped early. Failed, running and interrupted trials
    are not counted.
    """
    settings = search.space.scheduler
    ended = [trial for trial in search.trials if trial.state in ("finished", "stopped")]
    budget = search.trials[0].config.train.iterations if search.trials else 0
    steps = settings.rungs(budget)
    reported: dict[int, set[str]] = {rung: set() for rung in steps}
    for decision in search.decisions:
        for rung in steps[: bisect_right(steps, decision.iteration)]:
            reported[rung].add(decision.trial)
    stops = [decision for decision in search.decisions if decision.action == _STOP]
    stopped = [_stop(decision, steps) for decision in stops]
    full, spent = budget * len(ended), sum(trial.iteration for trial in ended)
    return {
        "scheduler": settings.name,
        "grace": settings.grace,
        "reduction": settings.reduction if settings.name == "asha" else None,
        "budget_iterations": budget,
        "rungs": [
            {
                "iterations": rung,
                "reported": len(reported[rung]),
                "stopped": sum(stop["rung"] == rung for stop in stopped),
                "went_on": len(reported[rung]) - sum(stop["rung"] == rung for stop in stopped),
            }
            for rung in steps
        ],
        "stopped": stopped,
        "trials_counted": len(ended),
        "spent_iterations": spent,
        "full_iterations": full,
        "saved_iterations": full - spent,
        "saved_share": (full - spent) / full if full else None,
    }


def _stop(decision: Decision, steps: list[int]) -> dict[str, Any]:
    """Return the row of a stopped trial; `rung` is the last rung that it had reached."""
    place = bisect_right(steps, decision.iteration)
    return {
        "trial": decision.trial,
        "iteration": decision.iteration,
        "accuracy": decision.accuracy,
        "rung": steps[place - 1] if place else None,
    }
