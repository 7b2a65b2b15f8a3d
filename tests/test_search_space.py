from __future__ import annotations

from pathlib import Path

import pytest

from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.search_space import SearchSpace, load_space, parse_space

SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "search_spaces").glob("*.yaml"))


def draw(space: SearchSpace, seed: int = 0) -> list[Config]:
    """The configurations of the random search with this seed."""
    return [space.config(space.draw(seed, number)) for number in range(space.configurations)]


def test_all_are_shipped() -> None:
    assert SHIPPED == ["activation", "demo", "full", "optimizer", "stam_depth", "table1"]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_sample_into_configurations(name: str) -> None:
    space = load_space(name)
    configs = draw(space)
    assert len(configs) == space.trials
    assert len({config.model_dump_json() for config in configs}) == len(configs)
    assert draw(space) == configs
    header = space.text.split("base:")[0]
    assert all(f"# {word}:" in header for word in ("Command", "Cost", "Expect"))


def test_a_branch_belongs_to_its_condition() -> None:
    space = load_space("full")
    assert draw(space, seed=1) != draw(space)
    for config in draw(space):
        low, high = (1e-3, 0.3) if config.optimizer.name == "sgd" else (1e-4, 1e-2)
        assert low <= config.optimizer.lr <= high


def test_table1_is_the_papers() -> None:
    rows = {config.label: config for config in draw(load_space("table1"))}
    seen = {
        label: (c.train.precision, c.optimizer.name, c.schedule.name, c.model.stam_depth) for label, c in rows.items()
    }
    assert seen == {
        "lu_original": ("off", "sgd", "multistep", 1),
        "1_mixed_precision": ("auto", "sgd", "plateau", 1),
        "2_ranger": ("auto", "ranger", "plateau", 1),
        "3_stacked_stam": ("auto", "ranger", "plateau", 3),
    }
    assert {config.streams for config in rows.values()} == {"rgb"}
    batches = {label: (c.train.batch_size, c.train.accumulate) for label, c in rows.items()}
    assert batches.pop("lu_original") == (48, 4)  # 12 a pass, as in Lu's code
    assert set(batches.values()) == {(12, 1)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("spaec: {}", ["s.yaml", "'spaec'", "space"]),
        ("space: {optimizer.lrr: 1.0}", ["'optimizer.lrr'", "optimizer.lr"]),
        ("space: {model.stam_depth: {choice: []}}", ["space.model.stam_depth", "empty"]),
        ("space: {model.stam_depth: {choice: [1, x]}}", ["model.stam_depth", "integer", "'x'"]),
        ('space: {model.stam_depth: {"eval": "1"}}', ["model.stam_depth", "'eval'", "choice", "loguniform"]),
        ("space: {optimizer.lr: {uniform: [2, 1]}}", ["optimizer.lr", "empty"]),
        ("space: {optimizer.lr: {loguniform: [0, 1]}}", ["optimizer.lr", "above 0"]),
        ("space: {optimizer.lr: {uniform: [a, 1]}}", ["optimizer.lr", "numbers"]),
        ("space: {model.stam_depth: {uniform: [1, 3]}}", ["model.stam_depth", "integer", "1.0"]),
        ("space: {model.width: {uniform: [0.5, 2.0]}}", ["model.width", "less than or equal to 1"]),
        ("space: {seed: {randint: [0.5, 2]}}", ["seed", "whole numbers"]),
        ("space: {seed: {choice: [{eval: '1'}]}}", ["seed", "eval"]),
        ("space: {optimizer.lr: [{when: {optimizer.name: sgd}}]}", ["optimizer.lr", "branch 1"]),
        ("space: {optimizer.lr: [{when: {a: 1}, value: 0.1}]}", ["optimizer.lr", "'a'"]),
        ("space: {seed: [{when: {label: a}, grid: [1]}]}", ["seed", "grid"]),
        ("space: {seed: [{when: {label: a}, value: 1}], label: {choice: [a]}}", ["seed", "label", "above"]),
        ("samples: 0", ["samples", "at least 1"]),
        ("space: {optimizer.lr: [{when: {optimizer.name: sdg}, value: 0.1}]}", ["optimizer.lr", "never taken", "sdg"]),
        ("space: {train.iterations: {grid: [40, 400]}}", ["train.iterations", "base"]),
        ("space: {compute.workers: {grid: [1, 2]}}", ["compute.workers", "base"]),
        ("space: {data.decode: {grid: [cpu, gpu]}}", ["data.decode", "base"]),
        ("space: {1: 2}", ["unknown key 1"]),
        ("base: {train: 3}", ["train", "3"]),
        ("scheduler: {grace: 10, reduce: 2}", ["scheduler.reduce", "reduction"]),
        ("scheduler: {name: median, reduction: 2}", ["scheduler.reduction", "least_trials"]),
        ("scheduler: {name: fifo, grace: 2}", ["scheduler.grace", "fifo: none"]),
        ("scheduler: {name: hyperband}", ["scheduler.name", "asha", "'hyperband'"]),
        ("scheduler: {keep_stopped: 3}", ["scheduler.keep_stopped", "true or false, found 3"]),
        ("scheduler: {grace: 9000}", ["scheduler.grace", "3000"]),
        ("base: {train: {iterations: 10}}\nscheduler: {grace: 20}", ["scheduler.grace"]),
        ("repeats: 0", ["repeats", "at least 1"]),
        ("repeats: 2\nspace: {seed: {grid: [1, 2]}}", ["space.seed", "repeats"]),
        ("searcher: bayes", ["searcher", "random, tpe", "'bayes'"]),
        ("searcher: tpe\nspace: {seed: {grid: [1, 2]}}", ["space.seed", "grid", "choice"]),
        ("base: {compute: {workers: [1, 2]}}", ["compute.workers", "fixed"]),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_space(text, "s.yaml")
    assert "s.yaml" in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_set_changes_the_base_and_nothing_that_is_searched() -> None:
    space = load_space("demo", {"train.iterations": 50})
    assert {config.train.iterations for config in draw(space)} == {50}
    with pytest.raises(UserError, match="searches this key"):
        load_space("demo", {"model.stam_depth": 1})


def test_an_unknown_name_lists_the_shipped_ones() -> None:
    with pytest.raises(UserError, match=r"nosuch.*stam_depth"):
        load_space("nosuch")
