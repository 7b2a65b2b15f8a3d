"""Configurations: defaults, limits, reading, writing and changing them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tune_ego.config import Config
from tune_ego.config_io import build_config, config_keys, dump_config, load_config, override, override_config
from tune_ego.errors import UserError
from tune_ego.training.optim import Ranger
from tune_ego.yaml_files import parse_yaml


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


DEFAULTS = """\
label: ''
seed: 0
streams: both
fusion_weight: 0.5            # the mean of both (Lu)
data:
  split: 1                    # the one that both papers report
  validation: stratified
  fold: 0
  crop: 224                   # Lu
  window_frames: 16           # Lu
  frame_step: 1
  sampling: uniform           # Lu
  decode: cpu
  cache_dir: null
  cache_gb: 50.0
augment:                      # none beyond Lu's crop and flip
  scale: [1.0, 1.0]
  aspect: 1.0
  colour: 0.0
  mixup: 0.0
  mixup_share: 0.5
model:
  backbone: i3d               # Lu
  stam_depth: 1               # Lu's "-a"
  stam_block: inception       # Lu
  copy_init: false
  activation: relu            # Lu
  activation_scope: stam
  attention_scale: min_max    # Lu, as written
  width: 1.0                  # I3D
  dropout: 0.5                # Lu
  sync_bn: false
  bn_momentum: 0.01           # I3D
  freeze_trunk_norms: false
optimizer:
  name: ranger                # the paper, with Ranger's own settings
  trunk_lr: null
  decay_all: true
  lr: 0.001
  betas: [0.95, 0.999]
  eps: 1.0e-05
  weight_decay: 0.0
  k: 6
  alpha: 0.5
schedule:
  name: plateau               # the paper
  factor: 0.5
  patience: 5
  warmup: 0
loss:
  gaze_weight: 0.1            # Lu
  gaze_sigma: 0.42857142857142855  # Lu, 3 cells of 7
  logit_adjustment: 0.0
  class_weights: none
  effective_beta: 0.99
  label_smoothing: 0.0
train:
  iterations: 3000            # the paper
  batch_size: 12              # a pass of Lu's code
  accumulate: 1
  clip_norm: null
  freeze_trunk_for: 0
  ema: 0.0
  deterministic: false
  precision: auto
  compile: auto
  activation_checkpointing: false
  validate_every: 100
  average_checkpoints: 1
  validation_windows: 1
  log_every: 10
compute:
  workers: 1
  gpus_per_worker: auto
  cpus_per_worker: 1.0
  readers: auto
  max_failures: 3
init_from:
  rgb: null
  flow: null
