"""Repeats, bins of a range, conditions, rungs and thinned curves in a report, from made-up searches of a few lines."""

from __future__ import annotations

from typing import Any

import pytest

from tune_ego.report.cost import cost_numbers, trial_seconds
from tune_ego.report.importance import importance_numbers
from tune_ego.report.numbers import experiment_numbers, last_common_iteration, published_numbers
from tune_ego.report.stopping import stopping_numbers
from tune_ego.results.decisions import Decision
from tune_ego.results.experiment import METRIC, Experiment, Trial

REPEATS = """
base: {train: {iterations: 40, validate_every: 20, batch_size: 10}}
space:
  label: {choice: [plain, bold]}
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.momentum: [{when: {optimizer.name: sgd}, choice: [0.5, 0.9]}]
samples: 2
repeats: 2
scheduler: {name: fifo}
"""
RANGES = """
base: {train: {iterations: 40, validate_every: 20, batch_size: 10}}
space:
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.lr:
    - {when: {optimizer.name: [sgd]}, loguniform: [1e-5, 1.0]}
    - {when: {optimizer.name: [ranger]}, loguniform: [1e-4, 1e-2]}
  schedule.patience: {randint: [1, 200]}
samples: 12
scheduler: {name: median, grace: 20}
"""


def make_search(space: str, trials: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]], **spec: Any) -> Experiment:
    """A search of ended trials: name -> (sampled values, lines of metrics)."""
    content = {"space": space, "space_source": "t", "overrides": {}, "samples": len(trials), "trials": len(trials)}
    content |= {"data": "/nowhere/shards", "data_settings": {}, "version": "0", "ray": "0", "seed": 0}
    search = Experiment("/nowhere/search", {**content, **spec}, [])
    for name, (sampled, lines) in trials.items():
        repeat = int(name.partition("-")[2] or 0)
        config = search.space.config(sampled, repeat)
        search.trials.append(Trial(name, "finished", f"/nowhere/{name}", sampled, repeat, config, lines))
    return search


def validation(iteration: int, accuracy: float, **more: float) -> dict[str, Any]:
    return {"iteration": iteration, "train_loss": 1.0, METRIC: accuracy, **more}


PLAIN = {"label@0": "plain", "optimizer.name@0": "sgd", "optimizer.momentum@0": 0.9}
BOLD = {"label@0": "bold", "optimizer.name@0": "ranger"}


def repeated() -> Experiment:
    """Two configurations of two repeats; of the second, one repeat alone has been validated, and better than all."""
    return make_search(
        REPEATS,
        {
            "00000-0": (PLAIN, [validation(20, 0.5, val_micro_accuracy=0.7), validation(40, 0.4)]),
            "00000-1": (PLAIN, [validation(20, 0.1), validation(40, 0.3, val_micro_accuracy=0.5)]),
            "00001-0": (BOLD, [validation(20, 0.7, val_micro_accuracy=0.9)]),
            "00001-1": (BOLD, [{"iteration": 10, "train_loss": 2.0}]),
        },
    )


def with_decisions(search: Experiment, decisions: list[Decision]) -> Experiment:
    search.trials[0].decisions = decisions
    return search


def test_the_answer_is_the_mean_of_repeats_and_their_spread() -> None:
    """A configuration of which a repeat is missing is not the best, whatever the other repeat reached."""
    numbers = experiment_numbers(repeated(), {"why": "none"}, [])
    assert numbers["answer"] == {
        "configuration": "00000",
        "trials": ["00000-0", "00000-1"],
        "values": [
            {"key": "label", "value": "plain"},
            {"key": "optimizer.name", "value": "sgd"},
            {"key": "optimizer.momentum", "value": "0.9"},
        ],
        "accuracy": pytest.approx(0.4),  # of 0.5 and 0.3
        "spread": pytest.approx(0.1 * 2**0.5),  # squared deviations 0.01 + 0.01, over 1
        "repeats_validated": 2,
        "at_iterations": [20, 40],
        "micro_accuracy": pytest.approx(0.6),  # of 0.7 and 0.5
        "streams": [],
        "all_trials": {  # 0.5, 0.3, 0.7: squared deviations 0.04 + 0.04, over 2
            "validated": 3,
            "mean": pytest.approx(0.5),
            "spread": pytest.approx(0.2),
            "best": 0.7,
            "worst": 0.3,
        },
        "warnings": [],
    }
    assert numbers["curves"]["best"] == ["00000-0", "00000-1"]
    assert [trial["seed"] for trial in numbers["trials"]] == [0, 0, 1, 1]  # 00001-0, 00000-0, 00000-1, 00001-1
    assert numbers["reproduce"]["trial_seeds"] == [0, 1]
    assert numbers["experiment"]["repeats"] == 2
    assert numbers["importance"]["configurations"] == 2


