"""Search spaces: YAML to validated domains, drawn values and configurations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tune_ego.config import Config
from tune_ego.config_optimizers import MultiStepConfig, SGDConfig
from tune_ego.errors import UserError
from tune_ego.search_space import Branch, SchedulerSettings, SearchSpace
from tune_ego.space_io import find_space, load_space, parse_space
from tune_ego.space_schema import Domain

SHIPPED = {
    "activation": (12, SchedulerSettings("asha", 200, 3, 3, False)),
    "demo": (4, SchedulerSettings("asha", 60, 2, 3, False)),
    "full": (64, SchedulerSettings("asha", 150, 3, 3, False)),
    "long_tail": (24, SchedulerSettings("asha", 150, 3, 3, False)),
    "lu": (2, SchedulerSettings("fifo", 250, 3, 3, False)),
    "lu_o": (1, SchedulerSettings("fifo", 250, 3, 3, False)),
    "modern": (64, SchedulerSettings("asha", 150, 3, 3, False)),
    "optimizer": (24, SchedulerSettings("asha", 100, 3, 3, False)),
    "stam_depth": (20, SchedulerSettings("asha", 200, 3, 3, False)),
    "study": (50, SchedulerSettings("fifo", 60, 3, 3, False)),
    "study_asha": (9, SchedulerSettings("asha", 40, 3, 3, False)),
    "study_long_tail": (30, SchedulerSettings("fifo", 60, 3, 3, False)),
    "study_lr": (8, SchedulerSettings("fifo", 60, 3, 3, False)),
    "table1": (4, SchedulerSettings("fifo", 250, 3, 3, False)),
}
"""Name -> (trials, scheduler); all are random searches."""
REPEATS = {"study": 5, "study_long_tail": 5}
"""Name -> trials of each configuration, where it isn't 1."""

BRANCHED = """
space:
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.lr:
    - {when: {optimizer.name: sgd}, loguniform: [1e-3, 1.0]}
    - {when: {optimizer.name: ranger}, loguniform: [1e-5, 1e-2]}
  model.stam_depth: {randint: [1, 4]}
  model.dropout: {uniform: [0.1, 0.9]}
samples: 60
"""
"""Every drawn form; one range of learning rates for each optimizer."""

GRID = """
space:
  model.stam_depth: {grid: [1, 2, 3]}
  optimizer.name: {grid: [sgd, ranger]}
  optimizer.lr: {uniform: [0.25, 0.75]}
samples: 2
"""


def literal_generator(seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0x5EA2C4, number)))


def literal_draw(seed: int, number: int) -> dict[str, Any]:
    """One configuration of `BRANCHED`: its keys in their order, and the branch alone that belongs to the optimizer."""
    random = literal_generator(seed, number)
    branch = int(random.integers(2))  # 0: sgd, 1: ranger
    low, high = ((1e-3, 1.0), (1e-5, 1e-2))[branch]
    return {
        "optimizer.name@0": ("sgd", "ranger")[branch],
        f"optimizer.lr@{branch}": float(np.exp(random.uniform(np.log(low), np.log(high)))),
        "model.stam_depth@0": int(random.integers(1, 4)),  # 1, 2 or 3
        "model.dropout@0": random.uniform(0.1, 0.9),
    }


def configurations(space: SearchSpace, seed: int = 0) -> list[Config]:
    """The configurations of the random search with this seed."""
    return [space.config(space.draw(seed, number)) for number in range(space.configurations)]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_spaces_give_different_configurations(name: str) -> None:
    space = load_space(name)
    assert (space.trials, space.scheduler) == SHIPPED[name]
    assert (space.repeats, space.searcher) == (REPEATS.get(name, 1), "random")
    assert len({config.model_dump_json() for config in configurations(space)}) == space.configurations
    header = space.text.split("base:")[0]
    assert all(f"# {word}:" in header for word in ("Command", "Cost", "Expect"))


