"""Mistakes in a search space: each is an error that names the file, the key and the allowed values."""

from __future__ import annotations

import pytest

from tests.config.test_config import OPTIMIZER_KEYS
from tune_ego.errors import UserError
from tune_ego.space_io import parse_space

FORMS = "choice, grid, uniform, loguniform, randint"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3", "expected the keys base, space, samples, repeats, searcher, scheduler"),
        ("{}", "expected the keys base, space, samples, repeats, searcher, scheduler"),
        ("spaec: {}", "unknown key 'spaec'; allowed: base, space, samples, repeats, searcher, scheduler"),
        ("space: 3", "space: expected keys and values, found 3"),
        ("base: [1]", "base: expected keys and values, found [1]"),
        ("scheduler: asha", "scheduler: expected keys and values, found 'asha'"),
        (
            "space: {optimizer.lrr: 1.0}",
            f"unknown key 'optimizer.lrr'; allowed: {OPTIMIZER_KEYS}",
        ),
        ("space: {model.stam_depth: {choice: []}}", "space.model.stam_depth: choice: the list is empty, found []"),
        ("space: {model.stam_depth: {choice: [1, x]}}", "model.stam_depth: Input should be a valid integer, found 'x'"),
        (
            'space: {model.stam_depth: {"eval": "1"}}',
            f"space.model.stam_depth: unknown form 'eval'; allowed: {FORMS}, or a plain value",
        ),
        (
            "space: {seed: {grid: [1], choice: [1]}}",
            f"space.seed: expected one of {FORMS}, value, beside an optional 'when'",
        ),
        (
            "space: {seed: {}}",
            f"space.seed: expected one of {FORMS}, value, beside an optional 'when'",
        ),
        ("space: {seed: {choice: 3}}", "space.seed: choice: Input should be a valid list, found 3"),
        (
            "space: {optimizer.lr: {uniform: [2, 1]}}",
            "space.optimizer.lr: uniform: the range is empty: expected [low, high], found [2, 1]",
        ),
        (
            "space: {optimizer.lr: {uniform: [1, 1]}}",
            "space.optimizer.lr: uniform: the range is empty: expected [low, high], found [1, 1]",
        ),
        (
            "space: {optimizer.lr: {uniform: [.nan, 1]}}",
            "space.optimizer.lr: uniform: the range is empty: expected [low, high], found [nan, 1]",
        ),
        (
            "space: {optimizer.lr: {uniform: [1, .inf]}}",
            "space.optimizer.lr: uniform: the range is not finite, found [1, inf]",
        ),
        (
            "space: {optimizer.lr: {uniform: [-2.0e+300, 1]}}",
            "space.optimizer.lr: uniform: the range is not finite, found [-2e+300, 1]",
        ),
        (
            "space: {optimizer.lr: {loguniform: [0, 1]}}",
            "space.optimizer.lr: loguniform.0: Input should be greater than 0, found 0",
        ),
        (
            "space: {optimizer.lr: {uniform: [a, 1]}}",
            "space.optimizer.lr: uniform.0: Input should be a valid number, found 'a'",
        ),
        (
            "space: {optimizer.lr: {uniform: [false, 1]}}",
            "space.optimizer.lr: uniform.0: Input should be a valid number, found False",
        ),
        (
            "space: {optimizer.lr: {uniform: [0, 1, 2]}}",
            "space.optimizer.lr: uniform: expected [low, high], found [0, 1, 2]",
        ),
        (
            "space: {model.stam_depth: {uniform: [1, 3]}}",
            "model.stam_depth: Input should be a valid integer, found 1.0",
        ),
        (
            "space: {model.width: {uniform: [0.5, 2.0]}}",
            "model.width: Input should be less than or equal to 1, found 2.0",
        ),
        ("space: {seed: {randint: [0.5, 2]}}", "space.seed: randint.0: Input should be a valid integer, found 0.5"),
        (
            "space: {seed: {choice: [{eval: '1'}]}}",
            "space.seed: choice.0: expected a number, a word, or a list of them, found {'eval': '1'}",
        ),
        ("space: {label: null}", "space.label: value: expected a number, a word, or a list of them, found None"),
        (
            "space: {optimizer.lr: [{when: {optimizer.name: sgd}}]}",
            f"space.optimizer.lr: branch 1: expected one of {FORMS}, value, beside an optional 'when'",
        ),
        ("space: {optimizer.lr: [{value: 0.1}, 3]}", "space.optimizer.lr: branch 2: expected keys and values, found 3"),
        (
            "space: {seed: [{value: null}]}",
            "space.seed: branch 1: value: expected a number, a word, or a list of them, found None",
        ),
        ("space: {seed: [{choice: []}]}", "space.seed: branch 1: choice: the list is empty, found []"),
        ("space: {seed: [{when: 3, value: 1}]}", "space.seed: branch 1: when: expected keys and values, found 3"),
        (
            "space: {optimizer.lr: [{when: {a: 1}, value: 0.1}]}",
            "space.optimizer.lr: unknown key 'a'; allowed: label, seed, streams, fusion_weight",
        ),
        (
            "space: {seed: [{value: 1}, {when: {label: a}, grid: [1]}]}",
            "space.seed: branch 2: a grid has no 'when' (it would repeat other trials); use choice",
        ),
        (
            "space: {seed: [{when: {label: a}, value: 1}], label: {choice: [a]}}",
            "space.seed: 'when' needs label, which must stand above it in the space",
        ),
        (
            "space: {seed: [{when: {seed: 1}, value: 1}]}",
            "space.seed: 'when' needs seed, which must stand above it in the space",
        ),
        ("samples: 0", "samples: Input should be greater than or equal to 1, found 0"),
        ("samples: 1.0", "samples: Input should be a valid integer, found 1.0"),
        ("samples: true", "samples: Input should be a valid integer, found True"),
        (
            "space: {optimizer.lr: [{value: 0.1}, {when: {optimizer.name: sdg}, value: 0.1}]}",
            "space.optimizer.lr: branch 2 is never taken (when: {'optimizer.name': ('sdg',)})",
        ),
        (
            "space: {train.iterations: {grid: [40, 400]}}",
            "train.iterations is the same for all trials of a search; set it in base",
        ),
        (
            "space: {compute.workers: {grid: [1, 2]}}",
            "compute.workers is the same for all trials of a search; set it in base",
        ),
        (
            "space: {data.decode: {grid: [cpu, gpu]}}",
            "data.decode is the same for all trials of a search; set it in base",
        ),
        ("space: {1: 2}", "unknown key 1; allowed: label, seed, streams, fusion_weight"),
        (
            "base: {train: {iterations: 0}}",
            "base: train.iterations: Input should be greater than or equal to 1, found 0",
        ),
        (
            "scheduler: {grace: 10, reduce: 2}",
            "unknown key 'scheduler.reduce'; the settings of asha: grace, reduction, keep_stopped",
        ),
        (
            "scheduler: {name: median, reduction: 2}",
            "unknown key 'scheduler.reduction'; the settings of median: grace, least_trials, keep_stopped",
        ),
        ("scheduler: {name: fifo, grace: 2}", "unknown key 'scheduler.grace'; the settings of fifo: none"),
        (
            "scheduler: {name: hyperband}",
            "scheduler.name: Input should be 'asha', 'median' or 'fifo', found 'hyperband'",
        ),
        ("scheduler: {keep_stopped: 3}", "scheduler.keep_stopped: Input should be a valid boolean, found 3"),
        ("scheduler: {grace: 0}", "scheduler.grace: Input should be greater than or equal to 1, found 0"),
        ("scheduler: {reduction: 1}", "scheduler.reduction: Input should be greater than or equal to 2, found 1"),
        (
            "scheduler: {name: median, least_trials: 0}",
            "scheduler.least_trials: Input should be greater than or equal to 1, found 0",
        ),
        ("scheduler: {grace: 9000}", "scheduler.grace 9000 is over base.train.iterations 3000"),
        (
            "base: {train: {iterations: 10}}\nscheduler: {grace: 11}",
            "scheduler.grace 11 is over base.train.iterations 10",
        ),
        ("repeats: 0", "repeats: Input should be greater than or equal to 1, found 0"),
        ("repeats: 2\nspace: {seed: {grid: [1, 2]}}", "space.seed: repeats are over seeds; leave one of the two out"),
        ("searcher: bayes", "searcher: Input should be 'random' or 'tpe', found 'bayes'"),
        (
            "searcher: tpe\nspace: {label: a, seed: {grid: [1, 2]}}",
            "space.seed: a grid has no place in a search by tpe; use choice",
        ),
        (
            "base: {compute: {workers: [1, 2]}}",
            "compute.workers: the trials of a search have a fixed number of workers",
        ),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_space(text, "s.yaml")
    assert str(caught.value) == f"s.yaml: {message}"