def test_an_answer_is_the_best_configuration_s_streams() -> None:
    """A stream that one repeat did not validate is the mean of the others."""
    lines = [validation(20, 0.5, **{f"{METRIC}_rgb": 0.4}), validation(20, 0.3, **{f"{METRIC}_rgb": 0.2, "x": 1.0})]
    search = make_search(REPEATS, {f"00000-{n}": (PLAIN, [line]) for n, line in enumerate(lines)})
    answer = experiment_numbers(search, {"why": "none"}, [])["answer"]
    assert answer["streams"] == [{"stream": "rgb", "accuracy": pytest.approx(0.3)}]
    assert answer["micro_accuracy"] is None


def test_a_parameter_is_compared_among_the_trials_that_have_it() -> None:
    choices = experiment_numbers(repeated(), {"why": "none"}, [])["choices"]
    assert choices["even_iteration"] == 20
    rows = {
        parameter["key"]: [(row["value"], row["trials"], row["spread"], row["members"]) for row in parameter["values"]]
        for parameter in choices["parameters"]
    }
    spread = pytest.approx(0.1 * 2**0.5)
    assert rows == {
        "label": [("plain", 2, spread, ["00000-0", "00000-1"]), ("bold", 1, None, ["00001-0"])],
        "optimizer.name": [("sgd", 2, spread, ["00000-0", "00000-1"]), ("ranger", 1, None, ["00001-0"])],
        "optimizer.momentum": [("0.9", 2, spread, ["00000-0", "00000-1"])],  # ranger has none
    }
    assert [row["mean_at_even"] for row in choices["parameters"][0]["values"]] == [pytest.approx(0.3), 0.7]


def test_values_stand_in_the_order_of_the_search_space() -> None:
    """Numbers and pairs too; a value that the space does not list, here Ranger's default of 5, comes last."""
    space = """
    space:
      optimizer.name: {choice: [sgd, ranger]}
      optimizer.lr: {choice: [0.5, 0.123456]}
      optimizer.betas: [{when: {optimizer.name: ranger}, choice: [[0.95, 0.999], [0.9, 0.99]]}]
      schedule.patience: [{when: {optimizer.name: sgd}, choice: [7, 6]}]
    """
    ranger = {"optimizer.name@0": "ranger", "optimizer.lr@0": 0.123456}
    sgd = {"optimizer.name@0": "sgd", "optimizer.lr@0": 0.5}
    search = make_search(
        space,
        {
            "0": ({**ranger, "optimizer.betas@0": [0.9, 0.99]}, [validation(20, 0.1)]),
            "1": ({**ranger, "optimizer.betas@0": [0.95, 0.999]}, [validation(20, 0.2)]),
            "2": ({**sgd, "schedule.patience@0": 6}, [validation(20, 0.3)]),
            "3": ({**sgd, "schedule.patience@0": 7}, [validation(20, 0.4)]),
        },
    )
    parameters = experiment_numbers(search, {"why": "none"}, [])["choices"]["parameters"]
    assert {one["key"]: [row["value"] for row in one["values"]] for one in parameters} == {
        "optimizer.name": ["sgd", "ranger"],
        "optimizer.lr": ["0.5", "0.1235"],
        "optimizer.betas": ["(0.95, 0.999)", "(0.9, 0.99)"],
        "schedule.patience": ["7", "6", "5"],
    }


