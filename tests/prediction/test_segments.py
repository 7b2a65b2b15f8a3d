"""Detection of segments in frame scores, and its parameters."""

from __future__ import annotations

import numpy as np
import pytest

from tune_ego.errors import UserError
from tune_ego.prediction.segments import SegmentSettings, detect_segments, frame_scores, interval_overlaps

SHARP = SegmentSettings(threshold=0.5, smooth=0, merge=0, shortest=0, nms=0.3)
NAMES = ["cut", "wash", "open"]


def scores(frames: int, *spans: tuple[int, int, int, float]) -> np.ndarray:
    """Scores of 0.1 with spans of (first frame, end, class, score)."""
    values = np.full((frames, len(NAMES)), 0.1, np.float32)
    for first, end, label, score in spans:
        values[first:end, label] = score
    return values


def detected(values: np.ndarray, settings: SegmentSettings = SHARP) -> list[tuple[int, int, str]]:
    return [(round(s.start * 24), round(s.end * 24), s.action) for s in detect_segments(values, NAMES, settings)]


def test_a_frame_s_score_is_the_mean_over_its_windows() -> None:
    windows = np.random.default_rng(0).random((4, 3)).astype(np.float32)
    starts, frames = [0, 8, 16, 19], 35
    expected = [
        np.mean([windows[w] for w, start in enumerate(starts) if start <= frame < start + 16], axis=0)
        for frame in range(frames)
    ]
    np.testing.assert_allclose(frame_scores(starts, windows, frames), expected, atol=1e-6)
    np.testing.assert_allclose(frame_scores([0], windows[:1], 5), np.repeat(windows[:1], 5, axis=0))


def test_actions_and_the_background_between_them() -> None:
    values = scores(240, (10, 60, 0, 0.9), (100, 150, 1, 0.7), (150, 200, 0, 0.8))
    assert detected(values) == [(10, 60, "cut"), (100, 150, "wash"), (150, 200, "cut")]
    (first, *_), nothing = (
        detect_segments(values, NAMES, SHARP),
        detect_segments(values, NAMES, SHARP._replace(threshold=0.95)),
    )
    assert nothing == [] and first.score == pytest.approx(0.8)  # 0.9 inside, 0.1 around
    assert [name for name, _ in first.top] == ["cut", "wash", "open"] and first.top[0][1] == pytest.approx(0.9)


def test_gaps_short_segments_and_smoothing() -> None:
    values = scores(240, (10, 60, 0, 0.9), (66, 100, 0, 0.9), (150, 154, 1, 0.9))
    assert detected(values) == [(10, 60, "cut"), (66, 100, "cut"), (150, 154, "wash")]
    assert detected(values, SHARP._replace(merge=0.25)) == [(10, 100, "cut"), (150, 154, "wash")]
    assert detected(values, SHARP._replace(shortest=0.2)) == [(10, 60, "cut"), (66, 100, "cut")]
    assert detected(values, SHARP._replace(smooth=0.25)) == [(10, 100, "cut")]


def test_of_overlapping_candidates_the_one_with_the_highest_contrast_stays() -> None:
    """A plateau of 0.9 inside a slope of 0.6: the plateau has the contrast 0.3, the whole 0.65."""
    slope = scores(300, (50, 200, 0, 0.6), (120, 150, 0, 0.9))
    assert detected(slope) == [(50, 200, "cut")]
    assert detected(slope, SHARP._replace(nms=1.0)) == [(50, 200, "cut"), (120, 150, "cut")]
    assert detected(slope, SHARP._replace(threshold=0.8)) == [(120, 150, "cut")]
    other = scores(300, (50, 150, 0, 0.9), (70, 140, 1, 0.6))
    assert detected(other) == [(50, 150, "cut")]


def test_a_video_that_is_one_action() -> None:
    """Without margins the threshold stands for the background, so a part with a higher contrast wins."""
    whole = scores(100, (0, 100, 0, 0.9))
    assert detected(whole) == [(0, 100, "cut")]
    assert detect_segments(whole, NAMES, SHARP)[0].score == pytest.approx(0.4)
    with_another = scores(100, (0, 100, 0, 0.55), (40, 60, 1, 0.6))
    assert detected(with_another) == [(40, 60, "wash")]


def test_intersection_over_union() -> None:
    others = np.array([[0, 10], [5, 15], [10, 20], [2, 4], [0, 0]])
    assert interval_overlaps(np.array([0, 10]), others).tolist() == pytest.approx([1, 1 / 3, 0, 0.2, 0])


@pytest.mark.parametrize("changes", [{"threshold": 1.5}, {"smooth": -1}, {"merge": -0.1}, {"shortest": -2}, {"nms": 2}])
def test_a_parameter_out_of_range_is_named(changes: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(changes))} "):
        SegmentSettings(**changes).check()
