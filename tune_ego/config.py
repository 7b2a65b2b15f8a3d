"""The configuration of one run: one typed tree, one YAML file.

A `Config` is immutable and complete: every value a run depends on is in it, with a default from
Lu, Liao, Li (ICCV Workshops 2019; "Lu") or Straminsky, Jacobo, Buemi ("the paper").
Keys are addressed by dots everywhere: `--set optimizer.lr=1e-3`, `optimizer.lr:` in a search space.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

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
    """How the validation clips are carved from the training split: at random per class (like the official
    splits, whose train and test clips share sessions) or by whole sessions (the honest one)."""
    fold: int = Field(0, ge=0, le=9)
    """Which tenth of the training clips validates."""
    crop: int = Field(224, ge=32)
    """Side of the square crop, pixels (Lu)."""
    decode: Literal["auto", "cpu", "gpu"] = "cpu"
    """Where a run decodes JPEG images, for training and validation: in the readers, or on the GPU (nvJPEG, whose pixels
    may differ a little), which relieves machines with few CPUs for each GPU; `auto`: on the GPU where runs have one.
    `evaluate` decodes on the CPU."""
    cache_dir: Union[Annotated[str, Field(pattern="^/")], None] = None
    """A folder (an absolute path) on each machine, where shards of an object store stay once they have been read."""
    cache_gb: Positive = 50.0
    """What it holds at most, GB; those that were not used for longest make room. All of EGTEA is about 20."""


class ModelConfig(_Node):
    stam_depth: int = Field(1, ge=0, le=8)
    """Blocks in the attention module: 0 = no attention (Lu's "-o"), 1 = Lu's "-a", 3 = the paper's experiment 3."""
    stam_block: Literal["inception", "attention"] = "inception"
    """A block of STAM: Lu's inception block, or multi-head self-attention over the map's positions with relative
    position terms (beyond the papers)."""
    copy_init: bool = False
    """STAM's blocks from the second on start as copies of the first, where a weights file does not hold them."""
    activation: Literal["relu", "swish", "mish", "gelu", "leaky_relu", "elu"] = "relu"
    """Activation function, where `activation_scope` says (the paper's third axis)."""
    activation_scope: Literal["stam", "all"] = "stam"
    """`stam`: in the attention module's blocks only; `all`: in the I3D trunk too."""
    attention_scale: Literal["min_max", "subtract_min"] = "min_max"
    """Scaling of the attention map per clip: as Lu writes it, or as the released code and weights have it."""
    width: float = Field(1.0, gt=0, le=1)
    """Factor on every channel count, rounded to whole channels; 1 is I3D. Small machines train 0.25."""
    dropout: float = Field(0.5, ge=0, lt=1)
    """Before the classifier (Lu)."""
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
    """How far the slow weights move towards the fast ones."""


class _ScheduleNode(_Node):
    warmup: int = Field(0, ge=0)
    """Iterations over which the learning rate rises linearly to `optimizer.lr` before anything else is done to it;
    validations in between do not count for `plateau`."""


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
    """The learning rate at the horizon and beyond, as a fraction of `optimizer.lr`."""
    horizon: Union[Annotated[int, Field(ge=1)], None] = None
    """The iteration at which the floor is reached; null: `train.iterations`. A search whose trials are shorter than the
    final run, or may be made longer when it is resumed, sets the final run's."""


class ConstantConfig(_ScheduleNode):
    name: Literal["constant"] = "constant"


class LossConfig(_Node):
    gaze_weight: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the gaze loss beside the action loss (Lu); 0 leaves the gaze out (Lu's "-v")."""
    gaze_sigma: Positive = 3.0
    """Standard deviation of the gaze target, cells of the attention map (Lu: 3 on 7 x 7)."""


class TrainConfig(_Node):
    iterations: int = Field(3000, ge=1)
    """Optimizer steps of the run (the paper)."""
    batch_size: int = Field(12, ge=1)
    """Samples per iteration, over all workers and accumulation steps. 12 are one forward pass of Lu's code, of which 4
    make a step: its iteration is `batch_size: 48, accumulate: 4`."""
    accumulate: int = Field(1, ge=1)
    """Forward-backward passes per iteration and worker; each one's share of the batch is cut into so many."""
    deterministic: bool = False
    """Kernels that give the same bits at each run, on GPUs too, where they are slower. On a CPU all are."""
    precision: Literal["auto", "off", "fp16", "bf16"] = "auto"
    """Mixed precision. auto: bf16 where the GPU has it, else fp16 with loss scaling; off on a CPU, where 16
    bits are slow."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile, on GPUs only, as it costs minutes at each start. auto: for runs of 10,000 iterations and more.
    Never with `deterministic` or `activation_checkpointing`."""
    activation_checkpointing: bool = False
    """Keep what goes from layer to layer only, and compute the rest again on the way back: less memory for more time
    (measured: 1.4 times on a CPU, 1.7 times for half of the memory on an H200), and the same numbers."""
    validate_every: int = Field(100, ge=1)
    """Iterations between validations (and checkpoints); the last iteration always validates."""
    average_checkpoints: int = Field(1, ge=1)
    """The weights of a final run are the mean of those at its last so many validations."""
    validation_windows: int = Field(1, ge=1)
    """Windows per validation clip, evenly spaced."""
    log_every: int = Field(10, ge=1)
    """Iterations between lines of metrics.jsonl."""


class ComputeConfig(_Node):
    workers: Union[Annotated[int, Field(ge=1)], Workers] = 1
    """Training processes (DDP). [least, most]: as many as the cluster has room for, while it has; the batch, and what
    it is cut into, stay those of the most. For final runs only."""
    gpus_per_worker: Union[Literal["auto"], Annotated[float, Field(ge=0)]] = "auto"
    """auto: one where the cluster has GPUs, else none."""
    cpus_per_worker: Positive = 1.0
    """CPUs that Ray reserves for a training process; on a CPU it computes with that many threads, rounded up."""
    readers: int = Field(1, ge=1)
    """Reader tasks at a time per worker, a quarter of a CPU reserved for each."""
    max_failures: int = Field(3, ge=-1)
    """Restarts from the last checkpoint after a worker died; -1: without end. A spot machine's end counts for none."""

    @property
    def least_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def most_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]


class InitConfig(_Node):
    rgb: str | None = None
    """What the RGB stream starts from: a published file of weights, or a run, checkpoint or `model.pt` of ours."""
    flow: str | None = None


Optimizer = Annotated[Union[SGDConfig, RangerConfig], Field(discriminator="name")]
Schedule = Annotated[Union[PlateauConfig, MultiStepConfig, CosineConfig, ConstantConfig], Field(discriminator="name")]


class Config(_Node):
    label: str = ""
    """A name for this configuration in tables."""
    seed: int = Field(0, ge=0)
    streams: Literal["rgb", "flow", "both"] = "both"
    fusion_weight: Fraction = 0.5
    """Weight of RGB's softmax scores in the fused ones; flow's is the rest (Lu: their mean)."""
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
        """Forward passes of an iteration, over all workers, however many there are."""
        return self.compute.most_workers * self.train.accumulate

    @property
    def micro_batch(self) -> int:
        """Samples of one forward pass."""
        return self.train.batch_size // self.passes

    @property
    def horizon(self) -> int:
        """The iteration that the schedule is laid out for."""
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
    """The configuration in a YAML file (`config.yaml` of a run, or what `export` wrote).

    Raises `UserError` naming file, key and what is allowed.
    """
    tree = read_yaml(path)
    tree.pop("provenance", None)  # where an exported configuration came from: for people, not for the run
    return build_config(tree, str(path))


def dump_config(config: Config) -> str:
    """Every key of the resolved configuration, as YAML that `load_config` reads back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def build_config(tree: Mapping[str, Any], source: str) -> Config:
    tree = dict(tree)
    for part in ("optimizer", "schedule"):  # settings without a name belong to the default one
        if isinstance(tree.get(part), dict):
            tree[part] = {"name": _default_name(part), **tree[part]}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_explain(error)}") from error


def override(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a nested mapping with dotted keys set.

    Another `optimizer.name` or `schedule.name` starts that part anew: settings of SGD mean nothing to Ranger.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    for key in sorted(changes, key=lambda key: not key.endswith(".name")):  # names first: they clear
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
    for key in changes:
        check_key(key, source)
    return build_config(override(config.model_dump(), changes), source)


def _default_name(part: str) -> str | None:
    default = Config.model_fields[part].default if part in Config.model_fields else None
    return getattr(default, "name", None)


def config_keys() -> list[str]:
    """Every dotted key that a configuration can have."""
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
        near = [known for known in keys if known.rpartition(".")[0] == part] or keys
        raise UserError(f"{source}: unknown key {key!r}; allowed: {', '.join(near)}")


def _nodes(annotation: Any) -> list[type[_Node]]:
    if isinstance(annotation, type) and issubclass(annotation, _Node):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [node for argument in get_args(annotation) for node in _nodes(argument)]


def _explain(error: ValidationError) -> str:
    """pydantic's first complaint as `key: what is wrong`."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if len(place) > 2 and place[0] in ("optimizer", "schedule"):
        del place[1]  # pydantic puts the chosen variant's name between
    key = ".".join(place)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        part = key.rpartition(".")[0]
        allowed = [known for known in config_keys() if known.rpartition(".")[0] == part]
        if key in allowed:
            return f"key {key!r} does not belong to the {part} that {part}.name chooses{more}"
        return f"unknown key {key!r}; allowed: {', '.join(allowed)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message + more
    return f"{key}: {message}, found {first['input']!r}{more}"