def test_every_labelled_configuration_stands_beside_the_published_results() -> None:
    ours = published_numbers(repeated(), None, {})["ours"]
    on = "validation clips: stratified fold 0 of split 1"
    assert ours == [
        {"model": "trial plain", "micro": pytest.approx(0.6), "mean_class": pytest.approx(0.4), "on": on},
        {"model": "trial bold", "micro": 0.9, "mean_class": 0.7, "on": on},
    ]


def test_validation_clips_are_named_for_each_fold() -> None:
    space = "space: {data.fold: {choice: [3, 2]}, data.validation: {choice: [stratified, by_session]}}\nsamples: 2"
    draws = ((3, "by_session"), (2, "stratified"))
    search = make_search(
        space,
        {f"{n}": ({"data.fold@0": fold, "data.validation@0": kind}, []) for n, (fold, kind) in enumerate(draws)},
    )
    overview = experiment_numbers(search, {"why": "none"}, [])["experiment"]
    assert overview["validation"] == "by_session fold 3 of split 1 and stratified fold 2 of split 1"


SGD_RATES = (0.5, 2e-5, 0.01, 3e-5, 0.002, 0.1, 1e-5, 0.03, 0.2, 0.3)
RANGER_RATES = (0.005, 0.001)
PATIENCE = (100, 9, 20, 3, 11, 5, 150, 40, 8, 90, 30, 10)


def ranged() -> Experiment:
    """10 trials of SGD and 2 of Ranger; trial n has the accuracy n / 100."""
    trials: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for n, (rate, patience) in enumerate(zip((*SGD_RATES, *RANGER_RATES), PATIENCE)):
        name, branch = ("sgd", 0) if n < len(SGD_RATES) else ("ranger", 1)
        sampled = {"optimizer.name@0": name, f"optimizer.lr@{branch}": rate, "schedule.patience@0": patience}
        trials[f"{n:05d}"] = (sampled, [validation(20, n / 100)])
    return make_search(RANGES, trials)


def test_a_range_is_cut_into_bins_of_equally_many_trials_in_each_branch() -> None:
    """10 trials: 3 bins of 3 at least, cut after the 10 x 1 // 3 = 3rd and the 10 x 2 // 3 = 6th; ascending numbers."""
    parameters = experiment_numbers(ranged(), {"why": "none"}, [])["choices"]["parameters"]
    shown = [
        (
            one["key"],
            one["when"],
            one["form"],
            one.get("range"),
            [(row["value"], row["members"]) for row in one["values"]],
        )
        for one in parameters[1:]
    ]

    def trials(*numbers: int) -> list[str]:
        return [f"{n:05d}" for n in numbers]

    assert shown == [
        (
            "optimizer.lr",
            "optimizer.name sgd",
            "loguniform",
            [1e-5, 1.0],
            [
                ("1e-05 to 3e-05", trials(6, 1, 3)),
                ("0.002 to 0.03", trials(4, 2, 7)),
                ("0.1 to 0.5", trials(5, 8, 9, 0)),
            ],
        ),
        ("optimizer.lr", "optimizer.name ranger", "loguniform", [1e-4, 1e-2], [("0.001 to 0.005", trials(11, 10))]),
        (
            "schedule.patience",
            "",
            "randint",
            [1, 200],
            [  # 3, 5, 8 | 9, 10, 11 | 20, 30, 40 | 90, 100, 150
                ("3 to 8", trials(3, 5, 8)),
                ("9 to 11", trials(1, 11, 4)),
                ("20 to 40", trials(2, 10, 7)),
                ("90 to 150", trials(9, 0, 6)),
            ],
        ),
    ]
    first = parameters[1]["values"][0]  # 0.06, 0.01 and 0.03
    assert (first["trials"], first["mean"], first["best"]) == (3, pytest.approx(0.1 / 3), 0.06)


