"""Detection of actions in untrimmed video: scores of windows -> segments with a class, a start and an end.

The method is that of STPN's class-wise thresholding (Nguyen, Liu, Prasad, Han, CVPR 2018, section 3.4) with the
outer-inner contrast of AutoLoc (Shou, Gao, Zhang, Miyazawa, Chang, ECCV 2018, section 4.2) as the score:

1. A frame's score is the mean over the windows that hold it, smoothed in time by a Gaussian.
2. For each class and each of several thresholds, frames at or above the threshold form candidates. Candidates of a
   class that are close together are merged, and short ones are dropped.
3. A candidate's score is the class's mean score inside, minus that in a margin of a quarter of its length on each side.
4. Non-maximum suppression over all classes: of candidates that overlap, the one with the highest score stays. The
   overlap is a share of the shorter one, so that no candidate lies inside another.

Where no class reaches the lowest threshold, nothing is detected: that is the background.

F session frames, K classes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from tune_ego.config import LU_WINDOW
from tune_ego.dataset.gaze import FPS
from tune_ego.errors import UserError

_THRESHOLD_STEP = 0.05
_MARGIN = 0.25
"""Length of each outer margin, as a fraction of the candidate's."""
_TOP = 5


class SegmentSettings(NamedTuple):
    """Parameters of the detection."""

    threshold: float = 0.15
    """Lowest class score of an action, 0 to 1; below it is background. Higher thresholds in steps of 0.05 are tried."""
    smooth: float = 0.25
    """Standard deviation of the Gaussian that smooths the scores, seconds; 0: none."""
    merge: float = 0.5
    """Longest gap between two candidates of a class that are merged, seconds."""
    shortest: float = 0.5
    """Shortest segment, seconds."""
    nms: float = 0.3
    """Largest overlap of two segments, as a share of the shorter one."""

    def check(self) -> None:
        """Raise `UserError` for a value out of range, with the name of its option."""
        for name, value in self._asdict().items():
            limit = 1.0 if name in ("threshold", "nms") else 3600.0
            if not 0 <= value <= limit:
                raise UserError(f"--{name} {value}: goes from 0 to {limit:g}")


class Segment(NamedTuple):
    """Detected action."""

    start: float
    """Seconds from the first frame."""
    end: float
    action: str
    score: float
    """Contrast of the class's score inside to that around the segment, -1 to 1."""
    top: list[tuple[str, float]]
    """The five classes with the highest mean scores inside, with these scores, highest first."""


def frame_scores(starts: Sequence[int], scores_WK: np.ndarray, frames: int, span: int = LU_WINDOW.span) -> np.ndarray:
    """Return each frame's mean score over the windows that hold it, float32 [F, K].

    Args:
        starts: First frame of each window.
        scores_WK: Class scores of each window.
        frames: Number of frames, F; each is held by a window.
        span: Frames from the first to the last one of a window.
    """
    sums = np.zeros((frames + 1, scores_WK.shape[1]))
    counts = np.zeros(frames + 1)
    for start, scores_K in zip(starts, scores_WK):
        end = min(start + span, frames)
        sums[start] += scores_K
        sums[end] -= scores_K
        counts[start] += 1
        counts[end] -= 1
    # Sums of 16-bit rounded values are exact enough in float64: scores are at most 1.
    mean_FK: np.ndarray = np.cumsum(sums, axis=0)[:-1] / np.cumsum(counts)[:-1, None]
    return mean_FK.astype(np.float32)