@pytest.mark.parametrize(
    "text",
    [
        "base: {train: {iterations: 10}}\nscheduler: {grace: 10}",
        "base: {train: {iterations: 10}}\nscheduler: {name: median, grace: 11}",
        "space: {seed: {grid: [1, 2]}}",
        "space: {optimizer.eps: {uniform: [1, 1.0e+300]}}",
        "space: {optimizer.lr: {loguniform: [1e-300, 1]}}",
        "searcher: tpe\nspace: {seed: {choice: [1, 2]}}\nscheduler: {reduction: 2}",
    ],
)
def test_what_lies_just_within_the_limits_is_accepted(text: str) -> None:
    parse_space(text, "s.yaml")


@pytest.mark.parametrize("values", ["[1, 2, 1]", "[1, 1.0]", "[0.5, 5.0e-1]", "[[1, 2], [3], [1, 2]]", "[a, b, a]"])
def test_a_value_that_a_grid_has_twice_is_refused(values: str) -> None:
    with pytest.raises(UserError, match=r"^s\.yaml: space\.seed: grid: the value .* is given twice"):
        parse_space(f"space: {{seed: {{grid: {values}}}}}", "s.yaml")
    for text in ("{choice: [1, 1]}", "{grid: [1, 2]}"):  # a choice may be weighted
        parse_space(f"space: {{seed: {text}}}", "s.yaml")
    parse_space("space: {model.attention_scale: {grid: [min_max, softmax]}}", "s.yaml", check=False)


def test_a_space_that_was_checked_is_not_checked_again() -> None:
    text = "space: {model.stam_depth: {choice: [99]}}"
    assert parse_space(text, "s.yaml", check=False).samples == 1
    with pytest.raises(UserError, match="stam_depth"):
        parse_space(text, "s.yaml")
