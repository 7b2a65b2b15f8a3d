"""Agreement of detected actions with the true ones: frame accuracy, average precision, confusion.

The average precision is that of ActivityNet (Caba Heilbron, Escorcia, Ghanem, Niebles, CVPR 2015; its evaluation code):
detections of a class are taken by descending score; a detection is right if it overlaps a true segment of its video by
at least a threshold (temporal intersection over union) that no detection before it has taken; precision is made
monotonic and integrated over recall.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from tune_ego.dataset.gaze import FPS
from tune_ego.prediction.segments import Segment, interval_overlaps

OVERLAPS = (0.1, 0.2, 0.3, 0.4, 0.5)
"""Thresholds of the temporal intersection over union."""
BACKGROUND = "(no action)"


class TrueSegment(NamedTuple):
    """Annotated action of a video."""

    start: float
    """Seconds from the first frame."""
    end: float
    action: str


def detection_scores(
    detected: Mapping[str, Sequence[Segment]], truth: Mapping[str, Sequence[TrueSegment]], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Compare the detected actions of videos with the true ones.

    Args:
        detected: Video -> its detected actions.
        truth: Video -> its true actions; the same videos.
        seconds: Video -> its length.

    Returns:
        `frame_accuracy`: share of the frames inside true actions that a detected segment of the right class holds (the
        one with the highest score, where several hold the frame). `background_accuracy`: share of the frames outside
        that no segment holds; None without such frames. `map`: threshold as text -> mean average precision over the
        classes that occur. `confusion`: true action -> detected action -> seconds, with `BACKGROUND` for neither.
        `segments`: the same in numbers of segments. Each true segment is assigned the detected one that overlaps it
        most, or `BACKGROUND` where none overlaps it by the lowest of `OVERLAPS`. Detected segments that are assigned
        to no true one are counted as `BACKGROUND`'s.
    """
    confusion: dict[str, dict[str, float]] = {}
    for video, segments in truth.items():
        frames = round(seconds[video] * FPS)
        for true, predicted in zip(
            _frame_labels(segments, frames), _frame_labels(sorted(detected[video], key=_score), frames)
        ):
            row = confusion.setdefault(true, {})
            row[predicted] = row.get(predicted, 0) + 1 / FPS
    actions = sorted({segment.action for segments in truth.values() for segment in segments})
    average = {action: _average_precisions(action, detected, truth) for action in actions}
    inside = {action: row for action, row in confusion.items() if action != BACKGROUND}
    outside = confusion.get(BACKGROUND, {})
    total, idle = sum(sum(row.values()) for row in inside.values()), sum(outside.values())
    return {
        "frame_accuracy": sum(row.get(action, 0) for action, row in inside.items()) / total if total else None,
        "background_accuracy": outside.get(BACKGROUND, 0) / idle if idle else None,
        "map": {
            str(threshold): float(np.mean([values[place] for values in average.values()])) if average else None
            for place, threshold in enumerate(OVERLAPS)
        },
        "confusion": {
            true: {name: round(value, 3) for name, value in sorted(row.items())}
            for true, row in sorted(confusion.items())
        },
        "segments": _segment_confusion(detected, truth),
    }


def count_recognized(scores_FK: np.ndarray, truth: Sequence[TrueSegment], classes: Sequence[str]) -> int:
    """Return the number of true segments inside which the right class has the highest mean score.

    Args:
        scores_FK: Class scores of each session frame of a video.
        truth: True actions of the video.
        classes: Names of the K classes.
    """
    spans = [(round(one.start * FPS), max(round(one.end * FPS), round(one.start * FPS) + 1)) for one in truth]
    means = [scores_FK[start:end].mean(axis=0) if start < len(scores_FK) else None for start, end in spans]
    return sum(mean is not None and classes[int(mean.argmax())] == one.action for mean, one in zip(means, truth))


def _segment_confusion(
    detected: Mapping[str, Sequence[Segment]], truth: Mapping[str, Sequence[TrueSegment]]
) -> dict[str, dict[str, int]]:
    """Return true action -> detected action -> number of segments."""
    pairs = Counter[tuple[str, str]]()
    for video, segments in truth.items():
        spans_N2 = np.array([(one.start, one.end) for one in detected[video]]).reshape(-1, 2)
        left_over = set(range(len(spans_N2)))
        for true in segments:
            ratios = interval_overlaps(np.array((true.start, true.end)), spans_N2)
            best = int(ratios.argmax()) if len(ratios) and ratios.max() >= OVERLAPS[0] else None
            pairs[true.action, BACKGROUND if best is None else detected[video][best].action] += 1
            left_over.discard(-1 if best is None else best)
        pairs.update((BACKGROUND, detected[video][index].action) for index in left_over)
    confusion: dict[str, dict[str, int]] = {}
    for (true_action, action), count in sorted(pairs.items()):
        confusion.setdefault(true_action, {})[action] = count
    return confusion


def _score(segment: Segment) -> float:
    return segment.score


def _frame_labels(segments: Sequence[Segment] | Sequence[TrueSegment], frames: int) -> list[str]:
    """Return the action of each frame; where segments overlap, that of the last one in the list."""
    labels = [BACKGROUND] * frames
    for segment in segments:
        first, end = round(segment.start * FPS), min(round(segment.end * FPS), frames)
        labels[first:end] = [segment.action] * max(end - first, 0)
    return labels


def _average_precisions(
    action: str, detected: Mapping[str, Sequence[Segment]], truth: Mapping[str, Sequence[TrueSegment]]
) -> list[float]:
    """Return the average precision of one action at each of `OVERLAPS`."""
    true = {
        video: np.array([(s.start, s.end) for s in segments if s.action == action]).reshape(-1, 2)
        for video, segments in truth.items()
    }
    detections = [(s.score, video, (s.start, s.end)) for video in truth for s in detected[video] if s.action == action]
    detections.sort(key=lambda entry: -entry[0])
    count = sum(len(spans) for spans in true.values())
    return [_average_precision(detections, true, count, threshold) for threshold in OVERLAPS]


def _average_precision(
    detections: Sequence[tuple[float, str, tuple[float, float]]],
    true: Mapping[str, np.ndarray],
    count: int,
    threshold: float,
) -> float:
    taken = {video: np.zeros(len(spans), bool) for video, spans in true.items()}
    right = np.zeros(len(detections))
    for place, (_, video, span) in enumerate(detections):
        ratios = np.where(taken[video], -1.0, interval_overlaps(np.array(span), true[video]))
        if len(ratios) and ratios.max() >= threshold:
            taken[video][ratios.argmax()] = True
            right[place] = 1
    hits = np.cumsum(right)
    precision = hits / np.arange(1, len(detections) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]  # the best precision at this recall or above
    return float((precision * right).sum() / count)
