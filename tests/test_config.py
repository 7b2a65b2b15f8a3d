from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tune_ego.config import Config, dump_config, load_config, override_config
from tune_ego.errors import UserError
from tune_ego.optim import Ranger
from tune_ego.yaml_files import parse_yaml


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def test_a_dumped_configuration_reads_back(tmp_path: Path) -> None:
    config = override_config(
        Config(), {"optimizer.name": "sgd", "train.precision": "off", "schedule.name": "multistep"}, "t"
    )
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_numbers_and_words_mean_what_people_write() -> None:
    assert parse_yaml("[1e-3, 1.5, .5, 3, off, no, true]", "t") == [1e-3, 1.5, 0.5, 3, "off", "no", True]


def test_another_optimizer_starts_with_its_own_defaults() -> None:
    ranger = override_config(Config(), {"optimizer.k": 9, "optimizer.lr": 0.5}, "t")
    sgd = override_config(ranger, {"optimizer.name": "sgd", "optimizer.momentum": 0.5}, "t")
    assert sgd.optimizer.model_dump() == {"name": "sgd", "lr": 0.1, "momentum": 0.5, "weight_decay": 1e-7}


DEFAULTS = {
    "streams": "both",
    "fusion_weight": 0.5,
    "data": {
        "split": 1,
        "validation": "stratified",
        "fold": 0,
        "crop": 224,
        "decode": "cpu",
        "cache_dir": None,
        "cache_gb": 50.0,
    },
    "model": {
        "stam_depth": 1,
        "stam_block": "inception",
        "copy_init": False,
        "activation": "relu",
        "activation_scope": "stam",
        "attention_scale": "min_max",
        "width": 1.0,
        "dropout": 0.5,
        "bn_momentum": 0.01,
    },
    "optimizer": {
        "name": "ranger",
        "lr": 1e-3,
        "betas": (0.95, 0.999),
        "eps": 1e-5,
        "weight_decay": 0.0,
        "k": 6,
        "alpha": 0.5,
    },
    "schedule": {"name": "plateau", "factor": 0.5, "patience": 5, "warmup": 0},
    "loss": {"gaze_weight": 0.1, "gaze_sigma": 3.0},
    "train": {
        "iterations": 3000,
        "batch_size": 12,
        "accumulate": 1,
        "deterministic": False,
        "precision": "auto",
        "compile": "auto",
        "activation_checkpointing": False,
        "validate_every": 100,
        "average_checkpoints": 1,
        "validation_windows": 1,
        "log_every": 10,
    },
    "init_from": {"rgb": None, "flow": None},
}
"""The recipe of the paper, in Lu's model."""


def test_defaults_are_the_papers() -> None:
    found = Config().model_dump()
    assert {key: found[key] for key in DEFAULTS} == DEFAULTS
    assert found.keys() - DEFAULTS.keys() == {"label", "seed", "compute"}
    for part, name, rest in (
        ("optimizer", "sgd", {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-7}),
        ("schedule", "multistep", {"milestones": (300, 1000), "gamma": 0.1, "warmup": 0}),
        ("schedule", "cosine", {"floor": 0.0, "horizon": None, "warmup": 0}),
        ("schedule", "constant", {"warmup": 0}),
    ):
        config = override_config(Config(), {f"{part}.name": name}, "t")
        assert getattr(config, part).model_dump() == {"name": name, **rest}


def test_ranger_s_own_defaults_are_the_configuration_s() -> None:
    (group,) = Ranger([torch.nn.Parameter(torch.ones(1))]).param_groups
    ranger = {key: value for key, value in Config().optimizer.model_dump().items() if key != "name"}
    assert {key: group[key] for key in ranger} == ranger


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: {stam_dept: 1}", ["config.yaml", "model.stam_dept", "stam_depth"]),
        ("model: {stam_depth: '1'}", ["model.stam_depth", "integer", "'1'"]),
        ("model: {activation: tanh}", ["model.activation", "'relu'", "'tanh'"]),
        ("optimizer: {name: adam}", ["optimizer", "adam", "'sgd'", "'ranger'"]),
        ("optimizer: {name: ranger, momentum: 0.9}", ["optimizer.momentum", "does not belong"]),
        ("train: {batch_size: 7, accumulate: 2}", ["train.batch_size = 7", "multiple"]),
        ("compute: {gpus_per_worker: many}", ["compute.gpus_per_worker", "'many'"]),
        ("train: {iterations: 50}\nschedule: {warmup: 50}", ["schedule.warmup = 50", "train.iterations = 50"]),
        (
            "train: {iterations: 50}\nschedule: {name: cosine, horizon: 49}",
            ["schedule.horizon = 49", "iterations = 50"],
        ),
        ("schedule: {name: cosine, horizon: x}", ["schedule.horizon", "integer", "'x'"]),
        ("schedule: {name: plateau, horizon: 9000}", ["schedule.horizon", "does not belong"]),
        ("train: {iterations: 0}", ["train.iterations", "greater than or equal to 1"]),
        ("- 1", ["config.yaml", "keys and values"]),
        ("seed: 1\nseed: 2", ["config.yaml", "'seed' given twice"]),
        ("a: [", ["config.yaml", "YAML"]),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    assert all(word in str(caught.value) for word in words), caught.value


def test_an_unknown_override_names_its_neighbours() -> None:
    with pytest.raises(UserError, match=r"optimizer\.lrr.*optimizer\.lr"):
        override_config(Config(), {"optimizer.lrr": 1}, "--set")