def test_the_table_lists_all_shipped_spaces() -> None:
    assert sorted(path.stem for path in (Path(__file__).parents[2] / "search_spaces").glob("*.yaml")) == list(SHIPPED)


def test_table1_is_the_papers() -> None:
    rows = {config.label: config for config in configurations(load_space("table1"))}
    seen = {
        label: (c.train.precision, c.optimizer.name, c.schedule.name, c.model.stam_depth) for label, c in rows.items()
    }
    assert seen == {
        "lu_original": ("off", "sgd", "multistep", 1),
        "1_mixed_precision": ("fp16", "sgd", "plateau", 1),
        "2_ranger": ("fp16", "ranger", "plateau", 1),
        "3_stacked_stam": ("fp16", "ranger", "plateau", 3),
    }
    assert {config.streams for config in rows.values()} == {"rgb"}
    batches = {label: (c.train.batch_size, c.train.accumulate) for label, c in rows.items()}
    assert batches.pop("lu_original") == (48, 4)  # 12 a pass, as in Lu's code
    assert set(batches.values()) == {(12, 1)}


def test_lu_s_rows_are_hers() -> None:
    """Both streams; 12 samples a pass and 4 passes a step, as in the released code."""
    rows = {config.label: config for name in ("lu_o", "lu") for config in configurations(load_space(name))}
    assert {label: (c.model.stam_depth, c.loss.gaze_weight) for label, c in rows.items()} == {
        "lu_o": (0, 0.1),
        "lu_v": (1, 0),
        "lu_a": (1, 0.1),
    }
    for config in rows.values():
        assert (config.streams, config.train.precision) == ("both", "off")
        assert (config.train.batch_size, config.train.accumulate, config.train.iterations) == (48, 4, 3000)
        assert config.optimizer == SGDConfig(lr=0.1, momentum=0.9, weight_decay=1e-7)
        assert config.schedule == MultiStepConfig(milestones=(300, 1000), gamma=0.1)


def test_all_that_a_space_can_say_is_read() -> None:
    text = """
base: {train: {iterations: 600, validate_every: 50}, label: x}
space:
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.lr:
    - {when: {optimizer.name: [sgd, ranger], label: x}, loguniform: [1e-3, 1]}
    - {uniform: [1, 2]}
    - {value: 0.5}
  optimizer.momentum: [{when: {optimizer.name: sgd}, value: 0.5}]
  seed: {randint: [3, 9]}
  model.stam_depth: {grid: [1, 3]}
  loss.gaze_weight: 0.25
  optimizer.betas: {choice: [[0.9, 0.99], [0.95, 0.999]]}
  schedule.milestones: [100, 200]
samples: 8
scheduler: {name: median, grace: 100, least_trials: 5, keep_stopped: true}
"""
    space = parse_space(text, "s.yaml", {"train.iterations": 700, "label": "y"}, check=False)
    assert space == SearchSpace(
        source="s.yaml",
        text=text,
        base={"train": {"iterations": 700, "validate_every": 50}, "label": "y"},
        branches={
            "optimizer.name": [Branch({}, Domain("choice", ("sgd", "ranger")))],
            "optimizer.lr": [
                Branch({"optimizer.name": ("sgd", "ranger"), "label": ("x",)}, Domain("loguniform", (0.001, 1.0))),
                Branch({}, Domain("uniform", (1.0, 2.0))),
                Branch({}, Domain("value", (0.5,))),
            ],
            "optimizer.momentum": [Branch({"optimizer.name": ("sgd",)}, Domain("value", (0.5,)))],
            "seed": [Branch({}, Domain("randint", (3, 9)))],
            "model.stam_depth": [Branch({}, Domain("grid", (1, 3)))],
            "loss.gaze_weight": [Branch({}, Domain("value", (0.25,)))],
            "optimizer.betas": [Branch({}, Domain("choice", ([0.9, 0.99], [0.95, 0.999])))],
            "schedule.milestones": [Branch({}, Domain("value", ([100, 200],)))],
        },
        samples=8,
        repeats=1,
        searcher="random",
        scheduler=SchedulerSettings("median", 100, 3, 5, True),
    )
    low, high = space.branches["optimizer.lr"][0].domain.values
    assert isinstance(low, float) and isinstance(high, float)  # `1` is a whole number in YAML
    assert all(isinstance(end, int) for end in space.branches["seed"][0].domain.values)
    assert space.searched_keys == ["optimizer.name", "optimizer.lr", "seed", "model.stam_depth", "optimizer.betas"]
    assert [name for name, _ in space.sampled()] == [
        *("optimizer.name@0", "optimizer.lr@0", "optimizer.lr@1", "seed@0", "model.stam_depth@0", "optimizer.betas@0")
    ]


