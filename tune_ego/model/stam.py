"""STAM: the spatiotemporal attention module (Lu, Liao, Li, ICCV Workshops 2019), of any depth.

B batch, C channels, T time, H, W, N = T x H x W positions.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from tune_ego.config import ModelConfig
from tune_ego.model.i3d import ACTIVATIONS, MIXED_WIDTHS, Unit3D, inception

_FURTHEST = 7
"""Relative positions further apart than this many cells along an axis share one term."""


class AttentionBlock(nn.Module):
    """Self-attention over all positions and an MLP, both residual: a pre-norm transformer block on a feature map.

    The score of two positions has a learnt term per head for their offset along each of time, height and width, cut
    off at 7 cells (relative positions: Shaw et al., NAACL 2018), so maps of any size are possible. The block has about
    as many parameters as the inception block that it replaces.
    """

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.heads = max(1, channels // 128)
        self.head_width = max(1, channels // (2 * self.heads))
        self.attention_norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * self.heads * self.head_width)
        self.offset_terms = nn.Parameter(torch.zeros(3, 2 * _FURTHEST + 1, self.heads))
        self.attention_out = nn.Linear(self.heads * self.head_width, channels)
        self.mlp_norm = nn.LayerNorm(channels)
        self.mlp_in = nn.Linear(channels, max(1, channels // 2))
        self.activation = ACTIVATIONS[activation]
        self.mlp_out = nn.Linear(max(1, channels // 2), channels)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        x = x_BCTHW.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.attention_norm(x)).unflatten(2, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)
        terms = self.position_terms(x_BCTHW.shape[2:]).to(q.dtype)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=terms[None])
        x = x + self.attention_out(attended.transpose(1, 2).flatten(2))
        x = x + self.mlp_out(self.activation(self.mlp_in(self.mlp_norm(x))))
        return x.transpose(1, 2).reshape(x_BCTHW.shape)

    def position_terms(self, size: torch.Size) -> Tensor:
        """Return the term of each pair of positions in the scores, [heads, N, N], for a map of `size` (T, H, W)."""
        total: Any = 0
        for axis, length in enumerate(size):
            place = torch.arange(length, device=self.offset_terms.device)
            offset = (place[:, None] - place).clamp(-_FURTHEST, _FURTHEST) + _FURTHEST
            shape = [self.heads, 1, 1, 1, 1, 1, 1]
            shape[1 + axis] = shape[4 + axis] = length
            total = total + self.offset_terms[axis][offset].permute(2, 0, 1).reshape(shape)
        return total.flatten(4, 6).flatten(1, 3)


def trunk_activation(model: ModelConfig) -> str:
    """Return the activation of I3D's modules. Raises `ValueError` for an unknown `activation_scope`."""
    match model.activation_scope:
        case "all":
            return model.activation
        case "stam":
            return "relu"
        case unknown:
            raise ValueError(f"no modules for model.activation_scope {unknown!r}")


def stam(channels: int, model: ModelConfig, *, non_negative: bool) -> OrderedDict[str, nn.Module]:
    """Build the modules from the trunk's output to the unscaled map: `stam_depth` blocks and `attention_pred`.

    Inception blocks have the published name, `attention_inc`; blocks of self-attention are `attention_self`.
    Raises `ValueError` for a kind of block that is not known here.

    Args:
        channels: Channels of the trunk's output.
        model: Configuration.
        non_negative: The trunk's output is never below zero.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number in range(1, model.stam_depth + 1):
        suffix = "" if number == 1 else f"_{number}"
        match model.stam_block:
            case "attention":
                layers[f"attention_self{suffix}"] = AttentionBlock(channels, model.activation)
            case "inception":
                block = inception(
                    channels, MIXED_WIDTHS["Mixed_5c"], model.width, model.activation, non_negative, model.bn_momentum
                )
                layers[f"attention_inc{suffix}"], channels = block, block.outputs
                non_negative = model.activation == "relu"
            case unknown:
                raise ValueError(f"no attention block {unknown!r}")
    layers["attention_pred"] = Unit3D(channels, 1, bn_momentum=model.bn_momentum)
    return layers


def scale_attention(map_BTHW: Tensor, scale: str) -> Tensor:
    """Scale each clip's map, in float32 under mixed precision too.

    `min_max` is (a - min) / (max - min), zeros where all are equal; `subtract_min` is a - min. A map with a NaN stays
    NaN. Raises `ValueError` for another scale.

    Value and derivative are finite in every floating type: a derivative beyond the type's range is cut to its largest
    number. The exception is float16 under autocast, where the loss is scaled: the loss scaler must see an overflow.
    """
    wide = map_BTHW if map_BTHW.dtype == torch.float64 else map_BTHW.float()
    scaled_loss = map_BTHW.dtype == torch.float16 and torch.is_autocast_enabled(map_BTHW.device.type)
    if wide.requires_grad and wide.dtype != map_BTHW.dtype and not scaled_loss:
        wide.register_hook(lambda gradient: _cut(gradient, map_BTHW.dtype, gradient.isfinite()))
    match scale:
        case "subtract_min":
            return wide - wide.amin(dim=(1, 2, 3), keepdim=True)
        case "min_max":
            scaled: Tensor = _MinMax.apply(wide)
            return scaled
        case _:
            raise ValueError(f"no attention scale {scale!r}")


class _MinMax(torch.autograd.Function):
    """(a - min) / (max - min) over each map [T, H, W].

    The derivative divides once, at the end, so it is finite however small max - min is. Several equal extremes share
    their derivative equally.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        low, high = a.amin(dim=(1, 2, 3), keepdim=True), a.amax(dim=(1, 2, 3), keepdim=True)
        varied = ~(high - low <= 0)
        span = torch.where(varied, high - low, 1.0)
        scaled = torch.where(varied, (a - low) / span, 0.0)
        ctx.save_for_backward(scaled, span, varied, a == low, a == high)
        return scaled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        scaled, span, varied, lowest, highest = ctx.saved_tensors
        gradient = gradients[0]
        of_high = (gradient * scaled).sum(dim=(1, 2, 3), keepdim=True)
        of_low = (gradient * (1 - scaled)).sum(dim=(1, 2, 3), keepdim=True)
        rise = gradient - _shared(of_high, highest) - _shared(of_low, lowest)
        return torch.where(varied, _cut(rise / span, span.dtype, rise.isfinite()), 0.0)


def _shared(amount: Tensor, places: Tensor) -> Tensor:
    return amount * places / places.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)


def _cut(values: Tensor, dtype: torch.dtype, where: Tensor) -> Tensor:
    """Cut values to the range of `dtype` at the places `where`; elsewhere infinities stay, so that they are noticed."""
    largest = torch.finfo(dtype).max
    return torch.where(where, values.clamp(-largest, largest), values)