def detect_segments(scores_FK: np.ndarray, classes: Sequence[str], settings: SegmentSettings) -> list[Segment]:
    """Return the actions in a video, by start.

    Args:
        scores_FK: Class scores of each session frame (`frame_scores`).
        classes: Names of the K classes.
        settings: Parameters of the method.
    """
    smooth_FK = _smooth(scores_FK, settings.smooth)
    # [F + 1, K]; differences are sums over frames
    sums = np.concatenate([np.zeros((1, len(classes))), np.cumsum(smooth_FK, axis=0, dtype=np.float64)])
    candidates = set[tuple[int, int, int]]()
    for label in np.flatnonzero(smooth_FK.max(axis=0) >= settings.threshold):
        for threshold in np.arange(settings.threshold, 1, _THRESHOLD_STEP):
            runs = _runs(smooth_FK[:, label] >= threshold, round(settings.merge * FPS))
            candidates |= {(start, end, int(label)) for start, end in runs if end - start >= settings.shortest * FPS}
    proposals = sorted(candidates)
    scores = np.array([_contrast(sums[:, label], start, end, settings.threshold) for start, end, label in proposals])
    return [
        Segment(
            start / FPS,
            end / FPS,
            classes[label],
            score,
            top_classes((sums[end] - sums[start]) / (end - start), classes),
        )
        for index in _suppress_overlaps(np.array(proposals).reshape(-1, 3)[:, :2], scores, settings.nms)
        for (start, end, label), score in [(proposals[index], float(scores[index]))]
    ]


def _suppress_overlaps(spans_N2: np.ndarray, scores_N: np.ndarray, overlap: float) -> list[int]:
    """Return the indices of the spans that non-maximum suppression keeps, ascending."""
    remaining, kept = np.argsort(-scores_N, kind="stable"), []
    while len(remaining):
        best, remaining = remaining[0], remaining[1:]
        kept.append(int(best))
        others_N2 = spans_N2[remaining]
        shorter = np.minimum(spans_N2[best, 1] - spans_N2[best, 0], others_N2[:, 1] - others_N2[:, 0])
        remaining = remaining[_shared(spans_N2[best], others_N2) <= overlap * shorter]
    return sorted(kept)


def _shared(interval_2: np.ndarray, others_N2: np.ndarray) -> np.ndarray:
    """Return the length of the intersection of an interval with each of N others."""
    shared = np.minimum(interval_2[1], others_N2[:, 1]) - np.maximum(interval_2[0], others_N2[:, 0])
    lengths: np.ndarray = np.maximum(shared, 0)
    return lengths


def interval_overlaps(interval_2: np.ndarray, others_N2: np.ndarray) -> np.ndarray:
    """Return the intersection over union, float64 [N], of an interval (start, end) and N others."""
    shared = _shared(interval_2, others_N2)
    lengths = (interval_2[1] - interval_2[0]) + (others_N2[:, 1] - others_N2[:, 0])
    ratio: np.ndarray = shared / np.maximum(lengths - shared, 1e-12)
    return ratio


def _smooth(scores_FK: np.ndarray, seconds: float) -> np.ndarray:
    if not seconds:
        return scores_FK
    size = 2 * int(np.ceil(3 * seconds * FPS)) + 1
    # an image with a column for each class, blurred along its columns only
    return cv2.GaussianBlur(scores_FK, (1, size), sigmaX=0, sigmaY=seconds * FPS, borderType=cv2.BORDER_REPLICATE)


def _runs(inside_F: np.ndarray, gap: int) -> Iterable[tuple[int, int]]:
    """Return (first frame, frame after the last) of each run of True; runs at most `gap` frames apart are one."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], inside_F, [False]]).astype(np.int8)))
    starts, ends = edges[::2], edges[1::2]
    if not len(starts):
        return []
    apart = starts[1:] - ends[:-1] > gap
    first, last = starts[np.concatenate([[True], apart])], ends[np.concatenate([apart, [True]])]
    return list(zip(first.tolist(), last.tolist()))


def _contrast(sums_F: np.ndarray, start: int, end: int, background: float) -> float:
    """Return the mean inside [start, end) minus the mean in the margins, from cumulative sums [F + 1].

    A segment that is the whole video has no margins: `background` stands for their mean.
    """
    margin = max(1, round(_MARGIN * (end - start)))
    left, right = max(start - margin, 0), min(end + margin, len(sums_F) - 1)
    inside = float(sums_F[end] - sums_F[start])
    around = float(sums_F[right] - sums_F[left]) - inside
    outside = around / (right - left - (end - start)) if right - left > end - start else background
    return inside / (end - start) - outside


def top_classes(scores_K: np.ndarray, classes: Sequence[str]) -> list[tuple[str, float]]:
    """Return the five classes with the highest scores [K], with these scores, highest first."""
    order = itertools.islice(np.argsort(-scores_K, kind="stable").tolist(), _TOP)
    return [(classes[label], float(scores_K[label])) for label in order]
