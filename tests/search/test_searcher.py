"""Drawing configurations, and the record of them; no Ray is started."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import optuna
import pytest
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial

from tests.config.test_search_space import BRANCHED, literal_draw
from tests.specs import search_spec
from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.results import experiment
from tune_ego.results.experiment import METRIC, Trial
from tune_ego.results.trial_records import TrialRecords
from tune_ego.search.searcher import TrialSource, draw_by_tpe, import_optuna, parameters
from tune_ego.search_space import SearchSpace
from tune_ego.space_io import parse_space

DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "optimizer.name@0": CategoricalDistribution((0, 1)),
    "optimizer.lr@0": FloatDistribution(1e-3, 1.0, log=True),
    "optimizer.lr@1": FloatDistribution(1e-5, 1e-2, log=True),
    "model.stam_depth@0": IntDistribution(1, 3),
    "model.dropout@0": FloatDistribution(0.1, 0.9),
}
"""Optuna's view of `BRANCHED`: a choice by the places of its values, the upper end of whole numbers included."""

PINNED_FIRST: dict[str, Any] = {
    "optimizer.name@0": "ranger",
    "optimizer.lr@1": 0.0007478518075796107,
    "model.stam_depth@0": 3,
    "model.dropout@0": 0.2570394239497128,
}
"""The first draw of seed 0: Optuna 5.0, numpy 2.4."""
PINNED_LAST: dict[str, Any] = {
    "optimizer.name@0": "ranger",
    "optimizer.lr@1": 1.3148305626103525e-05,
    "model.stam_depth@0": 1,
    "model.dropout@0": 0.767406861311477,
}
"""The draw of seed 0 after the whole of `HISTORY`."""

Repeat = tuple[str, dict[int, float]]
"""State; iteration -> accuracy of its validations."""


class Before(NamedTuple):
    """A configuration that was drawn before, and Optuna's view of it."""

    optimizer: str
    rate: float
    depth: int
    dropout: float
    repeats: list[Repeat]
    state: TrialState
    value: float | None = None
    intermediate: dict[int, float] = {}  # noqa: RUF012 (never changed)

    @property
    def branch(self) -> int:
        return ("sgd", "ranger").index(self.optimizer)


def finished(number: int) -> Before:
    """One of a row of better and better configurations; the mean of n / 16 and n / 8 is 3 n / 32."""
    repeats = [("finished", {100: number / 16}), ("finished", {100: number / 8})]
    rate, depth, dropout = 1e-4 * 2**number, 1 + number % 3, 0.1 + number / 10
    return Before("ranger", rate, depth, dropout, repeats, TrialState.COMPLETE, 3 * number / 32)


HISTORY = [
    # Both finished: the mean of their best, not of their last.
    Before(
        *("sgd", 0.1, 1, 0.5, [("finished", {50: 0.5, 100: 0.25}), ("finished", {100: 0.75})]),
        *(TrialState.COMPLETE, 0.625),
    ),
    # One was stopped: at the iteration that both have reached, the mean of their best.
    Before(
        *("ranger", 1e-3, 2, 0.4, [("finished", {100: 0.5}), ("stopped", {50: 0.25})]),
        *(TrialState.PRUNED, None, {50: 0.375}),
    ),
    # One failed before its first validation: only the other has an accuracy.
    Before(
        *("ranger", 5e-3, 3, 0.3, [("failed", {}), ("finished", {100: 0.5})]),
        *(TrialState.PRUNED, None, {0: 0.5}),
    ),
    # Both failed before it.
    Before("sgd", 0.9, 3, 0.2, [("failed", {}), ("failed", {})], TrialState.PRUNED),
    # One runs, waits, was interrupted, or is not on record yet.
    Before("ranger", 2e-3, 2, 0.2, [("finished", {100: 0.9}), ("running", {50: 0.9})], TrialState.RUNNING),
    Before("sgd", 0.02, 2, 0.6, [("stopped", {50: 0.2}), ("pending", {})], TrialState.RUNNING),
    Before("sgd", 0.03, 2, 0.7, [("interrupted", {50: 0.2}), ("finished", {100: 0.3})], TrialState.RUNNING),
    Before("ranger", 4e-3, 1, 0.25, [("finished", {100: 0.875})], TrialState.RUNNING),
    *(finished(number) for number in range(7)),
]


def tpe_space() -> SearchSpace:
    return parse_space(BRANCHED + "searcher: tpe\nrepeats: 2", "")


def trials(space: SearchSpace) -> list[Trial]:
    """The trials of `HISTORY`, the last first: their order on record must not matter."""
    made = []
    for number, before in enumerate(HISTORY):
        sampled = {
            "optimizer.name@0": before.optimizer,
            f"optimizer.lr@{before.branch}": before.rate,
            "model.stam_depth@0": before.depth,
            "model.dropout@0": before.dropout,
        }
        for repeat, (state, validations) in enumerate(before.repeats):
            lines = [{"iteration": iteration, METRIC: accuracy} for iteration, accuracy in validations.items()]
            made.append(Trial(f"{number:05d}-{repeat}", state, "", sampled, repeat, space.config(sampled), lines))
    return made[::-1]


