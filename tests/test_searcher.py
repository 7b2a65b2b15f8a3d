"""Drawing configurations, and the record of them; no Ray is started."""

from __future__ import annotations

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from tune_ego.experiment import METRIC, Trial, TrialRecords, read_records
from tune_ego.search_space import SearchSpace, parse_space
from tune_ego.searcher import TrialSource, draw_by_tpe

SPACE = """
space:
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.lr:
    - {when: {optimizer.name: sgd}, loguniform: [1e-3, 1.0]}
    - {when: {optimizer.name: ranger}, loguniform: [1e-5, 1e-2]}
  model.stam_depth: {randint: [1, 4]}
  model.dropout: {uniform: [0.1, 0.9]}
samples: 60
"""


def ended(space: SearchSpace, number: int, sampled: dict[str, Any], accuracy: float, state: str = "finished") -> Trial:
    metrics = [{"iteration": 100, METRIC: accuracy}] if state != "failed" else []
    return Trial(f"{number:05d}", state, "", sampled, 0, space.config(sampled), metrics)


def quality(space: SearchSpace, sampled: dict[str, Any]) -> float:
    """Highest for ranger with a rate near its upper end and little dropout."""
    config = space.config(sampled)
    return (config.optimizer.name == "ranger") / 2 + config.optimizer.lr / 0.02 * 0.3 - config.model.dropout / 5


def test_tpe_learns_and_takes_one_branch_alone() -> None:
    space = parse_space(SPACE + "searcher: tpe", "")
    trials: list[Trial] = []
    for number in range(60):
        sampled = draw_by_tpe(space, 0, number, trials)
        branch = 0 if sampled["optimizer.name@0"] == "sgd" else 1
        rates = [name for name in sampled if name.startswith("optimizer.lr")]
        assert rates == [f"optimizer.lr@{branch}"]
        low, high = ((1e-3, 1.0), (1e-5, 1e-2))[branch]
        assert low <= sampled[rates[0]] <= high and sampled["model.stam_depth@0"] in (1, 2, 3)
        state = "finished" if number % 3 else ("stopped" if number % 2 else "failed")
        trials.append(ended(space, number, sampled, quality(space, sampled), state))
    learnt = mean(quality(space, trial.sampled) for trial in trials[-20:])
    at_random = mean(quality(space, space.draw(0, number)) for number in range(200))
    assert learnt > at_random + 0.2


def test_tpe_draws_the_same_from_the_same_record() -> None:
    space = parse_space(SPACE + "searcher: tpe", "")
    trials: list[Trial] = []
    for number in range(15):
        sampled = draw_by_tpe(space, 3, number, trials)
        trials.append(ended(space, number, sampled, quality(space, sampled)))
    for number in (0, 11, 14):  # those that came after do not count
        assert draw_by_tpe(space, 3, number, trials) == trials[number].sampled
    assert draw_by_tpe(space, 4, 0, []) != trials[0].sampled


def source(space: SearchSpace, root: Path, at_a_time: int = 100, interrupted: bool = False) -> TrialSource:
    return TrialSource(str(root), space, 0, TrialRecords(str(root)), at_a_time, lambda: interrupted)


def drain(trials: TrialSource) -> list[Any]:
    found: list[Any] = []
    while isinstance(suggested := trials.suggest(f"t{len(found)}"), dict):
        found.append(suggested)
    assert suggested == "FINISHED"
    return found


def test_what_has_ended_is_not_given_again_and_more_samples_change_nothing_drawn(tmp_path: Path) -> None:
    space = parse_space(SPACE.replace("60", "4") + "repeats: 2", "")
    first = source(space, tmp_path)
    assert first.left == 8
    drawn = drain(first)
    assert [trial["trial"] for trial in drawn] == [f"{n:05d}-{r}" for n in range(4) for r in range(2)]
    assert [trial["sampled"] for trial in drawn[::2]] == [space.draw(0, number) for number in range(4)]
    records = TrialRecords(str(tmp_path))
    for place, state in enumerate(["finished", "stopped", "failed", "running"]):
        records.note(drawn[place]["trial"], state)
    again = source(space, tmp_path)
    assert again.left == 5 and drain(again) == drawn[3:]

    larger = parse_space(SPACE.replace("60", "6") + "repeats: 2", "")
    more = source(larger, tmp_path)
    assert more.left == 9 and drain(more)[:5] == drawn[3:]
    assert {name: record["sampled"] for name, record in read_records(str(tmp_path)).items()} == {
        f"{n:05d}-{r}": larger.draw(0, n) for n in range(6) for r in range(2)
    }


def test_no_more_trials_at_a_time_than_allowed_and_none_after_an_interruption(tmp_path: Path) -> None:
    space = parse_space(SPACE, "")
    trials = source(space, tmp_path, at_a_time=2)
    assert isinstance(trials.suggest("a"), dict) and isinstance(trials.suggest("b"), dict)
    assert trials.suggest("c") is None
    trials.on_trial_complete("a", error=True)
    assert isinstance(trials.suggest("c"), dict) and trials.suggest("d") is None
    assert source(space, tmp_path, interrupted=True).suggest("a") == "FINISHED"


@pytest.mark.parametrize("seed", [0, 1])
def test_a_grid_is_covered_and_ranges_are_drawn_anew_at_each_point(seed: int) -> None:
    text = """
space: {model.stam_depth: {grid: [1, 2, 3]}, optimizer.name: {grid: [sgd, ranger]}, optimizer.lr: {uniform: [0, 1]}}
samples: 2
"""
    space = parse_space(text.replace("[0, 1]", "[0.001, 1]"), "")
    draws = [space.draw(seed, number) for number in range(space.configurations)]
    points = [(draw["model.stam_depth@0"], draw["optimizer.name@0"]) for draw in draws]
    assert points == [(depth, name) for depth in (1, 2, 3) for name in ("sgd", "ranger")] * 2
    assert len({draw["optimizer.lr@0"] for draw in draws}) == 12