"""
"""The recipe of the paper, in Lu's model: every key."""
OTHERS: dict[tuple[str, str], dict[str, Any]] = {
    ("optimizer", "sgd"): {"lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-7}  # Lu
    | {"trunk_lr": None, "decay_all": True},
    ("optimizer", "adamw"): {"lr": 1e-3, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}  # PyTorch's
    | {"trunk_lr": None, "decay_all": False},
    ("optimizer", "muon"): {"lr": 1e-3, "momentum": 0.95, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.01}
    | {"trunk_lr": None, "decay_all": False},
    ("schedule", "flat_cosine"): {"flat": 0.72, "floor": 0.0, "horizon": None, "warmup": 0},  # Ranger's author
    ("schedule", "multistep"): {"milestones": [300, 1000], "gamma": 0.1, "warmup": 0},  # Lu's code
    ("schedule", "cosine"): {"floor": 0.0, "horizon": None, "warmup": 0},
    ("schedule", "constant"): {"warmup": 0},
}
KEYS = """
label seed streams fusion_weight
data.split data.validation data.fold data.crop data.window_frames data.frame_step data.sampling data.decode
data.cache_dir data.cache_gb
augment.scale augment.aspect augment.colour augment.mixup augment.mixup_share
model.backbone model.stam_depth model.stam_block model.copy_init model.activation model.activation_scope
model.attention_scale
model.width model.dropout model.sync_bn model.bn_momentum model.freeze_trunk_norms
optimizer.name optimizer.trunk_lr optimizer.decay_all optimizer.lr optimizer.momentum optimizer.nesterov
optimizer.weight_decay optimizer.betas optimizer.eps optimizer.k optimizer.alpha
schedule.warmup schedule.name schedule.factor schedule.patience schedule.milestones schedule.gamma schedule.flat
schedule.floor schedule.horizon
loss.gaze_weight loss.gaze_sigma loss.logit_adjustment loss.class_weights loss.effective_beta loss.label_smoothing
train.iterations train.batch_size train.accumulate train.clip_norm train.freeze_trunk_for train.ema
train.deterministic train.precision train.compile
train.activation_checkpointing train.validate_every train.average_checkpoints train.validation_windows train.log_every
compute.workers compute.gpus_per_worker compute.cpus_per_worker compute.readers compute.max_failures
init_from.rgb init_from.flow
"""


def test_defaults_are_the_papers() -> None:
    assert yaml.safe_load(dump_config(Config())) == yaml.safe_load(DEFAULTS)
    for (part, name), rest in OTHERS.items():
        config = override_config(Config(), {f"{part}.name": name}, "t")
        assert yaml.safe_load(dump_config(config)) == {
            **yaml.safe_load(DEFAULTS),
            part: {"name": name, **rest},
        }


def test_a_dumped_configuration_reads_back(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, DEFAULTS)) == Config()
    changes = {"optimizer.name": "sgd", "train.precision": "off", "schedule.name": "multistep"}
    config = override_config(Config(), changes, "t")
    text = dump_config(config)
    assert "precision: 'off'" in text and list(yaml.safe_load(text)) == list(yaml.safe_load(DEFAULTS))
    assert load_config(write(tmp_path, text + "provenance: {trial: '00001'}\n")) == config


def test_numbers_and_words_mean_what_people_write() -> None:
    read = parse_yaml("[1e-3, 1.5, .5, 3, off, no, true, 1.5E+3, -2e2, 2026-01-01, false, 1., e3, True]", "t")
    assert read == [1e-3, 1.5, 0.5, 3, "off", "no", True, 1500.0, -200.0, "2026-01-01", False, 1.0, "e3", True]


def test_every_key_of_a_configuration() -> None:
    assert sorted(config_keys()) == sorted(KEYS.split())


def test_another_optimizer_starts_with_its_own_defaults() -> None:
    ranger = override_config(Config(), {"optimizer.k": 9, "optimizer.lr": 0.5}, "t")
    sgd = override_config(ranger, {"optimizer.momentum": 0.5, "optimizer.name": "sgd"}, "t")
    assert sgd.optimizer.model_dump() == {"name": "sgd", **OTHERS["optimizer", "sgd"], "momentum": 0.5}
    same = override_config(ranger, {"optimizer.name": "ranger"}, "t")
    assert same == ranger and same.optimizer.model_dump()["k"] == 9


def test_dotted_keys_change_a_copy_of_the_tree() -> None:
    tree = {"label": "a", "optimizer": {"lr": 0.5}, "train": {"iterations": 5}}
    changed = override(tree, {"label": "b", "optimizer.k": 2, "loss.gaze_weight": 0.0, "schedule.name": "cosine"})
    assert changed == {
        "label": "b",
        "optimizer": {"lr": 0.5, "k": 2},
        "train": {"iterations": 5},
        "loss": {"gaze_weight": 0.0},
        "schedule": {"name": "cosine"},
    }
    assert tree == {"label": "a", "optimizer": {"lr": 0.5}, "train": {"iterations": 5}}
    # Without a name the settings are those of the default, which is Ranger.
    assert override(tree, {"optimizer.name": "ranger"})["optimizer"] == {"name": "ranger", "lr": 0.5}
    assert override(tree, {"optimizer.name": "sgd"})["optimizer"] == {"name": "sgd"}
    with pytest.raises(UserError, match=r"^train: expected keys and values, found 3$"):
        override({"train": 3}, {"train.iterations": 1})


def test_settings_without_a_name_belong_to_the_default() -> None:
    tree = {"optimizer": {"lr": 0.5}, "schedule": {"patience": 1}}
    config = build_config(tree, "t")
    assert (config.optimizer.name, config.optimizer.lr, config.schedule.name) == ("ranger", 0.5, "plateau")
    assert tree == {"optimizer": {"lr": 0.5}, "schedule": {"patience": 1}}