def test_settings_that_a_space_leaves_out() -> None:
    space = parse_space("base: {train: {validate_every: 70}}", "t")
    assert (space.samples, space.repeats, space.searcher, space.branches) == (1, 1, "random", {})
    assert space.scheduler == SchedulerSettings("asha", 70, 3, 3, False)  # grace: the first validation
    assert (space.grid_points, space.configurations, space.trials) == (1, 1, 1)
    assert parse_space("searcher: tpe\nrepeats: 4\nsamples: 3\nscheduler: {reduction: 2}", "t").trials == 12
    assert parse_space("scheduler: {reduction: 2}", "t").scheduler.reduction == 2


def test_the_drawn_values_of_a_seed_and_number() -> None:
    space = parse_space(BRANCHED, "")
    for seed, number in ((0, 0), (0, 1), (0, 59), (5, 1)):
        drawn, literal = space.draw(seed, number), literal_draw(seed, number)
        assert list(drawn.items()) == list(literal.items())
    name, rate, depth, dropout = space.draw(0, 1).values()
    assert (name, depth) == ("sgd", 1)
    assert (rate, dropout) == pytest.approx((0.2570401644665955, 0.46720203776611136))
    assert space.draw(0, 2)["optimizer.lr@1"] == pytest.approx(0.0001576472086701578)
    kinds = [type(value) for value in space.draw(0, 1).values()]
    assert kinds == [str, float, int, float]  # what JSON can hold: no numbers of numpy's


def test_the_last_grid_varies_fastest_and_each_sample_covers_the_grid() -> None:
    space = parse_space(GRID, "")
    assert (space.samples, space.grid_points, space.configurations) == (2, 6, 12)
    draws = [space.draw(3, number) for number in range(12)]
    points = [(1, "sgd"), (1, "ranger"), (2, "sgd"), (2, "ranger"), (3, "sgd"), (3, "ranger")] * 2
    assert [(draw["model.stam_depth@0"], draw["optimizer.name@0"]) for draw in draws] == points
    rates = [literal_generator(3, number).uniform(0.25, 0.75) for number in range(12)]
    assert [draw["optimizer.lr@0"] for draw in draws] == pytest.approx(rates)


def test_repeats_have_seeds_one_after_another() -> None:
    text = "base: {seed: 7, label: x}\nspace: {optimizer.betas: {choice: [[0.9, 0.99]]}}\nrepeats: 3"
    space = parse_space(text, "")
    sampled = {"optimizer.betas@0": [0.9, 0.99]}
    assert [space.config(sampled, repeat).seed for repeat in (0, 1, 2)] == [7, 8, 9]
    assert space.config(sampled).seed == 7
    assert space.config(sampled, 2).label == "x" and space.config(sampled).optimizer.betas == (0.9, 0.99)  # type: ignore[union-attr]
    assert space.overrides(sampled) == {"optimizer.betas": (0.9, 0.99)}
    without = parse_space("space: {label: {choice: [a, b]}}", "")
    assert [without.config({"label@0": "b"}, repeat).seed for repeat in (0, 2)] == [0, 2]
    searched = parse_space("space: {seed: {choice: [4, 5]}}", "")
    assert searched.config({"seed@0": 5}).seed == 5


