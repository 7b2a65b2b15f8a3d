"""Decisions to stop trials: the published rules over written-out reports, whole and across restarts; no Ray runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest

from tune_ego.results.decisions import Decision, read_decisions
from tune_ego.results.experiment import METRIC
from tune_ego.search.scheduler import RecordedScheduler
from tune_ego.space_io import parse_space

Report = tuple[str, int, float, str]
"""Trial, iteration, accuracy and the action that the rule demands."""
GO, STOP = "CONTINUE", "STOP"


class Case(NamedTuple):
    settings: str
    reports: list[Report]
    budget: int = 40


# Asynchronous successive halving (Li et al., 2018). Rungs lie at grace * reduction^k up to the budget. A report belongs
# to the highest rung that it has reached. Its trial stops where the accuracy is below the (1 - 1/reduction) quantile,
# interpolated linearly, of those that were recorded at this rung before. Then the accuracy is recorded there. Later
# reports of the trial count at higher rungs only. The first trial at a rung goes on.
ASHA = Case(
    "name: asha, grace: 10, reduction: 2",  # rungs at 10, 20 and 40; the median
    [
        ("a", 5, 0.01, GO),  # before the grace
        ("a", 10, 0.50, GO),  # rung 10: the first
        ("b", 10, 0.40, STOP),  # under the median of [0.50] = 0.50
        ("c", 10, 0.45, GO),  # the median of [0.40, 0.50] = 0.45, and not under it
        ("d", 10, 0.44, STOP),  # under that of [0.40, 0.45, 0.50] = 0.45
        ("h", 9, 0.00, GO),  # before the grace: not under anything
        ("c", 15, 0.01, GO),  # between two rungs, and recorded at rung 10 already
        ("e", 15, 0.60, GO),  # rung 10 at 15, as it has not reported before: that of [0.40, 0.44, 0.45, 0.50] = 0.445
        ("a", 20, 0.55, GO),  # rung 20: the first
        ("c", 20, 0.70, GO),  # 0.55
        ("e", 20, 0.60, STOP),  # that of [0.55, 0.70] = 0.625
        ("f", 20, 0.10, STOP),  # straight to rung 20: that of [0.55, 0.60, 0.70] = 0.60
        ("g", 10, 0.46, GO),  # rung 10 has [0.40, 0.44, 0.45, 0.50, 0.60], 0.45; nothing of f
        ("i", 20, 0.80, GO),  # straight to rung 20: that of [0.10, 0.55, 0.60, 0.70] = 0.575
        ("i", 25, 0.01, GO),  # recorded at rung 20, and rung 10 is behind it
        ("c", 40, 0.71, GO),
        ("a", 40, 0.02, GO),  # the worst at the budget: it has finished, and is not stopped
    ],
)
# The same rule, one in four: rungs at 4 and 16, the 75 % quantile.
ASHA_QUARTER = Case(
    "name: asha, grace: 4, reduction: 4",
    [
        ("a", 4, 0.1, GO),
        ("b", 4, 0.2, GO),  # 0.1
        ("c", 4, 0.18, GO),  # [0.1, 0.2]: place 0.75 of 1, 0.175
        ("d", 4, 0.17, STOP),  # [0.1, 0.18, 0.2]: place 1.5 of 2, 0.19
        ("e", 4, 0.184, STOP),  # [0.1, 0.17, 0.18, 0.2]: place 2.25 of 3, 0.18 + 0.25 * 0.02 = 0.185
        ("f", 4, 0.185, GO),  # [0.1, 0.17, 0.18, 0.184, 0.2]: place 3 of 4, 0.184
        ("a", 8, 0.01, GO),  # no rung here, as there would be for one in two
        ("a", 16, 0.3, GO),
        ("b", 16, 0.29, STOP),
    ],
)
# The median stopping rule (Golovin et al., 2017). From the grace on, a trial stops where its best accuracy up to now is
# below the median of the others' running means: over the reports from the grace up to this iteration, of those that
# have got this far. With fewer than `least_trials` others it goes on.
MEDIAN = Case(
    "name: median, grace: 20, least_trials: 2",
    [
        ("a", 10, 0.90, GO),  # before the grace: no part of a's running mean
        ("a", 20, 0.20, GO),  # no others
        ("a", 30, 0.40, GO),
        ("b", 10, 0.01, GO),
        ("b", 20, 0.10, GO),  # one other, and two are needed
        ("b", 30, 0.50, GO),
        ("c", 20, 0.14, STOP),  # a 0.20, b 0.10: their median is 0.15
        ("d", 20, 0.15, GO),  # c too: [0.10, 0.14, 0.20], 0.14
        ("d", 30, 0.29, STOP),  # c has not got this far: a (0.20 + 0.40) / 2 = 0.30, b (0.10 + 0.50) / 2 = 0.30
        ("e", 10, 0.31, GO),
        ("e", 20, 0.01, GO),  # its best, 0.31, counts though it was before the grace
        ("e", 30, 0.01, GO),  # a 0.30, b 0.30, d (0.15 + 0.29) / 2 = 0.22
        ("a", 40, 0.40, GO),
        ("b", 40, 0.40, GO),
        ("f", 40, 0.01, GO),  # at the budget, and the worst
    ],
)
MEDIAN_OF_ONE = Case(
    "name: median, grace: 20, least_trials: 1", [("a", 20, 0.5, GO), ("b", 20, 0.25, STOP), ("c", 20, 0.375, GO)]
)
FIFO = Case("name: fifo", [("a", 10, 0.9, GO), ("b", 10, 0.1, GO), ("c", 10, 0.0, GO), ("c", 40, 0.0, GO)])


def start(root: Path, case: Case) -> RecordedScheduler:
    base = f"base: {{train: {{iterations: {case.budget}, validate_every: 10}}}}"
    scheduler = RecordedScheduler(str(root), parse_space(f"{base}\nscheduler: {{{case.settings}}}", ""), case.budget)
    assert scheduler.set_search_properties(METRIC, "max")
    return scheduler


def report(scheduler: RecordedScheduler, trial: str, iteration: int, accuracy: float) -> str:
    result = {"iteration": iteration, METRIC: accuracy, "training_iteration": 1, "time_total_s": 0.1}
    return str(scheduler.on_trial_result(None, SimpleNamespace(config={"trial": trial}), result))


@pytest.mark.parametrize("restarts", ["no restart", "a restart after each report", "a restart in the middle"])
@pytest.mark.parametrize("case", [ASHA, ASHA_QUARTER, MEDIAN, MEDIAN_OF_ONE, FIFO], ids=lambda case: case.settings)
def test_decisions_are_those_of_the_published_rule(tmp_path: Path, case: Case, restarts: str) -> None:
    scheduler, actions = start(tmp_path, case), []
    for place, (trial, iteration, accuracy, _) in enumerate(case.reports):
        if restarts == "a restart after each report" or (restarts != "no restart" and place == len(case.reports) // 2):
            scheduler = start(tmp_path, case)
        actions.append((trial, iteration, accuracy, report(scheduler, trial, iteration, accuracy)))
    assert actions == case.reports
    recorded = [Decision(order, *line) for order, line in enumerate(case.reports)]
    assert read_decisions(str(tmp_path)) == recorded


def test_a_report_made_again_gets_its_first_answer_and_is_recorded_once(tmp_path: Path) -> None:
    scheduler = start(tmp_path, ASHA)
    actions = [report(scheduler, *line) for line in (("a", 10, 0.5), ("b", 10, 0.4), ("a", 20, 0.5))]
    assert actions == [GO, STOP, GO]
    for restarted in (False, True):
        scheduler = start(tmp_path, ASHA) if restarted else scheduler
        assert [report(scheduler, *line) for line in (("b", 10, 0.9), ("a", 10, 0.0), ("a", 20, 0.0))] == [STOP, GO, GO]
    # Rung 10 holds [0.4, 0.5] as before: 0.45.
    assert report(scheduler, "c", 10, 0.44) == STOP
    assert read_decisions(str(tmp_path)) == [
        Decision(0, "a", 10, 0.5, GO),
        Decision(1, "b", 10, 0.4, STOP),
        Decision(2, "a", 20, 0.5, GO),
        Decision(3, "c", 10, 0.44, STOP),
    ]


def test_a_recorded_action_stands_whatever_the_rule_would_say_now(tmp_path: Path) -> None:
    """A budget that was raised turns the old one into a rung; those that had finished there stay so."""
    scheduler = start(tmp_path, ASHA)
    for line in (("a", 40, 0.5), ("b", 40, 0.4)):
        assert report(scheduler, *line) == GO
    longer = start(tmp_path, ASHA._replace(budget=80))
    assert report(longer, "b", 40, 0.4) == GO
    assert report(longer, "c", 40, 0.4) == STOP  # now a rung below the budget: the median of [0.4, 0.5]


def test_the_median_rule_goes_on_after_the_budget_was_raised(tmp_path: Path) -> None:
    """A trial that was under the median at the old budget had finished there, and is judged again later."""
    lines = [("a", 20, 0.5), ("b", 20, 0.75), ("a", 40, 0.5), ("b", 40, 0.25), ("c", 40, 0.1)]
    scheduler = start(tmp_path, MEDIAN)
    assert [report(scheduler, *line) for line in lines] == [GO] * 5
    longer = start(tmp_path, MEDIAN._replace(budget=80))
    assert [report(longer, "c", 40, 0.1), report(longer, "c", 50, 0.6)] == [GO, GO]  # a, b are not at 50: no others
    assert [report(longer, "a", 60, 0.5), report(longer, "b", 60, 0.5)] == [GO, GO]
    assert report(longer, "c", 60, 0.6) == GO  # the means of a and b are both 0.50
    assert report(longer, "d", 60, 0.42) == STOP  # and that of c is 0.43: their median is 0.50