@pytest.mark.parametrize(
    ("changes", "passes", "micro_batch", "horizon", "workers"),
    [
        ({}, 1, 12, 3000, (1, 1)),
        ({"train.accumulate": 3, "compute.workers": 2}, 6, 2, 3000, (2, 2)),
        # As many as the most, however many there are.
        ({"train.accumulate": 2, "compute.workers": (1, 3), "train.iterations": 50}, 6, 2, 50, (1, 3)),
        ({"schedule.name": "cosine", "train.iterations": 50}, 1, 12, 50, (1, 1)),
        ({"schedule.name": "cosine", "schedule.horizon": 70, "train.iterations": 50}, 1, 12, 70, (1, 1)),
        ({"schedule.name": "cosine", "schedule.horizon": 50, "train.iterations": 50}, 1, 12, 50, (1, 1)),
        ({"schedule.name": "flat_cosine", "schedule.horizon": 70, "train.iterations": 50}, 1, 12, 70, (1, 1)),
    ],
)
def test_what_follows_from_a_configuration(
    changes: dict[str, Any], passes: int, micro_batch: int, horizon: int, workers: tuple[int, int]
) -> None:
    config = override_config(Config(), changes, "t")
    assert (config.passes, config.micro_batch, config.horizon) == (passes, micro_batch, horizon)
    assert (config.compute.least_workers, config.compute.most_workers) == workers


def test_the_streams_of_a_configuration() -> None:
    names = {streams: Config(streams=streams).stream_names for streams in ("rgb", "flow", "both")}
    assert names == {"rgb": ("rgb",), "flow": ("flow",), "both": ("rgb", "flow")}


