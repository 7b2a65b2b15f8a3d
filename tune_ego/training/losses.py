"""The gaze target and the losses (Lu, Liao, Li, ICCV Workshops 2019).

B batch, T time (frames of the window, or T' slices of the map, of F frames each), H, W the map's rows and columns,
K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_ego.config import LU_MAP_SIDE, MAP_SLICES, LossConfig
from tune_ego.model.two_stream import StreamOutput
from tune_ego.training.augmentation import Mixing


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


class ActionLoss:
    """Cross-entropy of action scores, with the corrections for unequal classes that a configuration names.

    - `logit_adjustment`: softmax cross-entropy of logits + tau x log(share of the class in the training samples)
      (Menon et al., ICLR 2021, equation 10). Validation and test use the logits alone.
    - `class_weights`: the loss of a sample is multiplied by the weight of its class.
    - `label_smoothing`: the target is (1 - smoothing) x one-hot + smoothing / K.
    """

    def __init__(self, loss: LossConfig, class_samples: Sequence[float], device: torch.device) -> None:
        """Compute the constants of each class.

        Args:
            loss: Configuration of the loss.
            class_samples: Mean number of training samples of each class in an epoch (`feed.sampling.class_samples`). In
                the logit adjustment a class without samples counts as one with a single sample.
            device: Device of the logits.
        """
        assert len(class_samples) or not (loss.logit_adjustment or loss.class_weights != "none")
        samples_K = torch.tensor(class_samples, dtype=torch.float64)
        self._smoothing = loss.label_smoothing
        self._offset_K = self._weight_K = None
        if loss.logit_adjustment:
            share_K = samples_K.clamp(min=1) / samples_K.sum()
            self._offset_K = (loss.logit_adjustment * share_K.log()).float().to(device)
        if loss.class_weights != "none":
            self._weight_K = _class_weights(loss, samples_K).float().to(device)

    def __call__(self, logits_BK: Tensor, label_B: Tensor, mixing: Mixing | None = None) -> Tensor:
        """Return the mean loss of a batch; the logits are float32. `mixing` is that of the windows."""
        if self._offset_K is not None:
            logits_BK = logits_BK + self._offset_K
        if self._weight_K is None and mixing is None:
            return F.cross_entropy(logits_BK, label_B, label_smoothing=self._smoothing)
        loss_B = self._losses(logits_BK, label_B)
        if mixing is not None:
            loss_B = mixing.own_B * loss_B + (1 - mixing.own_B) * self._losses(logits_BK, label_B.roll(1))
        return loss_B.mean()  # not over the sum of weights: passes of a batch add up

    def _losses(self, logits_BK: Tensor, label_B: Tensor) -> Tensor:
        loss_B = F.cross_entropy(logits_BK, label_B, reduction="none", label_smoothing=self._smoothing)
        return loss_B if self._weight_K is None else self._weight_K[label_B] * loss_B


def _class_weights(loss: LossConfig, samples_K: Tensor) -> Tensor:
    """Return the weight of each class, whose mean over the samples is 1; 0 for a class without samples."""
    match loss.class_weights:
        case "inverse":
            number_K = samples_K
        case "effective":
            number_K = (1 - loss.effective_beta**samples_K) / (1 - loss.effective_beta)
        case unknown:
            raise ValueError(f"no class weights {unknown!r}")
    weight_K = torch.where(samples_K > 0, 1 / number_K, 0.0)
    return weight_K * (samples_K.sum() / (weight_K * samples_K).sum())


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
    action_loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
) -> Losses:
    """Return the losses of one stream: the total is the action loss plus the weighted gaze loss of its attention.

    `count` is that of `gaze_loss`; `action_loss` is called with logits and labels.
    """
    action = action_loss(output.logits_BK.float(), label_B)
    if output.attention_BTHW is None:
        return Losses(action, action, torch.zeros_like(action))
    gaze = gaze_loss(output.attention_BTHW, gaze_BT2, valid_BT, gaze_sigma, count)
    return Losses(action + gaze_weight * gaze, action, gaze)