def test_bins_with_the_same_ends_are_one() -> None:
    """9 trials of two values: 3 | 3 | 3, of which the first two hold 7 alone."""
    space = "space: {schedule.patience: {randint: [1, 200]}}\nsamples: 9"
    draws = (7, 7, 7, 7, 7, 7, 8, 8, 7)
    search = make_search(
        space, {f"{n}": ({"schedule.patience@0": draw}, [validation(5, 0.5)]) for n, draw in enumerate(draws)}
    )
    (parameter,) = experiment_numbers(search, {"why": "none"}, [])["choices"]["parameters"]
    assert [(row["value"], row["trials"]) for row in parameter["values"]] == [("7", 6), ("7 to 8", 3)]


@pytest.mark.parametrize(
    ("validated", "even"),
    [
        ([[10, 20, 30], [10, 20], [10, 20, 40]], 20),
        ([[10, 20], [30]], None),
        ([[10, 20, 30], []], 30),  # a trial without a validation is not waited for
        ([[], []], None),
        ([], None),
    ],
)
def test_the_even_iteration_is_the_last_one_that_all_have(validated: list[list[int]], even: int | None) -> None:
    logged = {"iteration": 90, "train_loss": 1.0}  # without a validation
    lines = [[*(validation(place, 0.5) for place in places), logged] for places in validated]
    search = make_search(REPEATS, {f"{n}": (PLAIN, of_one) for n, of_one in enumerate(lines)})
    assert last_common_iteration(search.trials) == even


def test_importance_is_of_the_parameter_that_decides() -> None:
    """The best four of 16 configurations are those of SGD with a high rate: nothing else divides them from the rest."""
    pytest.importorskip("optuna")
    trials: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for n in range(16):
        rate = 10.0 ** (-5 + 0.3 * n)
        sampled = {"optimizer.name@0": "sgd", "optimizer.lr@0": rate, "schedule.patience@0": 1 + 7 * n % 16}
        trials[f"{n:05d}"] = (sampled, [validation(20, n / 100)])
    search = make_search(RANGES, trials)
    numbers = importance_numbers(search)
    assert (numbers["why"], numbers["configurations"], numbers["best_share"]) == ("", 16, 0.25)
    assert (numbers["entries"][0]["key"], numbers["entries"][0]["when"]) == ("optimizer.lr", "optimizer.name sgd")
    assert sum(entry["share"] for entry in numbers["entries"]) == pytest.approx(1)
    assert numbers["entries"][0]["share"] > 0.5
    parallel = experiment_numbers(search, {"why": "none"}, [])["parallel"]
    assert parallel["keys"][0] == "optimizer.lr" and parallel["by_importance"] is True
    assert importance_numbers(make_search(RANGES, dict(list(trials.items())[:11])))["why"].startswith("11 validated")
    assert importance_numbers(make_search(RANGES, dict(list(trials.items())[:12])))["why"] == ""


def test_importance_is_of_the_best_quarter() -> None:
    """The best 4 of 16 have high learning rates and any patience; the worst 4 a long patience and any rate."""
    pytest.importorskip("optuna")
    trials: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {}
    for n in range(16):
        rate = 0.5 + 0.1 * (n - 12) if n >= 12 else 1e-5 * 2 ** (5 * n % 12)
        patience = 195 + n if n < 4 else 1 + 37 * n % 180
        sampled = {"optimizer.name@0": "sgd", "optimizer.lr@0": rate, "schedule.patience@0": patience}
        trials[f"{n:05d}"] = (sampled, [validation(20, n / 100)])
    numbers = importance_numbers(make_search(RANGES, trials))
    shares = {entry["key"]: entry["share"] for entry in numbers["entries"]}
    assert shares["optimizer.lr"] > 2 * shares["schedule.patience"]


