"""Optimizers and learning-rate schedules of a configuration, and the base class of its parts (`config.py`)."""

from __future__ import annotations

from typing import Annotated, Literal, Union

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Strict types would refuse the lists that YAML gives where a field is a tuple.
Betas = Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]], Field(strict=False)]
Milestones = Annotated[tuple[Annotated[int, Field(gt=0)], ...], Field(strict=False)]


class ConfigNode(BaseModel):
    """Base class of a configuration's parts: immutable, strict about types, without unknown keys."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class _OptimizerNode(ConfigNode):
    trunk_lr: Union[Positive, None] = None
    """Learning rate of the trunk, the part before STAM and the classifier; null: `lr`. The schedule's factor applies to
    both."""
    decay_all: bool = True
    """Whether weight decay applies to all parameters (Lu's code); false: only to the weights of convolutions and linear
    layers, not to norms, biases and position terms."""


class SGDConfig(_OptimizerNode):
    """SGD with momentum (Lu)."""

    name: Literal["sgd"] = "sgd"
    lr: Positive = 0.1
    """Learning rate (Lu)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    nesterov: bool = False
    """Use Nesterov's momentum, which needs `momentum` above 0."""
    weight_decay: Annotated[float, Field(ge=0)] = 1e-7


class AdamWConfig(_OptimizerNode):
    """AdamW (Loshchilov & Hutter, ICLR 2019), with PyTorch's settings."""

    name: Literal["adamw"] = "adamw"
    lr: Positive = 1e-3
    betas: Betas = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decay_all: bool = False


class MuonConfig(_OptimizerNode):
    """Muon (Jordan et al., 2024) for the weights of hidden layers, AdamW for all other parameters; torch 2.9 or newer.

    Updates of Muon are scaled to the root mean square of AdamW's (Liu et al., arXiv:2502.16982), so both share `lr`.
    """

    name: Literal["muon"] = "muon"
    lr: Positive = 1e-3
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Momentum of Muon, in Nesterov's form."""
    betas: Betas = (0.9, 0.999)
    """Betas of AdamW."""
    eps: Positive = 1e-8
    """Epsilon of AdamW."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    decay_all: bool = False


class RangerConfig(_OptimizerNode):
    """Ranger: RAdam with LookAhead (the paper)."""

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


class _ScheduleNode(ConfigNode):
    warmup: int = Field(0, ge=0)
    """Iterations over which the learning rate first rises linearly to `optimizer.lr`. Validations in this time do not
    count for `plateau`."""


class PlateauConfig(_ScheduleNode):
    """Reduce the learning rate when the validation mean class accuracy stops rising (the paper)."""

    name: Literal["plateau"] = "plateau"
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    patience: int = Field(5, ge=0)
    """Validations without a better mean class accuracy before the rate falls (the paper)."""


class MultiStepConfig(_ScheduleNode):
    """Reduce the learning rate at given iterations (Lu's code)."""

    name: Literal["multistep"] = "multistep"
    milestones: Milestones = (300, 1000)
    """Iterations after which the learning rate is multiplied by `gamma` (Lu's code)."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1


class CosineConfig(_ScheduleNode):
    """Reduce the learning rate along half a cosine."""

    name: Literal["cosine"] = "cosine"
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Learning rate at the horizon and beyond, as a fraction of `optimizer.lr`."""
    horizon: Union[Annotated[int, Field(ge=1)], None] = None
    """Iteration at which the floor is reached; null: `train.iterations`. A search whose trials are shorter than the
    final run, or may be extended later, sets the final run's iterations here."""


class FlatCosineConfig(_ScheduleNode):
    """Keep the learning rate, then reduce it along half a cosine (what Ranger's author advises)."""

    name: Literal["flat_cosine"] = "flat_cosine"
    flat: Fraction = 0.72
    """Share of the iterations up to the horizon before the rate falls (Wright, Ranger)."""
    floor: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Learning rate at the horizon and beyond, as a fraction of `optimizer.lr`."""
    horizon: Union[Annotated[int, Field(ge=1)], None] = None
    """Iteration at which the floor is reached, as that of `cosine`."""


class ConstantConfig(_ScheduleNode):
    """Keep the learning rate."""

    name: Literal["constant"] = "constant"


OptimizerConfig = Annotated[Union[SGDConfig, RangerConfig, AdamWConfig, MuonConfig], Field(discriminator="name")]
ScheduleConfig = Annotated[
    Union[PlateauConfig, MultiStepConfig, CosineConfig, FlatCosineConfig, ConstantConfig], Field(discriminator="name")
]
