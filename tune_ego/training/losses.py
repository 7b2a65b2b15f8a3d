"""The gaze target and the losses (Lu, Liao, Li, ICCV Workshops 2019).

B batch, T time (frames of the window, or T' slices of the map), H, W the map's rows and columns, K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_ego.model.two_stream import StreamOutput


def gaze_target(
    gaze_BT2: Tensor, valid_BT: Tensor, map_size: tuple[int, int, int] = (2, 7, 7), sigma: float = 3 / 7
) -> tuple[Tensor, Tensor]:
    """Return a Gaussian map around the mean gaze point of each slice of the window (Lu, equation 2).

    `gaze_BT2` holds x, y in [0, 1] of the crop, or outside it. `valid_BT` marks the frames with gaze; frames whose gaze
    is not finite count as frames without. `sigma` is a fraction of the map's height. Returns the target, [B, T', H, W]
    in (0, 1], and a mask of the slices that have one, [B, T'].
    """
    slices, height, width = map_size
    batch, frames = valid_BT.shape
    valid_BT = _usable(gaze_BT2, valid_BT, slices)
    valid = valid_BT.reshape(batch, slices, frames // slices)
    point = torch.where(valid_BT[..., None], gaze_BT2, 0.0).reshape(batch, slices, frames // slices, 2)
    count = valid.sum(dim=2)
    mean = point.sum(dim=2) / count.clamp(min=1)[..., None]
    column = torch.arange(width, device=mean.device, dtype=mean.dtype)
    row = torch.arange(height, device=mean.device, dtype=mean.dtype)
    across = (column - mean[..., 0:1] * width).square()
    down = (row - mean[..., 1:2] * height).square()
    return torch.exp(-(down[..., :, None] + across[..., None, :]) / (2 * (sigma * height) ** 2)), count > 0


def _usable(gaze_BT2: Tensor, valid_BT: Tensor, slices: int) -> Tensor:
    """Return which frames have gaze, bool [B, T]. Raises `ValueError` for another form."""
    frames = valid_BT.shape[1]
    if frames % slices:
        raise ValueError(f"{frames} frames do not divide into {slices} slices")
    if valid_BT.dtype != torch.bool:
        raise ValueError(f"valid_BT is of type {valid_BT.dtype}: which frames have gaze is true or false")
    return valid_BT & gaze_BT2.isfinite().all(dim=2)


def slices_with_gaze(gaze_BT2: Tensor, valid_BT: Tensor, slices: int = 2) -> Tensor:
    """Return which slices of the windows have gaze, bool [B, T']."""
    return _usable(gaze_BT2, valid_BT, slices).unflatten(1, (slices, -1)).any(dim=2)


def gaze_loss(
    attention_BTHW: Tensor, gaze_BT2: Tensor, valid_BT: Tensor, sigma: float, count: Tensor | None = None
) -> Tensor:
    """Return the mean squared error between attention and target over the slices with gaze; 0 without any.

    `count` replaces the number of these slices as the divisor: where a batch is divided into passes, the mean number of
    slices with gaze in a pass makes the mean of the passes' losses the loss of the batch.
    """
    _, slices, height, width = attention_BTHW.shape
    target_BTHW, valid_BT = gaze_target(gaze_BT2.to(attention_BTHW.dtype), valid_BT, (slices, height, width), sigma)
    error_BT = (attention_BTHW - target_BTHW).square().mean(dim=(2, 3))
    divisor = valid_BT.sum().clamp(min=1) if count is None else torch.where(count > 0, count, 1)
    return torch.where(valid_BT, error_BT, 0.0).sum() / divisor


class Losses(NamedTuple):
    total: Tensor
    action: Tensor
    gaze: Tensor


def stream_losses(
    output: StreamOutput,
    label_B: Tensor,
    gaze_BT2: Tensor,
    valid_BT: Tensor,
    gaze_weight: float,
    gaze_sigma: float,
    count: Tensor | None = None,
) -> Losses:
    """Return the losses of one stream: the total is cross-entropy plus the weighted gaze loss of its attention.

    `count` is that of `gaze_loss`.
    """
    action = F.cross_entropy(output.logits_BK.float(), label_B)
    if output.attention_BTHW is None:
        return Losses(action, action, torch.zeros_like(action))
    gaze = gaze_loss(output.attention_BTHW, gaze_BT2, valid_BT, gaze_sigma, count)
    return Losses(action + gaze_weight * gaze, action, gaze)
