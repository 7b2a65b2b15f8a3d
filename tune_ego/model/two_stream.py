"""A stream (backbone + STAM + classifier) and the pair of them.

B batch, C channels, T time, H, W, K classes.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from tune_ego.config import ModelConfig
from tune_ego.model.backbones import FACTS, TorchvisionTrunk
from tune_ego.model.i3d import Unit3D, trunk
from tune_ego.model.stam import scale_attention, stam, trunk_activation

CHANNELS = {"rgb": 3, "flow": 2}
_I3D_FRAMES_PER_SLICE = 8


class StreamOutput(NamedTuple):
    logits_BK: Tensor
    attention_BTHW: Tensor | None


class ParameterRole(NamedTuple):
    """A parameter and its place in a stream."""

    parameter: nn.Parameter
    trunk: bool = False
    """Part of the trunk, before STAM and the classifier."""
    weight: bool = True
    """Weight of a convolution or linear layer; no norm, bias or position term."""
    hidden: bool = True
    """Neither of the first convolution nor of the classifier."""


class Stream(nn.Module):
    """Backbone + STAM over one modality.

    Parameter names are those of the published weights of I3D; torchvision's, after `trunk.`, for its backbones.
    """

    def __init__(self, modality: str, num_classes: int, model: ModelConfig) -> None:
        super().__init__()
        self.modality = modality
        self.backbone = model.backbone
        layers, channels, non_negative = _trunk_layers(modality, model)
        self.frames_per_slice = frames_per_slice(model.backbone)
        """Frames of a clip for each time step of its attention map."""
        self._trunk = tuple(layers)
        for name, layer in layers.items():
            self.add_module(name, layer)
        attention = stam(channels, model, non_negative=non_negative) if model.stam_depth else {}
        self.attention_modules = tuple(attention)
        """Names of STAM's modules, in order; the last one computes the map."""
        for name, layer in attention.items():
            self.add_module(name, layer)
        self.attention_scale = model.attention_scale
        self.dropout = nn.Dropout(model.dropout)
        self.logits = Unit3D(channels, num_classes, activation=None, batch_norm=False)
        self.recomputes = False
        """Set by `TwoStream.recompute`."""
        self._freeze_trunk_norms = model.freeze_trunk_norms
        self._copy_init = model.copy_init
        self.copy_blocks(self.attention_modules)

    def train(self, mode: bool = True) -> Stream:
        super().train(mode)
        if self._freeze_trunk_norms:
            for module in self._trunk_modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _trunk_modules(self) -> Iterator[nn.Module]:
        """Yield all modules before STAM, in order."""
        for name in self._trunk:
            yield from getattr(self, name).modules()

    def parameter_roles(self) -> list[ParameterRole]:
        """Return the role of each parameter, in the order of `parameters()`."""
        trunk = set(self._trunk_modules())
        first = next(module for module in self._trunk_modules() if isinstance(module, nn.Conv3d))
        outer = {first, *self.logits.modules()}
        return [
            ParameterRole(parameter, module in trunk, _is_weight(module, name), module not in outer)
            for module in self.modules()
            for name, parameter in module.named_parameters(recurse=False)
        ]

    def copy_blocks(self, fresh: Container[str]) -> None:
        """Copy STAM's first block to its later blocks that are named in `fresh`, if the model has `copy_init`."""
        first, *further = self.attention_modules[:-1] or ("",)
        for name in further:
            if self._copy_init and name in fresh:
                getattr(self, name).load_state_dict(getattr(self, first).state_dict())

    def forward(self, clip_BCTHW: Tensor) -> StreamOutput:
        """Compute class scores and the attention map (None at `stam_depth` 0) of clips, floats in [-1, 1]."""
        x = clip_BCTHW
        for name in self._trunk:
            x = self._layer(name, x)
        attention_BTHW = None
        if self.attention_modules:
            a = x
            *blocks, prediction = self.attention_modules
            for name in blocks:
                a = self._layer(name, a)
            with _no_autocast(a.device):  # in 16 bits a map has some 30 levels, in 32 all differ
                a = self._layer(prediction, a if a.dtype == torch.float64 else a.float())
            attention_BTHW = scale_attention(a[:, 0], self.attention_scale)
            x = x * attention_BTHW[:, None].to(x.dtype)
        pooled = F.adaptive_avg_pool3d(x, 1)
        logits_BK = self.logits(self.dropout(pooled)).flatten(1)
        return StreamOutput(logits_BK, attention_BTHW)

    def _layer(self, name: str, x: Tensor) -> Tensor:
        layer = getattr(self, name)
        if not (self.recomputes and torch.is_grad_enabled()):
            output: Tensor = layer(x)
            return output
        again: Tensor = checkpoint(
            layer,
            x,
            use_reentrant=False,
            preserve_rng_state=False,  # nothing in a layer is random
            context_fn=lambda: (nullcontext(), _statistics_kept(layer)),
        )
        return again