LIMITS: list[tuple[str, list[Any], list[Any]]] = [
    # Key, values just within the limits, values just outside.
    ("seed", [0], [-1, 0.5]),
    ("streams", ["rgb", "flow", "both"], ["fused"]),
    ("fusion_weight", [0.0, 1.0], [-0.001, 1.001]),
    ("data.split", [1, 2, 3], [0, 4]),
    ("data.validation", ["stratified", "by_session"], ["random"]),
    ("data.fold", [0, 9], [-1, 10]),
    ("data.crop", [32], [31]),
    ("data.window_frames", [16, 32], [8, "16"]),
    ("data.frame_step", [1, 8], [0, 9]),
    ("data.decode", ["auto", "cpu", "gpu"], ["nvjpeg"]),
    ("data.cache_dir", ["/cache", None], ["cache", ""]),
    ("data.cache_gb", [0.001], [0.0]),
    ("augment.scale", [[0.1, 0.1], [0.5, 2.0]], [[0.0, 1.0], [1.0, 0.5], [1.0]]),
    ("augment.aspect", [1.0, 3.0], [0.99]),
    ("augment.colour", [0.0, 0.99], [-0.1, 1.0]),
    ("augment.mixup", [0.0, 2.0], [-0.1]),
    ("augment.mixup_share", [0.0, 1.0], [-0.1, 1.1]),
    ("model.backbone", ["i3d", "s3d", "r2plus1d_18", "mvit_v2_s", "swin3d_t"], ["vit"]),
    ("model.stam_depth", [0, 8], [-1, 9]),
    ("model.stam_block", ["inception", "attention"], ["mlp"]),
    ("model.copy_init", [True, False], [1]),
    ("model.activation", ["relu", "swish", "mish", "gelu", "leaky_relu", "elu"], ["tanh"]),
    ("model.activation_scope", ["stam", "all"], ["trunk"]),
    ("model.attention_scale", ["min_max", "subtract_min"], ["softmax"]),
    ("model.width", [0.001, 1.0], [0.0, 1.001]),
    ("model.dropout", [0.0, 0.999], [-0.001, 1.0]),
    ("model.sync_bn", [True], ["yes"]),
    ("model.bn_momentum", [0.001, 1.0], [0.0, 1.001]),
    ("model.freeze_trunk_norms", [True], ["yes"]),
    ("optimizer.lr", [1e-9, 100.0], [0.0]),
    ("optimizer.trunk_lr", [1e-9, None], [0.0]),
    ("optimizer.decay_all", [True, False], [1]),
    ("optimizer.betas", [[0.0, 0.999]], [[1.0, 0.9], [0.9, 1.0], [-0.1, 0.9], [0.9]]),
    ("optimizer.eps", [1e-30], [0.0]),
    ("optimizer.weight_decay", [0.0, 2.0], [-1e-9]),
    ("optimizer.k", [1], [0]),
    ("optimizer.alpha", [0.001, 1.0], [0.0, 1.001]),
    ("schedule.factor", [0.001, 0.999], [0.0, 1.0]),
    ("schedule.patience", [0], [-1]),
    ("schedule.warmup", [0, 2999], [-1, 3000]),
    ("loss.gaze_weight", [0.0, 5.0], [-0.001]),
    ("loss.gaze_sigma", [0.001, 0.999], [0.0, -1.0]),
    ("loss.logit_adjustment", [0.0, 2.0], [-0.1]),
    ("loss.class_weights", ["none", "inverse", "effective"], ["equal"]),
    ("loss.effective_beta", [0.0, 0.999], [-0.1, 1.0]),
    ("loss.label_smoothing", [0.0, 0.9], [-0.1, 1.0]),
    ("data.sampling", ["uniform", "square_root", "class_balanced"], ["balanced"]),
    ("train.iterations", [1], [0]),
    ("train.batch_size", [1], [0]),
    ("train.accumulate", [1, 12], [0, 5, 24]),
    ("train.clip_norm", [0.001, None], [0.0]),
    ("train.freeze_trunk_for", [0, 9000], [-1]),
    ("train.ema", [0.0, 0.9999], [-0.1, 1.0]),
    ("train.deterministic", [True], ["yes"]),
    ("train.precision", ["auto", "off", "fp16", "bf16"], ["fp8", False]),
    ("train.compile", ["auto", "on", "off"], ["yes"]),
    ("train.validate_every", [1], [0]),
    ("train.average_checkpoints", [1], [0]),
    ("train.validation_windows", [1], [0]),
    ("train.log_every", [1], [0]),
    ("compute.workers", [1, [1, 1], [2, 4]], [0, [0, 1], [2, 1], [1, 2, 3], 5, [1, 5]]),
    ("compute.gpus_per_worker", ["auto", 0, 0.25, 1], [-0.25, "all", 2]),
    ("compute.cpus_per_worker", [0.25], [0.0]),
    ("compute.readers", [1, "auto"], [0, "all"]),
    ("compute.max_failures", [-1, 0], [-2]),
    ("init_from.rgb", ["weights.pt", None], [3]),
]
MORE_LIMITS: list[tuple[str, str, list[Any], list[Any]]] = [
    ("optimizer.name=sgd", "optimizer.momentum", [0.0, 0.999], [-0.001, 1.0]),
    ("optimizer.name=sgd", "optimizer.weight_decay", [0.0], [-1e-9]),
    ("optimizer.name=sgd", "optimizer.nesterov", [True], [1]),
    ("optimizer.name=adamw", "optimizer.betas", [[0.0, 0.999]], [[1.0, 0.9], [0.9]]),
    ("optimizer.name=adamw", "optimizer.eps", [1e-30], [0.0]),
    ("optimizer.name=adamw", "optimizer.weight_decay", [0.0], [-1e-9]),
    ("optimizer.name=muon", "optimizer.momentum", [0.0, 0.999], [-0.001, 1.0]),
    ("optimizer.name=muon", "optimizer.betas", [[0.0, 0.999]], [[1.0, 0.9], [0.9]]),
    ("optimizer.name=muon", "optimizer.eps", [1e-30], [0.0]),
    ("optimizer.name=muon", "optimizer.weight_decay", [0.0], [-1e-9]),
    ("optimizer.name=muon", "optimizer.lr", [1e-9], [0.0]),
    ("optimizer.name=adamw", "optimizer.lr", [1e-9], [0.0]),
    ("schedule.name=flat_cosine", "schedule.flat", [0.0, 1.0], [-0.001, 1.001]),
    ("schedule.name=flat_cosine", "schedule.floor", [0.0, 0.999], [-0.001, 1.0]),
    ("schedule.name=flat_cosine", "schedule.horizon", [3000, 9000, None], [2999, 0]),
    ("optimizer.name=sgd", "optimizer.lr", [1e-9], [0.0]),
    ("schedule.name=multistep", "schedule.milestones", [[], [1, 5]], [[0], [-3, 5]]),
    ("schedule.name=multistep", "schedule.gamma", [0.001, 0.999], [0.0, 1.0]),
    ("schedule.name=cosine", "schedule.floor", [0.0, 0.999], [-0.001, 1.0]),
    ("schedule.name=cosine", "schedule.horizon", [3000, 9000, None], [2999, 0]),
]


