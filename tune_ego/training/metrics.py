"""Class scores per clip, and the accuracies made from them. N clips, K classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

Scores = TypeVar("Scores", Tensor, np.ndarray)


class ClipScores:
    """Softmax scores of each stream, summed over the windows of each clip.

    Each worker adds its own windows. `reduce` sums over workers, so the result does not depend on their number.
    """

    def __init__(self, modalities: tuple[str, ...], clips: int, classes: int, device: torch.device) -> None:
        self._sums = {name: torch.zeros(clips, classes, dtype=torch.float64, device=device) for name in modalities}
        self._windows = torch.zeros(clips, dtype=torch.float64, device=device)

    def add(self, clip_B: Tensor, logits: dict[str, Tensor], present_B: Tensor) -> None:
        """Add windows: indices of their clips, each stream's logits [B, K], and a mask of rows that are no padding."""
        weight_B = present_B.double()
        self._windows.index_add_(0, clip_B, weight_B)
        for name, logits_BK in logits.items():
            scores_BK = logits_BK.double().softmax(dim=1) * weight_B[:, None]
            self._sums[name].index_add_(0, clip_B, scores_BK)

    def reduce(self, fusion_weight: float) -> dict[str, Tensor]:
        """Return mean scores [N, K] over the windows of all workers, per stream, and `fused` for two streams."""
        if dist.is_available() and dist.is_initialized():
            for tensor in (*self._sums.values(), self._windows):
                dist.all_reduce(tensor)
        scores = {name: total / self._windows[:, None].clamp(min=1) for name, total in self._sums.items()}
        if len(scores) == 2:
            scores["fused"] = fuse(scores, fusion_weight)
        return scores


def fuse(scores: Mapping[str, Scores], rgb_weight: float) -> Scores:
    """Return the weighted mean of the two streams' softmax scores, tensors or arrays."""
    return rgb_weight * scores["rgb"] + (1 - rgb_weight) * scores["flow"]


def confusion(scores_NK: Tensor, label_N: Tensor) -> Tensor:
    """Return the confusion matrix, counts [K, K]: rows are true classes, columns predicted classes."""
    classes = scores_NK.shape[1]
    pairs = label_N * classes + scores_NK.argmax(dim=1)
    return torch.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def micro_accuracy(confusion_KK: Tensor) -> float:
    """Return the share of clips that are classified correctly; NaN without clips."""
    return (confusion_KK.diagonal().sum() / confusion_KK.sum()).item()


def class_recall(confusion_KK: Tensor) -> list[float | None]:
    """Return the share of each class's clips that are classified correctly; None for a class without clips."""
    pairs = zip(confusion_KK.diagonal().tolist(), confusion_KK.sum(dim=1).tolist())
    return [right / clips if clips else None for right, clips in pairs]


def mean_class_accuracy(confusion_KK: Tensor) -> float:
    """Return the mean recall of the classes that have clips; NaN without clips."""
    present = [recall for recall in class_recall(confusion_KK) if recall is not None]
    return sum(present) / len(present) if present else math.nan


def accuracies(scores: dict[str, Tensor], label_N: Tensor) -> dict[str, dict[str, float]]:
    """Return `micro_accuracy` and `mean_class_accuracy`, fractions, for each entry of `scores`."""
    result = {}
    for name, scores_NK in scores.items():
        counts = confusion(scores_NK, label_N)
        result[name] = {"micro_accuracy": micro_accuracy(counts), "mean_class_accuracy": mean_class_accuracy(counts)}
    return result


def cross_entropy(scores_NK: Tensor, label_N: Tensor) -> float:
    """Return the mean of -log of the score of each clip's class; a score of 0 counts as the smallest number."""
    own = scores_NK.gather(1, label_N[:, None]).clamp_min(torch.finfo(scores_NK.dtype).tiny)
    return -own.log().mean().item()