def test_a_stop_belongs_to_the_last_rung_before_it() -> None:
    """Rungs 10 and 30 of 90 iterations: a trial at a rung has come to it, one before it has not."""
    space = "base: {train: {iterations: 90}}\nscheduler: {name: asha, grace: 10, reduction: 3}"
    places = {"a": 9, "b": 10, "c": 29, "d": 30, "e": 31}
    search = make_search(space, {name: ({}, [validation(place, 0.1)]) for name, place in places.items()})
    decisions = [Decision(n, name, place, 0.1, "STOP") for n, (name, place) in enumerate(places.items())]
    decisions.append(Decision(5, "f", 89, 0.1, "CONTINUE"))
    stopping = stopping_numbers(with_decisions(search, decisions))
    assert [(stop["trial"], stop["rung"]) for stop in stopping["stopped"]] == [
        *(("a", None), ("b", 10), ("c", 10), ("d", 30), ("e", 30)),
    ]
    assert stopping["rungs"] == [
        {"iterations": 10, "reported": 5, "stopped": 2, "went_on": 3},  # b to f
        {"iterations": 30, "reported": 3, "stopped": 2, "went_on": 1},  # d, e and f
    ]
    assert (stopping["spent_iterations"], stopping["full_iterations"]) == (109, 450)  # 9 + 10 + 29 + 30 + 31
    assert stopping["saved_share"] == pytest.approx(341 / 450)


def test_the_median_rule_has_no_rungs() -> None:
    search = ranged()
    stopping = stopping_numbers(with_decisions(search, [Decision(0, "00000", 20, 0.0, "STOP")]))
    assert (stopping["scheduler"], stopping["grace"], stopping["reduction"]) == ("median", 20, None)
    assert stopping["rungs"] == []
    assert stopping["stopped"] == [{"trial": "00000", "iteration": 20, "accuracy": 0.0, "rung": None}]
    assert (stopping["trials_counted"], stopping["spent_iterations"], stopping["full_iterations"]) == (12, 240, 480)


def test_a_long_curve_is_thinned_evenly_to_both_of_its_ends() -> None:
    """1,198 lines in 400 points: every third, the first and the last among them; 400 lines stay as they are."""
    for lines, step in ((1198, 3), (400, 1)):
        metrics = [{"iteration": n, "train_loss": 1.0 / n} for n in range(1, lines + 1)]
        search = make_search(REPEATS, {"00000-0": (PLAIN, metrics)})
        (curve,) = experiment_numbers(search, {"why": "none"}, [])["curves"]["trials"]
        places = list(range(1, lines + 1, step))
        assert len(places) == 400 and places[-1] == lines
        assert curve["series"] == {"train_loss": [places, [1.0 / n for n in places]]}


@pytest.mark.parametrize(("trials", "most"), [(20, 400), (21, 380), (1000, 12)])
def test_points_of_a_curve_fall_with_the_number_of_trials(trials: int, most: int) -> None:
    """8,000 points over all curves: 8,000 // 21 = 380; 12 at least and 400 at most."""
    search = make_search(REPEATS, {"00000-0": (PLAIN, [{"iteration": 1, "train_loss": 1.0}])})
    search.trials *= trials
    assert experiment_numbers(search, {"why": "none"}, [])["curves"]["most_points"] == most


def test_hours_without_gpus_are_those_of_processes() -> None:
    space = "base: {train: {iterations: 10, batch_size: 30}, compute: {workers: 3}}\nscheduler: {name: fifo}"
    lines = [
        {"iteration": 4, "clips_per_second": 2.0},  # 4 x 30 / 2 = 60 s
        {"iteration": 10, "clips_per_second": 0.0, "report_seconds": 12.0, "validation_seconds": 108.0},
    ]
    search = make_search(space, {"00000": ({}, lines), "00001": ({}, [])})
    assert trial_seconds(search.trials[0]) == 180.0
    assert cost_numbers(search) == {
        "gpus_per_trial": 0.0,
        "workers_per_trial": 3,
        "trial_hours": 0.05,
        "gpu_hours": None,
        "worker_hours": pytest.approx(0.15),
        "mean_trial_hours": 0.05,
        "longest_trial_hours": 0.05,
        "median_clips_per_second": 0.0,
    }