BASE = "base: {optimizer: {name: sgd}, schedule: {name: cosine}}\n"


@pytest.mark.parametrize(
    ("text", "sampled", "overrides", "branches"),
    [
        # The condition's key is neither searched nor in base: Config's default is ranger.
        ("space: {label: [{when: {optimizer.name: ranger}, value: a}, {value: b}]}", {}, {"label": "a"}, {"label": 0}),
        (BASE + "space: {label: [{when: {optimizer.name: sgd}, value: a}, {value: b}]}", {}, {"label": "a"}, {}),
        (BASE + "space: {label: [{when: {optimizer.name: ranger}, value: a}, {value: b}]}", {}, {"label": "b"}, {}),
        # Several values: one of them is enough. Several keys: all must hold.
        (
            BASE + "space: {label: [{when: {schedule.name: [plateau, cosine]}, value: a}, {value: b}]}",
            {},
            {"label": "a"},
            {"label": 0},
        ),
        (
            BASE + "space: {label: [{when: {schedule.name: cosine, optimizer.name: ranger}, value: a}, {value: b}]}",
            {},
            {"label": "b"},
            {"label": 1},
        ),
        # The first that holds.
        (
            "space: {seed: {choice: [1, 2]}, label: [{when: {seed: 1}, value: a}, {when: {seed: [1, 2]}, value: b}]}",
            {"seed@0": 1},
            {"seed": 1, "label": "a"},
            {"seed": 0, "label": 0},
        ),
        (
            "space: {seed: {choice: [1, 2]}, label: [{when: {seed: 1}, value: a}, {when: {seed: [1, 2]}, value: b}]}",
            {"seed@0": 2},
            {"seed": 2, "label": "b"},
            {"label": 1},
        ),
        # None holds: the key stays as it is in base.
        ("space: {seed: {choice: [1, 2]}, label: [{when: {seed: 1}, value: a}]}", {"seed@0": 2}, {"seed": 2}, {}),
        # A searched key's value goes before that in base.
        (
            BASE + "space: {optimizer.name: {choice: [ranger]}, label: [{when: {optimizer.name: sgd}, value: a}]}",
            {"optimizer.name@0": "ranger"},
            {"optimizer.name": "ranger"},
            {},
        ),
        # Values are drawn under the name of their branch; values that are lists become tuples.
        (
            "space: {seed: [{when: {label: z}, value: 1}, {choice: [5, 6]}], schedule.milestones: [7, 8]}",
            {"seed@1": 6},
            {"seed": 6, "schedule.milestones": (7, 8)},
            {"seed": 1, "schedule.milestones": 0},
        ),
    ],
)
def test_branches_are_taken_by_their_conditions(
    text: str, sampled: dict[str, Any], overrides: dict[str, Any], branches: dict[str, int]
) -> None:
    space = parse_space(text, "", check=False)
    assert space.overrides(sampled) == overrides
    assert branches.items() <= space.branch_of(sampled).items() and space.branch_of(sampled).keys() == overrides.keys()
    assert space.choose(lambda name, domain: sampled[name]) == sampled