def literal_history() -> list[FrozenTrial]:
    made = []
    for before in HISTORY:
        parameters = {
            "optimizer.name@0": before.branch,
            f"optimizer.lr@{before.branch}": before.rate,
            "model.stam_depth@0": before.depth,
            "model.dropout@0": before.dropout,
        }
        made.append(
            create_trial(
                state=before.state,
                value=before.value,
                params=parameters,
                distributions={key: DISTRIBUTIONS[key] for key in parameters},
                intermediate_values=before.intermediate,
            )
        )
    return made


def literal_tpe(seed: int, number: int) -> dict[str, Any]:
    """Configuration `number` of `BRANCHED`, by Optuna alone."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0]),
            multivariate=True,
            group=True,
            constant_liar=True,
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for before in literal_history()[:number]:
        study.add_trial(before)
    trial = study.ask()
    branch = trial.suggest_categorical("optimizer.name@0", (0, 1))
    low, high = ((1e-3, 1.0), (1e-5, 1e-2))[branch]
    return {
        "optimizer.name@0": ("sgd", "ranger")[branch],
        f"optimizer.lr@{branch}": trial.suggest_float(f"optimizer.lr@{branch}", low, high, log=True),
        "model.stam_depth@0": trial.suggest_int("model.stam_depth@0", 1, 3),
        "model.dropout@0": trial.suggest_float("model.dropout@0", 0.1, 0.9),
    }


@pytest.mark.parametrize("seed", [0, 3, 4])
def test_tpe_draws_as_optuna_does_from_the_configurations_before(seed: int) -> None:
    space = tpe_space()
    record = trials(space)
    for number in (0, 1, 9, 12, 13, 14, 15):
        drawn, literal = draw_by_tpe(space, seed, number, record), literal_tpe(seed, number)
        assert list(drawn.items()) == list(literal.items())


def test_the_values_that_tpe_draws() -> None:
    space = tpe_space()
    first, last = draw_by_tpe(space, 0, 0, []), draw_by_tpe(space, 0, 15, trials(space))
    for drawn, pinned in ((first, PINNED_FIRST), (last, PINNED_LAST)):
        assert list(drawn) == list(pinned)
        assert all(value == pinned[name] or math.isclose(value, pinned[name]) for name, value in drawn.items())


def test_optuna_gets_each_configuration_as_it_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    studies = []
    make = optuna.create_study

    def create(**settings: Any) -> optuna.Study:
        assert settings["direction"] == "maximize"
        studies.append(make(**settings))
        return studies[-1]

    monkeypatch.setattr(optuna, "create_study", create)
    space = tpe_space()
    draw_by_tpe(space, 0, 13, trials(space))

    def rows(given: list[FrozenTrial]) -> list[tuple[Any, ...]]:
        return [
            (trial.state, trial.values, trial.intermediate_values, trial.params, trial.distributions) for trial in given
        ]

    (study,) = studies
    assert rows(study.trials[:13]) == rows(literal_history()[:13])
    assert [trial.state for trial in study.trials[13:]] == [TrialState.RUNNING]  # the new one


def test_a_draw_in_optuna_s_terms() -> None:
    text = """
space:
  optimizer.betas: {choice: [[0.9, 0.99], [0.95, 0.999]]}
  model.stam_depth: {grid: [3, 1, 2]}
  seed: {randint: [5, 9]}
  loss.gaze_weight: {uniform: [0.25, 0.5]}
  optimizer.lr: {loguniform: [0.25, 0.5]}
