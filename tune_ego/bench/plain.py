"""A straightforward version of the model, the reference of `bench step`.

Convolutions and pools take whole batches, each after an `F.pad`. Freed memory goes back to the system, and nothing is
compiled. The same weights give the same outputs.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from tune_ego.model.i3d import MaxPool3dSame, Unit3D, same_padding


def make_plain(model: nn.Module) -> None:
    """Replace the forward methods of a model's units and pools by straightforward ones; the weights stay."""
    for module in model.modules():
        if isinstance(module, Unit3D):
            module.forward = partial(_unit, module)  # type: ignore[method-assign]
        elif isinstance(module, MaxPool3dSame):
            module.forward = partial(_pool, module)  # type: ignore[method-assign]


def _padded(x: Tensor, layer: Unit3D | MaxPool3dSame) -> Tensor:
    """Pad a batch [B, C, T, H, W] with zeros as TensorFlow's SAME padding does."""
    padding = same_padding(x.shape[2:], layer.kernel, layer.stride)
    return F.pad(x, [amount for pair in reversed(padding) for amount in pair])


def _unit(unit: Unit3D, x: Tensor) -> Tensor:
    x = unit.conv3d(_padded(x, unit))
    if unit.bn is not None:
        x = unit.bn(x)
    return unit.activation(x) if unit.activation else x


def _pool(pool: MaxPool3dSame, x: Tensor) -> Tensor:
    return F.max_pool3d(_padded(x, pool), pool.kernel, pool.stride)
