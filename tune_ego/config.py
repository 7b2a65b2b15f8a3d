"""The configuration of one run: one typed tree, one YAML file.

A `Config` is immutable and complete: every value a run depends on is in it, with a default from
Lu, Liao, Li (ICCV Workshops 2019; "Lu") or Straminsky, Jacobo, Buemi ("the paper").
Keys are written with dots: `--set optimizer.lr=1e-3`, `optimizer.lr:` in a search space.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tune_ego.console import say_once
from tune_ego.errors import UserError
from tune_ego.yaml_files import read_yaml

WINDOW_FRAMES = 16
"""Frames of a window (Lu)."""

Stream = Literal["rgb", "flow"]
Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Strict types would refuse the lists that YAML gives where a field is a tuple.
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]
Workers = Annotated[tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]], Field(strict=False)]
Milestones = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(strict=False)]


class _Node(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class DataConfig(_Node):
    split: Literal[1, 2, 3] = 1
    """Official EGTEA split."""
    validation: Literal["stratified", "by_session"] = "stratified"
    """Choice of validation clips from the training split: at random per class (like the official splits, whose
    train and test clips share sessions), or by whole sessions (which measures generalisation to new recordings)."""
    fold: int = Field(0, ge=0, le=9)
    """Tenth of the training clips that is used for validation."""
    crop: int = Field(224, ge=32)
    """Side of the square crop, pixels (Lu)."""
    decode: Literal["auto", "cpu", "gpu"] = "cpu"
    """Device that decodes JPEG images in training and validation. `cpu`: in the readers. `gpu`: nvJPEG, for machines
    with few CPUs for each GPU; its pixels differ a little. `auto`: on the GPU where a run has one. `evaluate` always
    decodes on the CPU."""
    cache_dir: Union[Annotated[str, Field(pattern="^/")], None] = None
    """Folder (an absolute path) on each machine, in which shards of an object store are cached."""
    cache_gb: Positive = 50.0
    """Largest size of the cache, GB; the least recently used shards are removed. All of EGTEA is about 20 GB."""


class ModelConfig(_Node):
    stam_depth: int = Field(1, ge=0, le=8)
    """Blocks in the attention module: 0 is no attention (Lu's "-o"), 1 is Lu's "-a", 3 the paper's experiment 3."""
    stam_block: Literal["inception", "attention"] = "inception"
    """Kind of STAM's blocks: Lu's inception block, or multi-head self-attention over the map's positions with relative
    position terms (not in the papers)."""
    copy_init: bool = False
    """Initialise STAM's second and later blocks as copies of the first, where a weights file lacks them."""
    activation: Literal["relu", "swish", "mish", "gelu", "leaky_relu", "elu"] = "relu"
    """Activation function of the modules named by `activation_scope` (the paper's third axis)."""
    activation_scope: Literal["stam", "all"] = "stam"
    """`stam`: the attention module's blocks only; `all`: the I3D trunk too."""
    attention_scale: Literal["min_max", "subtract_min"] = "min_max"
    """Scaling of each clip's attention map: `min_max` as in Lu's text, `subtract_min` as in the released code."""
    width: float = Field(1.0, gt=0, le=1)
    """Factor on every channel count, rounded to whole channels; 1 is I3D. CPUs can train 0.25."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Dropout rate before the classifier (Lu)."""
    sync_bn: bool = False
    """Normalise over the samples of all workers, on GPUs: with several workers each one has few samples."""
    bn_momentum: float = Field(0.01, gt=0, le=1)
    """Weight of a new batch in BatchNorm's running statistics (I3D); runs of a few hundred iterations need 0.1."""


class SGDConfig(_Node):
    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    """Learning rate (Lu)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-7


class RangerConfig(_Node):
    name: Literal["ranger"] = "ranger"
    lr: Positive = 1e-3
    """Learning rate (the paper)."""
    betas: Betas = (0.95, 0.999)
    eps: Positive = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    k: int = Field(6, ge=1)
    """Optimizer steps between two updates of LookAhead's slow weights."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Step of the slow weights towards the fast weights, as a fraction of their distance."""


class _ScheduleNode(_Node):
    warmup: int = Field(0, ge=0)
    """Iterations over which the learning rate first rises linearly to `optimizer.lr`. Validations in this time do not
    count for `plateau`."""


class PlateauConfig(_ScheduleNode):
    name: Literal["plateau"] = "plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: int = Field(5, ge=0)
    """Validations without a better mean class accuracy before the rate falls (the paper)."""


class MultiStepConfig(_ScheduleNode):
    name: Literal["multistep"] = "multistep"
    milestones: Milestones = (300, 1000)
    """Iterations after which the learning rate is multiplied by `gamma` (Lu's code)."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1


class CosineConfig(_ScheduleNode):
    name: Literal["cosine"] = "cosine"
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Learning rate at the horizon and beyond, as a fraction of `optimizer.lr`."""
    horizon: Union[Annotated[int, Field(ge=1)], None] = None
    """Iteration at which the floor is reached; null: `train.iterations`. A search whose trials are shorter than the
    final run, or may be extended later, sets the final run's iterations here."""


class ConstantConfig(_ScheduleNode):
    name: Literal["constant"] = "constant"


class LossConfig(_Node):
    gaze_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the gaze loss in the total loss (Lu); with 0 gaze is not used (Lu's "-v")."""
    gaze_sigma: Positive = 3 / 7
    """Standard deviation of the gaze target, as a fraction of the attention map's side (Lu: 3 cells of 7)."""


class TrainConfig(_Node):
    iterations: int = Field(3000, ge=1)
    """Optimizer steps of the run (the paper)."""
    batch_size: int = Field(12, ge=1)
    """Samples per iteration, over all workers and accumulation steps. Lu's code accumulates 4 forward passes of 12
    samples: `batch_size: 48, accumulate: 4`."""
    accumulate: int = Field(1, ge=1)
    """Forward-backward passes per iteration and worker: the parts into which a worker's share of a batch is cut."""
    deterministic: bool = False
    """Use kernels that give the same bits at each run on the same machine. On GPUs they are slower; on CPUs all
    kernels are deterministic."""
    precision: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """Mixed precision. auto: bf16 where the GPU supports it, else fp16 with loss scaling; off on a CPU, where 16-bit
    arithmetic is slow."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, on GPUs only, as it costs minutes at each start. auto: for final runs of 10,000 iterations and
    more. Never with `deterministic` or `activation_checkpointing`."""
    activation_checkpointing: bool = False
    """Recompute activations inside layers during the backward pass. The results are the same. Measured: 1.4 times the
    time on a CPU; on an H200 1.7 times the time and half of the memory."""
    validate_every: int = Field(100, ge=1)
    """Iterations between validations (and checkpoints); a validation follows the last iteration, too."""
    average_checkpoints: int = Field(1, ge=1)
    """Number of last validations whose weights are averaged into a final run's weights."""
    validation_windows: int = Field(1, ge=1)
    """Windows per validation clip, evenly spaced."""
    log_every: int = Field(10, ge=1)
    """Iterations between lines of metrics.jsonl."""


class ComputeConfig(_Node):
    workers: Union[Annotated[int, Field(ge=1)], Workers] = 1
    """Training processes (DDP). [least, most]: elastic, as many as the cluster has room for at the time; the batch and
    its micro-batches stay those of `most`. Elastic workers are for final runs only."""
    gpus_per_worker: Union[Literal["auto"], Annotated[float, Field(ge=0)]] = "auto"
    """GPUs of a training process: 1, 0, or a fraction of one that trials share (with one worker). auto: one where the
    cluster has GPUs, else none."""
    cpus_per_worker: Positive = 1.0
    """CPUs that Ray reserves for a training process. Without GPUs this is also its number of threads, rounded up."""
    readers: int = Field(1, ge=1)
    """Concurrent reader tasks per worker; a quarter of a CPU is reserved for each."""
    max_failures: int = Field(3, ge=-1)
    """Restarts from the last checkpoint after a worker failed; -1: unlimited. Preemptions are not counted."""

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class InitConfig(_Node):
    rgb: str | None = None
    """Initial weights of the RGB stream: a published weights file, or a run, a checkpoint or a `model.pt`."""
    flow: str | None = None


Optimizer = Annotated[Union[SGDConfig, RangerConfig], Field(discriminator="name")]
Schedule = Annotated[Union[PlateauConfig, MultiStepConfig, CosineConfig, ConstantConfig], Field(discriminator="name")]


class Config(_Node):
    label: str = ""
    """Name of this configuration in tables."""
    seed: int = Field(0, ge=0)
    streams: Literal["rgb", "flow", "both"] = "both"
    fusion_weight: Fraction = 0.5
    """Weight of RGB's softmax scores in the fused scores; flow has the rest (Lu: their mean)."""
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    optimizer: Optimizer = RangerConfig()
    schedule: Schedule = PlateauConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    compute: ComputeConfig = ComputeConfig()
    init_from: InitConfig = InitConfig()

    @property
    def stream_names(self) -> tuple[Stream, ...]:
        return ("rgb", "flow") if self.streams == "both" else (self.streams,)

    @property
    def passes(self) -> int:
        """Forward passes of an iteration, over all workers."""
        return self.compute.most_workers * self.train.accumulate

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass."""
        return self.train.batch_size // self.passes

    @property
    def horizon(self) -> int:
        """Iteration at which the learning-rate schedule ends."""
        horizon = self.schedule.horizon if isinstance(self.schedule, CosineConfig) else None
        return self.train.iterations if horizon is None else horizon

    @model_validator(mode="after")
    def _batch_divides(self) -> Config:
        if self.compute.least_workers > self.compute.most_workers:
            raise ValueError(f"compute.workers = {list(self.compute.workers)}: expected [least, most]")  # type: ignore[arg-type]
        if self.train.batch_size % self.passes:
            raise ValueError(
                f"train.batch_size = {self.train.batch_size} is not a multiple of compute.workers x "
                f"train.accumulate = {self.passes}"
            )
        return self

    @model_validator(mode="after")
    def _workers_have_one_gpu_each(self) -> Config:
        gpus = self.compute.gpus_per_worker
        if gpus == "auto" or gpus in (0, 1) or (gpus < 1 and self.compute.most_workers == 1):
            return self
        more = "a worker computes on one GPU; for more GPUs raise compute.workers"
        shared = "workers of one run cannot share a GPU (NCCL refuses it); give each one GPU"
        raise ValueError(f"compute.gpus_per_worker = {gpus:g}: {more if gpus > 1 else shared}")

    @model_validator(mode="after")
    def _warmup_ends(self) -> Config:
        if self.schedule.warmup >= self.train.iterations:
            raise ValueError(
                f"schedule.warmup = {self.schedule.warmup} does not end within train.iterations = "
                f"{self.train.iterations}"
            )
        return self

    @model_validator(mode="after")
    def _horizon_is_not_before_the_end(self) -> Config:
        if self.horizon < self.train.iterations:
            raise ValueError(
                f"schedule.horizon = {self.horizon} is before the end of the run, train.iterations = "
                f"{self.train.iterations}"
            )
        return self


def load_config(path: str | Path) -> Config:
    """Read a configuration from a YAML file (`config.yaml` of a run, or the file that `export` wrote).

    Raises `UserError` that names the file, the key and what is allowed.
    """
    tree = read_yaml(path)
    tree.pop("provenance", None)  # the origin of an exported configuration: information for people only
    return build_config(tree, str(path))


def dump_config(config: Config) -> str:
    """Return every key of the configuration as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def build_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a nested mapping. Raises `UserError` that begins with `source`."""
    tree = dict(tree)
    loss = tree.get("loss")
    sigma = loss.get("gaze_sigma") if isinstance(loss, dict) else None
    if isinstance(sigma, (int, float)) and 1 < sigma < math.inf:  # as a fraction it would be a flat target
        tree["loss"] = {**loss, "gaze_sigma": sigma / _CELLS}  # type: ignore[dict-item]
        say_once(
            f"{source}: loss.gaze_sigma {sigma:g} is in cells of a 7 x 7 map, as in version 0.1: {sigma / _CELLS:.3g}"
        )
    for part in ("optimizer", "schedule"):  # settings without a name belong to the default optimizer or schedule
        if isinstance(tree.get(part), dict):
            tree[part] = {"name": _default_name(part), **tree[part]}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from error


_CELLS = 7


def override(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested mapping with dotted keys set.

    A change of `optimizer.name` or `schedule.name` resets that part: settings of SGD are not settings of Ranger.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key in sorted(
        changes, key=lambda key: not key.endswith(".name")
    ):  # names first: a change of name clears its part
        part, _, leaf = key.rpartition(".")
        if not part:
            result[leaf] = changes[key]
            continue
        node = result.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"{part}: expected keys and values, found {node!r}")
        if leaf == "name" and node.get("name", _default_name(part)) != changes[key]:
            node.clear()
        node[leaf] = changes[key]
    return result


def override_config(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """Return a configuration with dotted keys changed. Raises `UserError` that begins with `source`."""
    for key in changes:
        check_key(key, source)
    return build_config(override(config.model_dump(), changes), source)


def _default_name(part: str) -> str | None:
    default = Config.model_fields[part].default if part in Config.model_fields else None
    return getattr(default, "name", None)


def config_keys() -> list[str]:
    """Return every dotted key that a configuration can have."""
    keys: dict[str, None] = {}
    for name, field in Config.model_fields.items():
        for node in _nodes(field.annotation):
            keys.update({f"{name}.{leaf}": None for leaf in node.model_fields})
        if not _nodes(field.annotation):
            keys[name] = None
    return list(keys)


def check_key(key: str, source: str) -> None:
    keys = config_keys()
    if key not in keys:
        part = str(key).rpartition(".")[0]
        near = [name for name in keys if name.rpartition(".")[0] == part] or keys
        raise UserError(f"{source}: unknown key {key!r}; allowed: {', '.join(near)}")


def _nodes(annotation: Any) -> list[type[_Node]]:
    if isinstance(annotation, type) and issubclass(annotation, _Node):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [node for argument in get_args(annotation) for node in _nodes(argument)]


def _explain(error: ValidationError) -> str:
    """Return the first complaint of pydantic as `key: message, found value`."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if len(place) > 2 and place[0] in ("optimizer", "schedule"):
        del place[1]  # pydantic puts the chosen variant's name between
    key = ".".join(place)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        part = key.rpartition(".")[0]
        allowed = [name for name in config_keys() if name.rpartition(".")[0] == part]
        if key in allowed:
            return f"key {key!r} does not belong to the {part} that {part}.name chooses{more}"
        return f"unknown key {key!r}; allowed: {', '.join(allowed)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message + more
    return f"{key}: {message}, found {first['input']!r}{more}"
