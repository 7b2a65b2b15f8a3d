"""STAM: the spatiotemporal attention module (Lu, Liao, Li, ICCV Workshops 2019)."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from tune_ego.config import ModelConfig
from tune_ego.model.i3d import MIXED_WIDTHS, Unit3D, inception

_SMALLEST_RANGE = 1e-12
"""A map whose values differ by less counts as all equal: its scaling and derivative would not be finite."""


def stam(channels: int, model: ModelConfig) -> OrderedDict[str, nn.Module]:
    """The modules from `Mixed_5c`'s output to the unscaled map: `stam_depth` inception blocks and `attention_pred`."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    trunk_relu = model.activation == "relu" or model.activation_scope == "stam"
    for number in range(1, model.stam_depth + 1):
        non_negative = model.activation == "relu" or (number == 1 and trunk_relu)
        block = inception(
            channels, MIXED_WIDTHS["Mixed_5c"], model.width, model.activation, non_negative, model.bn_momentum
        )
        layers["attention_inc" if number == 1 else f"attention_inc_{number}"] = block
        channels = block.outputs
    layers["attention_pred"] = Unit3D(channels, 1, bn_momentum=model.bn_momentum)
    return layers


def scale_attention(map_BTHW: Tensor, how: str) -> Tensor:
    """Scale each clip's map; float32 under mixed precision too.

    `min_max`: (a - min) / (max - min), zeros where all are equal; `subtract_min`: a - min.
    """
    map_BTHW = map_BTHW if map_BTHW.dtype == torch.float64 else map_BTHW.float()
    low = map_BTHW.amin(dim=(1, 2, 3), keepdim=True)
    if how == "subtract_min":
        return map_BTHW - low
    span = map_BTHW.amax(dim=(1, 2, 3), keepdim=True) - low
    varied = span > _SMALLEST_RANGE
    return torch.where(varied, (map_BTHW - low) / torch.where(varied, span, 1.0), 0.0)
