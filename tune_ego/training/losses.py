"""The gaze target and the losses (Lu, Liao, Li, ICCV Workshops 2019).

B batch, T time (frames of the window, or T' slices of the map, of F frames each), H, W the map's rows and columns,
K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_ego.config import LU_MAP_SIDE, MAP_SLICES
from tune_ego.model.two_stream import StreamOutput


def gaze_target(
    gaze_BT2: Tensor,
    valid_BT: Tensor,
    map_size: tuple[int, int, int] = (MAP_SLICES, LU_MAP_SIDE, LU_MAP_SIDE),
    sigma: float = 3 / LU_MAP_SIDE,
) -> tuple[Tensor, Tensor]:
    """Return a Gaussian map around the mean gaze point of each slice of the window (Lu, equation 2).

    Args:
        gaze_BT2: Gaze points x, y, float [B, T, 2]; [0, 1] is the crop, and points may lie outside it.
        valid_BT: Frames with gaze, bool [B, T]. Frames whose gaze is not finite count as frames without.
        map_size: T', H, W of the attention map; T' divides T.
        sigma: Standard deviation, as a fraction of the map's height.

    Returns:
        The target, float [B, T', H, W] in (0, 1], and the slices that have one, bool [B, T'].
    """
    slices, height, width = map_size
    batch, frames = valid_BT.shape
    valid_BT = _usable(gaze_BT2, valid_BT, slices)

    # Mean gaze point of each slice, in cells.
    valid_BTF = valid_BT.reshape(batch, slices, frames // slices)
    point_BTF2 = torch.where(valid_BT[..., None], gaze_BT2, 0.0).reshape(batch, slices, frames // slices, 2)
    count_BT = valid_BTF.sum(dim=2)
    mean_BT2 = point_BTF2.sum(dim=2) / count_BT.clamp(min=1)[..., None]
    x_BT1, y_BT1 = mean_BT2[..., 0:1] * width, mean_BT2[..., 1:2] * height

    # Squared distances of columns and rows from it.
    column_W = torch.arange(width, device=mean_BT2.device, dtype=mean_BT2.dtype)
    row_H = torch.arange(height, device=mean_BT2.device, dtype=mean_BT2.dtype)
    across_BTW = (column_W - x_BT1).square()
    down_BTH = (row_H - y_BT1).square()
    distance_BTHW = down_BTH[..., :, None] + across_BTW[..., None, :]

    return torch.exp(-distance_BTHW / (2 * (sigma * height) ** 2)), count_BT > 0


def _usable(gaze_BT2: Tensor, valid_BT: Tensor, slices: int) -> Tensor:
    """Return which frames have gaze, bool [B, T]. Raises `ValueError` for another form."""
    frames = valid_BT.shape[1]
    if frames % slices:
        raise ValueError(f"{frames} frames do not divide into {slices} slices")
    if valid_BT.dtype != torch.bool:
        raise ValueError(f"valid_BT is of type {valid_BT.dtype}: which frames have gaze is true or false")
    return valid_BT & gaze_BT2.isfinite().all(dim=2)


def slices_with_gaze(gaze_BT2: Tensor, valid_BT: Tensor, slices: int = MAP_SLICES) -> Tensor:
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
