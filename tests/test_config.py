from __future__ import annotations

from pathlib import Path

import pytest

from tune_ego.config import Config, dump_config, load_config, override_config, parse_yaml
from tune_ego.errors import UserError


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
