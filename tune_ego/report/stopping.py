"""What the scheduler stopped, where, and what that saved."""

from __future__ import annotations

from bisect import bisect_right
from typing import Any

from tune_ego.report.reading import Found
from tune_ego.results.experiment import Decision
from tune_ego.results.progress import rungs

_STOP = "STOP"  # Ray's word, in decisions.json


def stopping_numbers(found: Found) -> dict[str, Any]:
    """Rungs with how many trials they saw and stopped; iterations spent by the trials that finished or were stopped.

    What failed or still runs is in neither of the sums.
    """
    search = found.experiment
    settings = search.space.scheduler
    ended = [trial for trial in search.trials if trial.state in ("finished", "stopped")]
    budget = search.trials[0].config.train.iterations if search.trials else 0
    steps = rungs(settings, budget)
    reported: dict[int, set[str]] = {rung: set() for rung in steps}
    for decision in found.decisions:
        for rung in steps[: bisect_right(steps, decision.iteration)]:
            reported[rung].add(decision.trial)
    stops = [decision for decision in found.decisions if decision.action == _STOP]
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
    place = bisect_right(steps, decision.iteration)
    return {
        "trial": decision.trial,
        "iteration": decision.iteration,
        "accuracy": decision.accuracy,
        "rung": steps[place - 1] if place else None,
    }