def _trunk_layers(modality: str, model: ModelConfig) -> tuple[Mapping[str, nn.Module], int, bool]:
    """Return the trunk's modules in order, the channels of the feature map, and whether it is never below zero."""
    inputs = CHANNELS[modality]
    if model.backbone != "i3d":
        network = TorchvisionTrunk(model.backbone, inputs, model.bn_momentum)
        return {"trunk": network}, network.facts.channels, network.facts.non_negative
    activation = trunk_activation(model)
    layers, channels = trunk(inputs, model.width, activation, model.bn_momentum)
    return layers, channels, activation == "relu"


def frames_per_slice(backbone: str) -> int:
    """Return the frames of a clip for each time step of the backbone's feature map."""
    return _I3D_FRAMES_PER_SLICE if backbone == "i3d" else FACTS[backbone].frames_per_slice


def _is_weight(module: nn.Module, name: str) -> bool:
    return isinstance(module, (nn.Conv3d, nn.Linear)) and name == "weight"


def _unrepeatable(stream: nn.Module) -> list[nn.Module]:
    """Return the modules inside layers whose result depends on how often they were called."""
    layers = [layer for layer in stream.children() if not isinstance(layer, nn.Dropout)]  # outside the recomputed part
    parts = [part for layer in layers for part in layer.modules() if not isinstance(part, _BatchNorm)]
    return [
        part
        for part in parts
        if isinstance(part, nn.modules.dropout._DropoutNd) or any(b is not None for b in part._buffers.values())
    ]


def _no_autocast(device: torch.device) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(device.type)  # not on the meta device
    return torch.autocast(device.type, enabled=False) if available else nullcontext()


@contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Leave running statistics unchanged while a layer recomputes its activations: they already include this batch.

    Normalisation uses the batch's own statistics, as in the first pass.
    """
    norms = [norm for norm in module.modules() if isinstance(norm, _BatchNorm) and norm.training]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]  # type: ignore[union-attr]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(batches)  # type: ignore[union-attr]


def build_stream(modality: str, num_classes: int, model: ModelConfig) -> Stream:
    """Build one stream with fresh weights. Raises `ValueError` where `modality` is neither "rgb" nor "flow"."""
    if modality not in CHANNELS:
        raise ValueError(f"no stream {modality!r}; allowed: {', '.join(CHANNELS)}")
    return Stream(modality, num_classes, model)


class TwoStream(nn.ModuleDict):
    """The streams of a run, by modality. They share no parameter."""

    def __init__(
        self,
        modalities: tuple[str, ...],
        num_classes: int,
        model: ModelConfig,
        seeds: Mapping[str, int] | None = None,
    ) -> None:
        """Build the streams. With `seeds` each stream draws its first weights from its own seed."""
        super().__init__()
        for modality in modalities:
            if seeds is not None:
                torch.manual_seed(seeds[modality])
            self[modality] = build_stream(modality, num_classes, model)

    def streams(self) -> dict[str, Stream]:
        """Return the stream of each modality."""
        return {modality: stream for modality, stream in self.items() if isinstance(stream, Stream)}

    def parameter_roles(self) -> dict[str, list[ParameterRole]]:
        """Return the roles of each stream's parameters, in the order of `parameters()`."""
        return {modality: stream.parameter_roles() for modality, stream in self.streams().items()}

    def recompute(self, recomputes: bool) -> None:
        """Turn activation checkpointing on or off: layers recompute their activations in the backward pass.

        Raises `TypeError` for a module whose second pass would differ: one with buffers that is no BatchNorm, or
        dropout inside a layer.
        """
        stateful = [part for stream in self.values() for part in _unrepeatable(stream)]
        if recomputes and stateful:
            raise TypeError(f"activation checkpointing is not possible with {type(stateful[0]).__name__}")
        for stream in self.streams().values():
            stream.recomputes = recomputes

    def forward(self, clips: Mapping[str, Tensor], seeds: Mapping[str, int] | None = None) -> dict[str, StreamOutput]:
        """Run each stream on its clips, [B, C, T, H, W], floats in [-1, 1].

        With `seeds` each stream's dropout draws from its own seed, so it does not depend on the other streams.
        """
        outputs = {}
        for modality, stream in self.items():
            if seeds is not None:
                torch.manual_seed(seeds[modality])
            outputs[modality] = stream(clips[modality])
        return outputs