@pytest.mark.parametrize(
    ("choice", "key", "within", "outside"),
    [*(("", *row) for row in LIMITS), *MORE_LIMITS],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_limits_of_the_values(choice: str, key: str, within: list[Any], outside: list[Any]) -> None:
    name, _, chosen = choice.partition("=")
    base = {name: chosen} if choice else {}
    for value in within:
        config = override_config(Config(), {**base, key: value}, "t")
        part, _, leaf = key.rpartition(".")
        node = getattr(config, part) if part else config
        assert getattr(node, leaf) == (tuple(value) if isinstance(value, list) else value)
    for value in outside:
        with pytest.raises(UserError, match=rf"^t: {part or leaf}|^t: train\.batch_size"):
            override_config(Config(), {**base, key: value}, "t")


def test_a_configuration_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        Config().train.iterations = 1  # type: ignore[misc]


def test_ranger_s_own_defaults_are_the_configuration_s() -> None:
    (group,) = Ranger([torch.nn.Parameter(torch.ones(1))]).param_groups
    ranger = yaml.safe_load(DEFAULTS)["optimizer"]
    own = {key: value for key, value in ranger.items() if key not in ("name", "trunk_lr", "decay_all")}
    assert {key: group[key] for key in own} == {**own, "betas": (0.95, 0.999)}


NAMES = "trunk_lr decay_all name lr momentum nesterov weight_decay betas eps k alpha"
OPTIMIZER_KEYS = ", ".join(f"optimizer.{name}" for name in NAMES.split())
MODEL_KEYS = ", ".join(key for key in KEYS.split() if key.startswith("model."))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {stam_dept: 1}", f"unknown key 'model.stam_dept'; allowed: {MODEL_KEYS}"),
        ("model: {a: 1, b: 2}", f"unknown key 'model.a'; allowed: {MODEL_KEYS} (and 1 more)"),
        ("mdoel: {width: 1.0}", "unknown key 'mdoel'; allowed: label, seed, streams, fusion_weight"),
        ("model: {stam_depth: '1'}", "model.stam_depth: Input should be a valid integer, found '1'"),
        ("seed: -1\nlabel: 3", "label: Input should be a valid string, found 3 (and 1 more)"),
        (
            "model: {activation: tanh}",
            "model.activation: Input should be 'relu', 'swish', 'mish', 'gelu', 'leaky_relu' or 'elu', found 'tanh'",
        ),
        (
            "optimizer: {name: adam}",
            "optimizer: Input tag 'adam' found using 'name' does not match any of the expected tags: 'sgd', 'ranger', "
            "'adamw', 'muon', "
            "found {'name': 'adam'}",
        ),
        (
            "optimizer: {name: ranger, momentum: 0.9}",
            "key 'optimizer.momentum' does not belong to the optimizer that optimizer.name chooses",
        ),
        ("optimizer: {k: 0}", "optimizer.k: Input should be greater than or equal to 1, found 0"),
        (
            "train: {batch_size: 7, accumulate: 2}",
            "train.batch_size = 7 is not a multiple of compute.workers x train.accumulate = 2",
        ),
        ("compute: {workers: [3, 2]}", "compute.workers = [3, 2]: expected [least, most]"),
        (
            "train: {iterations: 50}\nschedule: {warmup: 50}",
            "schedule.warmup = 50 does not end within train.iterations = 50",
        ),
        (
            "train: {iterations: 50}\nschedule: {name: cosine, horizon: 49}",
            "schedule.horizon = 49 is before the end of the run, train.iterations = 50",
        ),
        ("schedule: {name: cosine, horizon: x}", "schedule.horizon: Input should be a valid integer, found 'x'"),
        (
            "schedule: {name: plateau, horizon: 9000}",
            "key 'schedule.horizon' does not belong to the schedule that schedule.name chooses",
        ),
        ("train: {iterations: 0}", "train.iterations: Input should be greater than or equal to 1, found 0"),
        ("model: {width: .nan}", "model.width: Input should be a finite number, found nan"),
        ("- 1", "expected keys and values, found list"),
    ],
)
def test_mistakes_name_file_key_and_what_is_allowed(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError) as caught:
        load_config(file)
    assert str(caught.value) == f"{file}: {message}"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("compute: {gpus_per_worker: many}", ["compute.gpus_per_worker", "'many'"]),
        ("seed: 1\nseed: 2", ["not valid YAML: key 'seed' given twice", "line 1, column 1"]),
        ("train: {seed: 1, seed: 2}", ["key 'seed' given twice"]),
        ("a: [", ["not valid YAML: while parsing"]),
    ],
)
def test_mistakes_in_the_words_of_libraries(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config(write(tmp_path, text))
    assert str(caught.value).startswith(f"{tmp_path / 'config.yaml'}: ") and "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^\S+absent\.yaml: cannot be read \("):
        load_config(tmp_path / "absent.yaml")