def test_all_combinations_are_drawn_and_the_ends_of_ranges() -> None:
    text = """
space:
  model.stam_depth: {randint: [1, 4]}
  optimizer.lr: {loguniform: [0.25, 0.5]}
  label: [{when: {seed: 0}, choice: [a, b]}, {value: c}]
"""
    expected = [
        {"model.stam_depth@0": depth, "optimizer.lr@0": rate, "label@0": label}
        for depth in (1, 3)  # 4 is left out
        for rate in (0.25, 0.5)
        for label in ("a", "b")
    ]
    assert list(parse_space(text, "").draws()) == expected
    most = "space: {seed: {choice: [%s]}, data.fold: {choice: [%s]}}"  # 2,000 combinations are all drawn
    space = parse_space(most % (", ".join(map(str, range(250))), ", ".join(map(str, range(8)))), "", check=False)
    assert list(space.draws()) == [{"seed@0": n // 8, "data.fold@0": n % 8} for n in range(2000)]


def test_of_too_many_combinations_2000_are_spread_evenly() -> None:
    keys = [
        *("data.split", "model.stam_depth", "schedule.warmup", "train.log_every", "optimizer.k", "train.accumulate"),
        "train.validation_windows",
    ]
    space = parse_space("space: {" + ", ".join(f"{key}: {{choice: [1, 2, 3]}}" for key in keys) + "}", "", check=False)
    draws = list(space.draws())  # 3 ** 7 = 2,187 combinations
    assert len(draws) == 2000
    random = np.random.default_rng(0)
    orders = {f"{key}@0": random.permutation(2000) for key in keys}
    assert draws == [{name: int(order[n]) % 3 + 1 for name, order in orders.items()} for n in range(2000)]
    for name in orders:  # 667, 667 and 666 times
        assert sorted([draw[name] for draw in draws].count(value) for value in (1, 2, 3)) == [666, 667, 667]
    assert len({(draw["data.split@0"], draw["model.stam_depth@0"]) for draw in draws}) == 9


def test_set_changes_the_base_and_nothing_that_is_searched() -> None:
    space = load_space("demo", {"train.iterations": 70})
    assert space.base["train"] == {"iterations": 70, "batch_size": 6, "validate_every": 30, "log_every": 10}
    assert [config.train.iterations for config in configurations(space)] == [70] * 4
    larger = parse_space("samples: 2\nspace: {label: {choice: [a, b]}}", "s.yaml", {"repeats": 3, "samples": 4})
    assert (larger.samples, larger.repeats, larger.trials) == (4, 3, 12)
    with pytest.raises(UserError, match=r"s.yaml: repeats: .*, found 0"):
        parse_space("samples: 2", "s.yaml", {"repeats": 0})
    with pytest.raises(UserError) as caught:
        parse_space("space: {seed: 1}", "s.yaml", {"label": "x", "seed": 2})
    assert str(caught.value) == "--set seed: s.yaml searches this key; change it there"
    with pytest.raises(UserError, match=r"^--set: unknown key 'sed'; allowed: label, seed, streams, fusion_weight$"):
        parse_space("space: {seed: 1}", "s.yaml", {"sed": 2})


def test_a_space_is_a_file_or_the_name_of_a_shipped_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = str(Path(__file__).parents[2] / "search_spaces" / "full.yaml")
    assert find_space("full") == find_space("full.yaml") == shipped
    monkeypatch.chdir(tmp_path)
    Path("full").write_text("samples: 3")
    assert find_space("full") == "full" and load_space("full").samples == 3  # a file goes before a shipped one
    with pytest.raises(UserError) as caught:
        load_space("nosuch")
    assert str(caught.value) == (
        "nosuch: no such file, nor a shipped search space "
        "(activation, demo, full, long_tail, lu, lu_o, modern, optimizer, stam_depth, study, study_asha, "
        "study_long_tail, study_lr, table1)"
    )
    for text, message in (("samples: 0", "samples: Input should be"), ("a: [", "not valid YAML: while parsing")):
        Path("wrong.yaml").write_text(text)
        with pytest.raises(UserError, match=f"^wrong.yaml: {message}"):
            load_space("wrong.yaml")
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=r"^binary\.yaml: cannot be read \('utf-8' codec can't decode byte 0xff"):
        load_space("binary.yaml")


def test_a_key_without_a_branch_for_a_drawn_value_is_refused() -> None:
    """Its default would be used without a word. A branch without `when` at the end is an explicit default."""
    text = """
space:
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.lr:
    - {when: {optimizer.name: sgd}, loguniform: [0.01, 0.1]}
"""
    with pytest.raises(UserError) as caught:
        parse_space(text, "s.yaml")
    assert str(caught.value) == (
        "s.yaml: space.optimizer.lr: no branch for optimizer.name: ranger; add a branch, or one without 'when' at the "
        "end, for example {value: 0.001}"
    )
    assert parse_space(text + "    - {value: 0.002}\n", "s.yaml").searched_keys == ["optimizer.name", "optimizer.lr"]


@pytest.mark.parametrize(
    ("domain", "conditions", "missing"),
    [
        ("randint: [1, 5]", [1, [3, 4]], 2),
        ("randint: [1, 5]", [[1, 2], 4], 3),
        ("randint: [0, 9]", [0, [1, 2, 3, 4, 5, 6], 8], 7),
        ("choice: [1, 2, 3]", [1, 3], 2),
    ],
)
def test_every_value_that_can_be_drawn_needs_a_branch(domain: str, conditions: list[Any], missing: int) -> None:
    branches = "".join(f"    - {{when: {{model.stam_depth: {value}}}, value: 0.1}}\n" for value in conditions)
    text = f"space:\n  model.stam_depth: {{{domain}}}\n  model.dropout:\n{branches}"
    with pytest.raises(UserError, match=f"no branch for model.stam_depth: {missing};"):
        parse_space(text, "s.yaml")
    added = f"{text}    - {{when: {{model.stam_depth: {missing}}}, value: 0.2}}\n"
    assert parse_space(added, "s.yaml").searched_keys == ["model.stam_depth", "model.dropout"]


@pytest.mark.parametrize("base", ["sgd", "ranger"])
def test_a_condition_on_a_key_that_the_drawn_optimizer_lacks_does_not_hold(base: str) -> None:
    """SGD has no `k`: neither the base's value nor a default counts."""
    text = f"""
base: {{optimizer: {{name: {base}}}}}
space:
  optimizer.name: {{choice: [sgd, ranger]}}
  optimizer.k: [{{when: {{optimizer.name: ranger}}, choice: [3, 6]}}]
  model.dropout: [{{when: {{optimizer.k: 6}}, value: 0.3}}, {{value: 0.1}}]
"""
    space = parse_space(text, "s.yaml")
    for sampled, dropout in (
        ({"optimizer.name@0": "sgd"}, 0.1),
        ({"optimizer.name@0": "ranger", "optimizer.k@0": 3}, 0.1),
        ({"optimizer.name@0": "ranger", "optimizer.k@0": 6}, 0.3),
    ):
        assert space.config(sampled).model.dropout == dropout
    fixed = parse_space(text.replace("choice: [3, 6]", "value: 6"), "s.yaml")
    assert fixed.config({"optimizer.name@0": "ranger"}).model.dropout == 0.3


def test_a_branch_that_is_rarely_taken_is_accepted_in_a_large_space() -> None:
    """One of 10 x 8 x 6 x 6 x 20 combinations; one that names a value that no key has is refused all the same."""
    keys = {
        "data.fold": "randint: [0, 10]",
        "model.stam_depth": "randint: [1, 9]",
        "model.activation": "choice: [relu, swish, mish, gelu, leaky_relu, elu]",
        "train.average_checkpoints": "randint: [1, 7]",
        "train.validation_windows": "randint: [1, 21]",
    }
    text = "space:\n" + "".join(f"  {key}: {{{domain}}}\n" for key, domain in keys.items())
    when = "data.fold: 7, model.stam_depth: 5, model.activation: gelu, train.average_checkpoints: 4"
    branches = (
        f"  model.dropout: [{{when: {{{when}, train.validation_windows: WINDOWS}}, value: 0.3}}, {{value: 0.1}}]\n"
    )
    parse_space(text + branches.replace("WINDOWS", "13"), "s.yaml")
    with pytest.raises(UserError, match="branch 1 is never taken"):
        parse_space(text + branches.replace("WINDOWS", "31"), "s.yaml")
    with pytest.raises(UserError, match="branch 1 is never taken"):
        parse_space(text + branches.replace("WINDOWS", "13").replace("gelu", "gleu"), "s.yaml")


def test_a_condition_on_a_range_of_numbers_covers_no_number_between() -> None:
    text = """
space:
  loss.gaze_weight: {uniform: [0.0, 0.5]}
  model.dropout:
    - {when: {loss.gaze_weight: [0.0, 0.5]}, value: 0.1}
"""
    with pytest.raises(UserError, match=r"no branch for loss\.gaze_weight: 0\.25"):
        parse_space(text, "s.yaml")


def test_a_range_of_gaze_sigma_is_in_fractions_or_in_cells() -> None:
    for text in ("uniform: [0.5, 3]", "choice: [0.4, 2]"):
        with pytest.raises(UserError, match=r"space\.loss\.gaze_sigma: .* below 1 .* from 1 on"):
            parse_space(f"space: {{loss.gaze_sigma: {{{text}}}}}", "s.yaml")
    space = parse_space("space: {loss.gaze_sigma: {choice: [1, 3.5]}}", "s.yaml")
    assert {space.config(draw).loss.gaze_sigma for draw in space.draws()} == {1 / 7, 0.5}


def test_a_gap_in_one_of_very_many_combinations_is_noticed() -> None:
    """17^2 x 10 x 8 x 50 combinations; one of the 4,000 on which the key depends has no branch."""
    ranges = {"data.fold": range(10), "model.stam_depth": range(1, 9), "train.validation_windows": range(1, 51)}
    gap = {"data.fold": 5, "model.stam_depth": 7, "train.validation_windows": 33}
    text = "space:\n  loss.gaze_weight: {randint: [0, 17]}\n  optimizer.weight_decay: {randint: [0, 17]}\n"
    text += "".join(f"  {key}: {{randint: [{values.start}, {values.stop}]}}\n" for key, values in ranges.items())
    text += "  model.dropout:\n"
    for key, values in ranges.items():
        text += f"    - {{when: {{{key}: {[value for value in values if value != gap[key]]}}}, value: 0.1}}\n"
    with pytest.raises(UserError, match=r"no branch for data\.fold: 5, model\.stam_depth: 7, train\.val\w+: 33"):
        parse_space(text, "s.yaml")


def test_a_key_that_the_chosen_optimizer_does_not_have_needs_no_branch() -> None:
    text = """
space:
  optimizer.name: {choice: [sgd, ranger]}
  optimizer.k:
    - {when: {optimizer.name: ranger}, choice: [3, 6]}
"""
    assert parse_space(text, "s.yaml").searched_keys == ["optimizer.name", "optimizer.k"]


def test_a_key_may_not_depend_on_a_value_of_the_base_that_it_does_not_cover() -> None:
    text = "base: {streams: rgb}\nspace: {model.dropout: [{when: {streams: flow}, uniform: [0, 0.5]}]}\n"
    with pytest.raises(UserError, match="no branch for streams: rgb"):
        parse_space(text, "s.yaml")


@pytest.mark.parametrize("base", ["", "base: {optimizer: {betas: [0.9, 0.99]}}\n"], ids=["searched", "of the base"])
def test_a_condition_on_a_key_whose_values_are_lists(base: str) -> None:
    """`when` lists the values that hold, each of which is a list here."""
    searched = "" if base else "  optimizer.betas: {choice: [[0.9, 0.99], [0.95, 0.999]]}\n"
    branches = "[{when: {optimizer.betas: [[0.9, 0.99], [0, 0]]}, value: 0.5}, {value: 0.25}]"
    space = parse_space(f"{base}space:\n{searched}  optimizer.lr: {branches}", "t", check=not base)
    for betas, rate in (([0.9, 0.99], 0.5), ([0.95, 0.999], 0.25))[: 1 if base else 2]:
        sampled = {} if base else {"optimizer.betas@0": betas}
        assert space.config(sampled).optimizer.lr == rate