"""
    drawn = {
        "optimizer.betas@0": (0.95, 0.999),
        "model.stam_depth@0": 1,
        "seed@0": 8,
        "loss.gaze_weight@0": 0.3,
        "optimizer.lr@0": 0.4,
    }
    values = {**drawn, "optimizer.betas@0": 1, "model.stam_depth@0": 1}
    distributions = {
        "optimizer.betas@0": CategoricalDistribution((0, 1)),
        "model.stam_depth@0": CategoricalDistribution((0, 1, 2)),
        "seed@0": IntDistribution(5, 8),
        "loss.gaze_weight@0": FloatDistribution(0.25, 0.5),
        "optimizer.lr@0": FloatDistribution(0.25, 0.5, log=True),
    }
    space = parse_space(text, "")
    assert parameters(space, drawn) == (values, distributions)
    assert parameters(space, {"optimizer.betas@0": [0.9, 0.99]})[0] == {"optimizer.betas@0": 0}  # as from a JSON file


def test_tpe_without_optuna_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError) as caught:
        import_optuna()
    assert str(caught.value) == "searcher: tpe needs Optuna: pip install 'tune_ego[optuna]'"


def test_optuna_does_not_print_each_trial() -> None:
    optuna.logging.set_verbosity(optuna.logging.INFO)
    assert import_optuna() is optuna and optuna.logging.get_verbosity() == optuna.logging.WARNING


def source(space: SearchSpace, root: Path, at_a_time: int = 100, interrupted: bool = False) -> TrialSource:
    return TrialSource(str(root), space, 0, TrialRecords(str(root)), at_a_time, lambda: interrupted)


def drain(trials: TrialSource) -> list[Any]:
    suggestions: list[Any] = []
    while isinstance(suggested := trials.suggest(f"t{len(suggestions)}"), dict):
        suggestions.append(suggested)
    assert suggested == "FINISHED"
    return suggestions


def literal_trials(configurations: int) -> list[dict[str, Any]]:
    """Two repeats of each configuration of `BRANCHED` with seed 0."""
    return [
        {"trial": f"{n:05d}-{repeat}", "repeat": repeat, "sampled": literal_draw(0, n)}
        for n in range(configurations)
        for repeat in (0, 1)
    ]


def test_what_has_ended_is_not_given_again_and_more_samples_change_nothing_drawn(tmp_path: Path) -> None:
    space = parse_space(BRANCHED.replace("60", "4") + "repeats: 2", "")
    first = source(space, tmp_path)
    assert first.left == 8
    written = storage.read_json(tmp_path / "trials.json")
    assert written == {
        trial["trial"]: {"state": "pending", "reason": "", "repeat": trial["repeat"], "sampled": trial["sampled"]}
        for trial in literal_trials(4)
    }
    assert drain(first) == literal_trials(4)
    records = TrialRecords(str(tmp_path))
    for place, state in enumerate(["finished", "stopped", "failed", "running", "interrupted"]):
        records.note(literal_trials(4)[place]["trial"], state)
    again = source(space, tmp_path)
    assert again.left == 5 and drain(again) == literal_trials(4)[3:]

    larger = parse_space(BRANCHED.replace("60", "6") + "repeats: 2", "")
    more = source(larger, tmp_path)
    assert more.left == 9 and drain(more) == literal_trials(6)[3:]
    assert list(storage.read_json(tmp_path / "trials.json")) == [trial["trial"] for trial in literal_trials(6)]


def test_a_repeat_that_is_not_on_record_is_added_alone(tmp_path: Path) -> None:
    """The driver died between two writes."""
    space = parse_space(BRANCHED.replace("60", "2") + "repeats: 2", "")
    records = TrialRecords(str(tmp_path))
    records.add(literal_trials(1)[:1])
    records.note("00000-0", "finished")
    again = source(space, tmp_path)
    assert again.left == 3 and drain(again) == literal_trials(2)[1:]


def test_tpe_draws_a_configuration_when_it_is_needed_and_from_the_records_on_disk(tmp_path: Path) -> None:
    text = BRANCHED.replace("60", "3") + "searcher: tpe\nrepeats: 2"
    storage.write_json(tmp_path / experiment.EXPERIMENT_FILE, search_spec(text))
    trials = source(parse_space(text, ""), tmp_path)
    assert trials.left == 6 and not (tmp_path / "trials.json").exists()
    first, second, third = (trials.suggest(name) for name in "abc")
    assert first == {"trial": "00000-0", "repeat": 0, "sampled": literal_tpe(0, 0)}
    assert second == {"trial": "00000-1", "repeat": 1, "sampled": literal_tpe(0, 0)}
    assert list(storage.read_json(tmp_path / "trials.json")) == ["00000-0", "00000-1", "00001-0", "00001-1"]
    # At random, as are the first ten: what the one before is worth makes no difference yet.
    assert third == {"trial": "00001-0", "repeat": 0, "sampled": literal_tpe(0, 1)}
    again = source(parse_space(text, ""), tmp_path)
    assert again.left == 6 and [trial["trial"] for trial in drain(again)] == [
        f"0000{n}-{r}" for n in "012" for r in "01"
    ]


def test_no_more_trials_at_a_time_than_allowed_and_none_after_an_interruption(tmp_path: Path) -> None:
    space = parse_space(BRANCHED, "")
    trials = source(space, tmp_path, at_a_time=2)
    assert [trials.suggest(name)["trial"] for name in "ab"] == ["00000", "00001"]  # type: ignore[index]
    assert trials.suggest("c") is None
    trials.on_trial_complete("a", error=True)
    assert trials.suggest("c")["trial"] == "00002"  # type: ignore[index]
    assert trials.suggest("d") is None
    trials.on_trial_complete("never given")
    assert trials.suggest("d") is None
    assert source(space, tmp_path, interrupted=True).suggest("a") == "FINISHED"


def test_a_search_of_very_many_trials_starts_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It draws some trials ahead, and the others when they are needed."""
    monkeypatch.setattr("tune_ego.search.searcher._DRAWN_AHEAD", 3)
    space = parse_space(BRANCHED.replace("60", "1000000000"), "")
    trials = source(space, tmp_path)
    assert trials.left == 10**9 and list(TrialRecords(str(tmp_path))) == ["00000", "00001", "00002"]
    names = [trials.suggest(f"t{n}")["trial"] for n in range(5)]  # type: ignore[index]
    assert names == ["00000", "00001", "00002", "00003", "00004"]
