"""Agreement of attention with gaze: AUC (Judd), AUC, NSS and F1.

Maps are enlarged bilinearly to 64 x 64 cells of the crop. Cell j of W stands for x = j / W, as in the gaze loss. For a
map that was trained without that loss this may be half a cell off.

B batch, T frames of a window, T' slices of the map (each stands for T / T' frames), R = 64, S = B x T' maps, F frames
of a map, P = R x R cells.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tune_ego.training.losses import gaze_target

RESOLUTION = 64
GAZE_RADIUS = 7.5
"""Cells of 64 around the gaze point that count as looked at: where the Gaussian of 3.2 cells that is used for EGTEA
(Lai et al., "In the Eye of Transformer", BMVC 2022) is over 0.001."""
_THRESHOLDS = 50


def enlarge(attention_BTHW: Tensor) -> Tensor:
    """Enlarge maps [B, T', H, W] bilinearly to [S, P]. A constant map becomes exactly 0."""
    height, width = attention_BTHW.shape[2:]
    maps_S1HW = attention_BTHW.float().flatten(0, 1)[:, None]
    low, high = maps_S1HW.aminmax(dim=-1, keepdim=True)
    constant = (high.amax(2) - low.amin(2))[:, 0] <= 1e-6 * maps_S1HW.abs().amax((2, 3))
    centre_R = (torch.arange(RESOLUTION, device=maps_S1HW.device) + 0.5) / RESOLUTION
    # grid_sample counts from -1 at the first cell to 1 at the last one.
    x_R, y_R = (2 * centre_R * side / max(side - 1, 1) - 1 for side in (width, height))
    grid_RR2 = torch.stack(torch.meshgrid(x_R, y_R, indexing="xy"), dim=-1).expand(len(maps_S1HW), -1, -1, -1)
    enlarged = F.grid_sample(maps_S1HW, grid_RR2, padding_mode="border", align_corners=True)
    return torch.where(constant, 0.0, enlarged.flatten(1))


def _fixated(cell_SF: Tensor, valid_SF: Tensor) -> Tensor:
    """Return a mask [S, F]: valid gaze points, only the first of those that lie in the same cell."""
    order = torch.arange(cell_SF.shape[1], device=cell_SF.device)
    same_SFF = (cell_SF[:, :, None] == cell_SF[:, None, :]) & valid_SF[:, None, :]
    return valid_SF & ~(same_SFF & (order[None, :] < order[:, None])).any(dim=2)


def auc_judd(map_SP: Tensor, cell_SF: Tensor, valid_SF: Tensor) -> Tensor:
    """Return AUC_Judd of the MIT saliency benchmark (Bylinskii et al., TPAMI 2019), without its noise against ties.

    The thresholds are the map's values at the gaze cells. The true positive rate is the share of gaze cells at or above
    a threshold, the false positive rate that of all other cells; the curve from (0, 0) to (1, 1) is integrated by
    trapezoids. Several gaze points in one cell count once. With few gaze points the score is too high: noise scores
    0.75 on one point. NaN for a map without gaze.
    """
    gaze_SF = _fixated(cell_SF, valid_SF)
    value_SF = map_SP.gather(1, cell_SF)
    cells_SF = (map_SP[:, None, :] >= value_SF[:, :, None]).sum(dim=2).double()
    hits_SF = ((value_SF[:, None, :] >= value_SF[:, :, None]) & gaze_SF[:, None, :]).sum(dim=2).double()
    gaze_S1 = gaze_SF.sum(dim=1, keepdim=True)
    # Both rates grow as the threshold falls, so each can be sorted by itself. Cells without gaze become (1, 1).
    rates = [hits_SF / gaze_S1, (cells_SF - hits_SF) / (map_SP.shape[1] - gaze_S1)]
    true_SF, false_SF = (F.pad(torch.where(gaze_SF, rate, 1.0).sort(dim=1)[0], (1, 0)) for rate in rates)
    ends = torch.ones_like(true_SF[:, :1])
    area_S = torch.trapezoid(torch.cat([true_SF, ends], dim=1), torch.cat([false_SF, ends], dim=1))
    return torch.where(gaze_S1[:, 0] > 0, area_S, torch.nan)


def auc(map_SP: Tensor, cell_SF: Tensor, valid_SF: Tensor) -> Tensor:
    """Return the area under the whole ROC curve of each map.

    This is the probability (Mann-Whitney) that the value at a gaze cell is above that at another cell. Equal values
    count half, so a uniform map and noise score 0.5. Several gaze points in one cell count once. NaN for a map without
    gaze.
    """
    gaze_SF = _fixated(cell_SF, valid_SF)
    value_SF = map_SP.gather(1, cell_SF)

    def outdone(others: Tensor, counts: Tensor) -> Tensor:
        """Count the `others` [S, n] below each gaze cell's value; equal values count as halves."""
        below = (others[:, None, :] < value_SF[:, :, None]).double() + (others[:, None, :] <= value_SF[:, :, None])
        return (below * counts[:, None, :]).sum(dim=2) / 2

    wins_SF = outdone(map_SP, torch.ones_like(map_SP)) - outdone(value_SF, gaze_SF)
    gaze_S = gaze_SF.sum(dim=1)
    share_S = torch.where(gaze_SF, wins_SF, 0.0).sum(dim=1) / (gaze_S * (map_SP.shape[1] - gaze_S))
    return torch.where(gaze_S > 0, share_S, torch.nan)


def nss(map_SP: Tensor, cell_SF: Tensor, valid_SF: Tensor) -> Tensor:
    """Return the normalised scanpath saliency (Peters et al., Vision Research 2005) of each map.

    This is the mean of the map's values at the gaze cells, in standard deviations from the map's mean. 0 for a uniform
    map, NaN for a map without gaze.
    """
    deviation_S1 = map_SP.std(dim=1, keepdim=True, correction=0)
    even_S1 = deviation_S1 <= 1e-6 * map_SP.abs().amax(dim=1, keepdim=True)
    score_SP = (map_SP - map_SP.mean(dim=1, keepdim=True)) / torch.where(even_S1, 1.0, deviation_S1)
    at_gaze_SF = torch.where(valid_SF & ~even_S1, score_SP.gather(1, cell_SF), 0.0)
    return at_gaze_SF.sum(dim=1) / valid_SF.sum(dim=1)


def overlaps(map_SP: Tensor, point_SF2: Tensor, thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Return (precision, recall), [S, F, thresholds], of the cells where the scaled map exceeds a threshold.

    Maps are scaled to [0, 1]. True cells are the disc of `GAZE_RADIUS` around each gaze point (x, y in [0, 1]).
    Precision is 0 where no cell exceeds the threshold.
    """
    low, high = map_SP.amin(dim=1, keepdim=True), map_SP.amax(dim=1, keepdim=True)
    scaled_SP = (map_SP - low) / (high - low).clamp(min=torch.finfo(map_SP.dtype).tiny)
    # Number of thresholds that each cell exceeds. Threshold k is exceeded by the cells whose number is over k.
    exceeded_SP = torch.searchsorted(thresholds, scaled_SP)
    centre = torch.arange(RESOLUTION, device=map_SP.device) + 0.5
    x, y = (point_SF2 * RESOLUTION).unbind(dim=-1)
    squared = (centre - y[..., None]).square()[..., :, None] + (centre - x[..., None]).square()[..., None, :]
    gaze_SFP = (squared.flatten(2) <= GAZE_RADIUS**2).to(map_SP.dtype)

    def over(weight_SNP: Tensor) -> Tensor:
        """Sum weights [S, N, P] over the cells that exceed each threshold: [S, N, thresholds]."""
        counts_SNP = exceeded_SP[:, None].expand_as(weight_SNP)
        weights = weight_SNP.new_zeros(*weight_SNP.shape[:2], len(thresholds) + 1).scatter_add_(
            2, counts_SNP, weight_SNP
        )
        return weights.flip(2).cumsum(2).flip(2)[..., 1:]

    hits_SFK, cells_S1K = over(gaze_SFP), over(torch.ones_like(scaled_SP)[:, None])
    return hits_SFK / cells_S1K.clamp(min=1), hits_SFK / gaze_SFP.sum(dim=2, keepdim=True).clamp(min=1)


class GazeScores:
    """Means over all windows that are added; gaze points outside the crop count as no gaze.

    A frame counts in each of the windows that it is in. A map with gaze that is not finite makes the means NaN.
    """

    def __init__(self, device: torch.device) -> None:
        self._judd, self._auc, self._nss = (torch.zeros((), device=device).double() for _ in range(3))
        self._maps, self._frames = (torch.zeros((), device=device).double() for _ in range(2))
        self._thresholds = torch.linspace(0, 1, _THRESHOLDS + 1, device=device)[:-1]
        self._precision, self._recall = (torch.zeros(_THRESHOLDS, device=device).double() for _ in range(2))

    def add(self, attention_BTHW: Tensor, gaze_BT2: Tensor, valid_BT: Tensor) -> None:
        """Add maps [B, T', H, W] with the gaze of their windows, x and y in [0, 1] of the crop."""
        slices = attention_BTHW.shape[1]
        map_SP = enlarge(attention_BTHW)
        inside_BT = valid_BT & (gaze_BT2 >= 0).all(dim=2) & (gaze_BT2 < 1).all(dim=2)
        point_BT2 = torch.where(inside_BT[..., None], gaze_BT2, 0.0)
        point_SF2 = point_BT2.unflatten(1, (slices, -1)).flatten(0, 1)
        valid_SF = inside_BT.unflatten(1, (slices, -1)).flatten(0, 1)
        cell_SF2 = (point_SF2 * RESOLUTION).long()
        cell_SF = cell_SF2[..., 1] * RESOLUTION + cell_SF2[..., 0]
        seen_S = valid_SF.any(dim=1)
        finite_S = attention_BTHW.flatten(0, 1).flatten(1).isfinite().all(dim=1)
        zero_S = torch.where(finite_S, 0.0, torch.nan)  # comparisons do not show a NaN
        # Not by indexing with masks: the CPU would wait for the GPU at each.
        self._judd += torch.where(seen_S, auc_judd(map_SP, cell_SF, valid_SF) + zero_S, 0).sum()
        self._auc += torch.where(seen_S, auc(map_SP, cell_SF, valid_SF) + zero_S, 0).sum()
        self._nss += torch.where(seen_S, nss(map_SP, cell_SF, valid_SF) + zero_S, 0).sum()
        self._maps += seen_S.sum()
        for total, counts in zip((self._precision, self._recall), overlaps(map_SP, point_SF2, self._thresholds)):
            total += torch.where(valid_SF[..., None], counts + zero_S[:, None, None], 0).sum(dim=(0, 1))
        self._frames += valid_SF.sum()

    def add_centre(self, shape: torch.Size, gaze_BT2: Tensor, valid_BT: Tensor, sigma: float) -> None:
        """Add a Gaussian in the middle of the crop: the baseline of a prediction that does not depend on the image."""
        batch, slices, height, width = shape
        middle = torch.full((batch, slices, 2), 0.5, device=gaze_BT2.device)
        seen = torch.ones(batch, slices, dtype=torch.bool, device=middle.device)
        self.add(gaze_target(middle, seen, (slices, height, width), sigma)[0], gaze_BT2, valid_BT)

    def result(self) -> dict[str, Any] | None:
        """Return the scores, or None where no frame had gaze.

        `auc_judd`, `auc` and `nss` are means over maps. `f1` is the best of 50 thresholds in [0, 1), with its
        `threshold`, `precision` and `recall` (means over frames). `maps` and `frames` count those with gaze; a frame
        counts in every window that contains it.
        """
        if not self._frames:
            return None
        precision, recall = self._precision / self._frames, self._recall / self._frames
        f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
        best = int(f1.argmax())
        return {
            "auc_judd": (self._judd / self._maps).item(),
            "auc": (self._auc / self._maps).item(),
            "nss": (self._nss / self._maps).item(),
            "f1": f1[best].item(),
            "precision": precision[best].item(),
            "recall": recall[best].item(),
            "threshold": self._thresholds[best].item(),
            "maps": int(self._maps),
            "frames": int(self._frames),
        }