def test_an_unknown_override_names_its_neighbours() -> None:
    with pytest.raises(UserError) as caught:
        override_config(Config(), {"optimizer.lrr": 1}, "--set")
    assert str(caught.value) == (f"--set: unknown key 'optimizer.lrr'; allowed: {OPTIMIZER_KEYS}")
    with pytest.raises(UserError, match=r"^t: unknown key 'nosuch\.key'; allowed: label, seed, .*, init_from\.flow$"):
        override_config(Config(), {"nosuch.key": 1}, "t")


def test_a_gaze_sigma_in_cells_is_converted_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of version 0.1 have cells of a 7 x 7 map; a fraction of 1 or more would be a flat target."""
    file = tmp_path / "config.yaml"
    for cells in (3.0, 1, 1.5):
        file.write_text(f"loss: {{gaze_sigma: {cells}}}\n")
        assert load_config(file).loss.gaze_sigma == cells / 7
    line = "loss.gaze_sigma of 1 or more is in cells of a 7 x 7 map, as in version 0.1: it is divided by 7"
    assert capsys.readouterr().out.splitlines() == [f"{file}: {line}"]
    for fraction in (0.2, 0.999):
        file.write_text(f"loss: {{gaze_sigma: {fraction}}}\n")
        assert load_config(file).loss.gaze_sigma == fraction
    assert not capsys.readouterr().out
    for value in (math.inf, True, "1"):
        with pytest.raises(UserError, match=r"loss\.gaze_sigma"):
            build_config({"loss": {"gaze_sigma": value}}, "x")
    with pytest.raises(UserError, match=r"^x: loss\.gaze_sigma 7\.5: .* is below 1, and a number of cells .* below 7$"):
        build_config({"loss": {"gaze_sigma": 7.5}}, "x")


@pytest.mark.parametrize(
    ("gpus", "workers", "message"),
    [
        (0, 1, None),
        (1, 4, None),
        (0.5, 1, None),
        (2, 1, "a worker computes on one GPU; for more GPUs raise compute.workers"),
        (1.5, 1, "a worker computes on one GPU; for more GPUs raise compute.workers"),
        (0.5, 2, "workers of one run cannot share a GPU"),
        (0.5, [1, 2], "workers of one run cannot share a GPU"),
    ],
)
def test_a_worker_has_one_gpu_or_a_part_of_one(gpus: float, workers: Any, message: str | None) -> None:
    tree = {"compute": {"gpus_per_worker": gpus, "workers": workers}}
    if message is None:
        assert build_config(tree, "x").compute.gpus_per_worker == gpus
    else:
        with pytest.raises(UserError, match=rf"x: compute\.gpus_per_worker = {gpus:g}: {message}"):
            build_config(tree, "x")
