"""Placement of displayed frames on the session's clock of 24 frames a second."""

from __future__ import annotations

import numpy as np
import pytest

from tune_ego.dataset.frame_times import place_frames
from tune_ego.errors import UserError


def placed(times: list[float] | np.ndarray, named: int | None = None) -> tuple[list[int], str]:
    placement = place_frames(np.array(times, np.float64), named)
    return placement.sources.tolist(), placement.remark


@pytest.mark.parametrize("count", [0, 1, 2, 15, 2801])
@pytest.mark.parametrize("start", [0.0, 1.4, 3000.0])
def test_24_frames_a_second_are_the_session_s_own(count: int, start: float) -> None:
    times = start + np.arange(count) / 24
    assert placed(times) == (list(range(count)), "")
    assert placed(times, count) == (list(range(count)), "")
    assert placed(times, count + 3) == (list(range(count)), "")


def test_times_in_milliseconds_are_24_frames_a_second_too() -> None:
    """Matroska's clock."""
    times = np.round(np.arange(2801) * 1000 / 24) / 1000
    assert placed(times) == (list(range(2801)), "")


def test_half_and_double_rates() -> None:
    sources, remark = placed([0, 1 / 12, 2 / 12, 3 / 12])
    assert len(sources) == 8 and sources[::2] == [0, 1, 2, 3]
    assert remark.startswith("resampled from 12 to 24 frames a second: 4 of 8 session frames repeat a neighbour")
    change = "0 of 5 session frames repeat a neighbour, 5 of 10 frames are not used"
    assert placed(np.arange(10) / 48) == ([0, 2, 4, 6, 8], f"resampled from 48 to 24 frames a second: {change}")


def test_a_name_decides_between_a_wrong_rate_and_resampling() -> None:
    """23.976 frames a second over the longest clip would be 3 frames off."""
    times = np.arange(2801) * 1001 / 24000
    assert placed(times, 2801) == (list(range(2801)), "")
    assert len(placed(times, 2804)[0]) == 2804


def test_lost_frames_leave_a_gap_that_neighbours_fill() -> None:
    times = [0, 1 / 24, 2 / 24, 6 / 24, 7 / 24]
    sources, remark = placed(times, 8)
    assert sources[:3] == [0, 1, 2] and sources[6:] == [3, 4] and set(sources[3:6]) == {2, 3}
    assert remark.startswith("irregular times, placed by them: 3 of 8")


def test_frames_lost_at_the_start_are_known_by_the_named_length() -> None:
    """Seven of twelve frames are lost. Without the name, and under another one, the first frame counts as 0."""
    times = np.arange(7, 12) / 24
    sources, remark = placed(times, 12)
    assert sources == [0] * 7 + [0, 1, 2, 3, 4]
    assert remark.startswith("the first 7 session frames are lost: 7 of 12 session frames repeat a neighbour")
    for named in (None, 5, 11, 13):
        assert placed(times, named) == (list(range(5)), "")


def test_doubled_frames_between_two_session_frames_are_not_used() -> None:
    times = [0, 1 / 24, 1.4 / 24, 2 / 24, 3 / 24]
    assert placed(times, 4)[0] == [0, 1, 3, 4]


@pytest.mark.parametrize("times", [[0, 0, 1], [0, np.nan, 1], [0, 1 / 24, 10.1], [2, 1, 3]])
def test_damaged_times_are_refused(times: list[float]) -> None:
    with pytest.raises(UserError, match="its time stamps are damaged"):
        placed(times)
