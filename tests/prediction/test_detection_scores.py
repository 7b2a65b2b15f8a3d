"""Scores of a detection against a literal re-statement of ActivityNet's evaluation."""

from __future__ import annotations

import numpy as np
import pytest

from tune_ego.prediction.detection_scores import (
    BACKGROUND,
    OVERLAPS,
    TrueSegment,
    count_recognized,
    detection_scores,
)
from tune_ego.prediction.segments import Segment


def literal_average_precision(
    truth: list[tuple[str, float, float]], predictions: list[tuple[str, float, float, float]], threshold: float
) -> float:
    """One class: (video, start, end) and (video, start, end, score), as in `compute_average_precision_detection`."""
    order = sorted(range(len(predictions)), key=lambda index: -predictions[index][3])
    locked: set[int] = set()
    true_positive, false_positive = np.zeros(len(order)), np.zeros(len(order))
    for place, index in enumerate(order):
        video, start, end, _ = predictions[index]
        candidates = []
        for number, (true_video, true_start, true_end) in enumerate(truth):
            if true_video == video:
                inter = max(0.0, min(end, true_end) - max(start, true_start))
                candidates.append((inter / ((end - start) + (true_end - true_start) - inter), number))
        for ratio, number in sorted(candidates, reverse=True):
            if ratio < threshold:
                break
            if number not in locked:
                locked.add(number)
                true_positive[place] = 1
                break
        if not true_positive[place]:
            false_positive[place] = 1
    recall = np.cumsum(true_positive) / len(truth)
    precision = np.cumsum(true_positive) / (np.cumsum(true_positive) + np.cumsum(false_positive))
    recall, precision = np.hstack([[0], recall, [1]]), np.hstack([[0], precision, [0]])
    for place in range(len(precision) - 2, -1, -1):
        precision[place] = max(precision[place], precision[place + 1])
    steps = np.where(recall[1:] != recall[:-1])[0] + 1
    return float(((recall[steps] - recall[steps - 1]) * precision[steps]).sum())


def test_mean_average_precision_is_that_of_activitynet() -> None:
    random = np.random.default_rng(3)
    videos, actions = ["a", "b", "c"], ["cut", "wash", "open"]
    truth: dict[str, list[TrueSegment]] = {}
    detected: dict[str, list[Segment]] = {}
    for video in videos:
        starts = np.sort(random.uniform(0, 90, 12))
        truth[video] = [TrueSegment(s, s + random.uniform(2, 9), str(random.choice(actions))) for s in starts]
        detected[video] = [
            Segment(
                max(0, true.start + random.normal(0, 1.5)),
                true.end + random.normal(0, 1),
                true.action if random.random() < 0.7 else str(random.choice(actions)),
                float(random.random()),
                [],
            )
            for true in truth[video]
            for _ in range(int(random.integers(0, 3)))
        ]
    result = detection_scores(detected, truth, dict.fromkeys(videos, 110.0))
    for threshold in OVERLAPS:
        expected = [
            literal_average_precision(
                [(v, s.start, s.end) for v in videos for s in truth[v] if s.action == action],
                [(v, s.start, s.end, s.score) for v in videos for s in detected[v] if s.action == action],
                threshold,
            )
            for action in actions
        ]
        assert 0 < np.mean(expected) < 1
        assert result["map"][str(threshold)] == pytest.approx(np.mean(expected))


def test_frames_and_the_seconds_of_the_confusion() -> None:
    """Of 4 s of true actions 2 s are right, 1 s is wrong and 1 s missed; of 6 s without one, 1 s is detected."""
    truth = {"v": [TrueSegment(1, 3, "cut"), TrueSegment(5, 7, "wash")]}
    detected = {"v": [Segment(0, 3, "cut", 0.9, []), Segment(5, 6, "open", 0.4, [])]}
    result = detection_scores(detected, truth, {"v": 10})
    assert result["frame_accuracy"] == pytest.approx(0.5)
    assert result["background_accuracy"] == pytest.approx(5 / 6)
    assert result["confusion"] == {
        BACKGROUND: {BACKGROUND: 5.0, "cut": 1.0},
        "cut": {"cut": 2.0},
        "wash": {BACKGROUND: 1.0, "open": 1.0},
    }


def test_true_segments_are_recognized_by_their_mean_score() -> None:
    """At 24 frames a second: the mean decides and not the majority of frames; times beyond the video count as wrong."""
    scores = np.zeros((96, 2), np.float32)
    scores[:24] = (0.4, 0.6)
    scores[24:40] = (0.45, 0.55)
    scores[40:48] = (1.0, 0.0)
    scores[48:70], scores[70:72] = (0.4, 0.6), (1.0, 0.0)
    truth = [TrueSegment(0, 1, "b"), TrueSegment(1, 2, "a"), TrueSegment(1, 1.5, "a"), TrueSegment(9, 10, "a")]
    assert count_recognized(scores, truth, ["a", "b"]) == 2
    assert count_recognized(scores, [TrueSegment(2, 3, "b")], ["a", "b"]) == 1  # nor does the highest score decide
    assert count_recognized(scores, truth[1:2], ["b", "a"]) == 0
    assert count_recognized(scores, [], ["a", "b"]) == 0


def test_the_confusion_of_segments() -> None:
    """In `v` one true segment is right, one is detected as another and one missed; two detections are left over. In
    `x` one detection is assigned to two true segments."""
    truth = {"v": [TrueSegment(1, 3, "cut"), TrueSegment(5, 7, "wash"), TrueSegment(8, 9, "cut")], "w": []}
    truth["x"] = [TrueSegment(0, 2, "cut"), TrueSegment(2, 4, "open")]
    detected = {
        "v": [Segment(0, 1.2, "open", 0.2, []), Segment(1, 3.5, "cut", 0.9, []), Segment(6, 8, "open", 0.4, [])],
        "w": [Segment(0, 1, "cut", 0.5, [])],
        "x": [Segment(0, 4, "cut", 0.5, [])],
    }
    result = detection_scores(detected, truth, {"v": 10, "w": 2, "x": 4})
    assert result["segments"] == {
        BACKGROUND: {"cut": 1, "open": 1},
        "cut": {BACKGROUND: 1, "cut": 2},
        "open": {"cut": 1},
        "wash": {"open": 1},
    }


def test_where_detections_overlap_the_higher_score_counts() -> None:
    truth = {"v": [TrueSegment(0, 2, "cut")]}
    low, high = Segment(0, 2, "cut", 0.3, []), Segment(0, 1, "wash", 0.8, [])
    assert detection_scores({"v": [high, low]}, truth, {"v": 2})["frame_accuracy"] == pytest.approx(0.5)
    nothing = detection_scores({"v": []}, truth, {"v": 2})
    assert nothing["frame_accuracy"] == 0 and nothing["background_accuracy"] is None and nothing["map"]["0.5"] == 0
