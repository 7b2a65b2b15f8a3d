"""Placement of a video's frames on the session's clock of 24 frames a second.

Gaze is recorded per session frame. A clip that was encoded again may have another frame rate, or frames that were lost
or doubled, so that its frame i is not the clip's session frame i. No video is read here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from tune_ego.dataset.gaze import FPS
from tune_ego.errors import UserError

_EVEN = 0.25
"""Largest deviation of a frame's duration from the median, as a fraction, of a constant frame rate."""
_SAME_RATE = 0.01
"""Largest deviation from 24 frames a second, as a fraction, that is not mentioned."""
_MOST_REORDERED = 4
"""Frames by which a stream with B-frames may be delayed; x264 has 2."""
_TIE = 1e-6
"""Difference of two times, seconds, below which they are equal."""
_LARGEST_GAP = 10.0
"""Longest time between two frames, seconds. Longer ones are damaged time stamps."""


class Placement(NamedTuple):
    """Assignment of a video's frames to the session frames of a clip."""

    sources: np.ndarray
    """int64 [session frames], ascending: the displayed frame, from 0, that is used for each session frame."""
    remark: str
    """Description in words; empty where session frame i is displayed frame i at 24 frames a second."""


def place_frames(seconds: np.ndarray, named: int | None = None, *, reorders: bool = False) -> Placement:
    """Assign displayed frames to session frames.

    Each session frame gets the displayed frame that is nearest in time. An exception are clips of a constant frame rate
    with exactly as many frames as their names say: there every frame is one session frame, and only the rate of the
    file is wrong.

    The first frame is session frame 0, except where the clip has its named length only when its times are counted from
    0: then frames were lost at its start.

    Args:
        seconds: float64 [frames], ascending: presentation times.
        named: Number of session frames in the clip's name; None if it is unknown.
        reorders: Whether the stream has B-frames. Some containers then begin some frames after 0.

    Raises:
        UserError: The times are not ascending, or two neighbours are over 10 s apart.
    """
    count = len(seconds)
    if count < 2:
        return Placement(np.arange(count), "")
    durations = np.diff(seconds)
    if not np.isfinite(seconds).all() or durations.min() <= 0 or durations.max() > _LARGEST_GAP:
        raise UserError(f"its time stamps are damaged: frames share a time, or are over {_LARGEST_GAP:g} s apart")
    duration = float(np.median(durations))
    rate = 1 / duration
    even = bool((np.abs(durations - duration) <= _EVEN * duration).all())
    if even:  # less sensitive to times that the container rounds to milliseconds
        duration = float(seconds[-1] - seconds[0]) / (count - 1)
        rate = 1 / duration
    if even and named == count:
        remark = "" if abs(rate / FPS - 1) <= _SAME_RATE else f"{rate:.4g} frames a second, as many as its name says"
        return Placement(np.arange(count), remark and f"{remark}: each is one session frame")
    lost = _frames_lost_at_the_start(seconds, duration, named, _MOST_REORDERED if reorders else 0)
    time = seconds if lost else seconds - seconds[0]
    frames = _session_frames(time[-1] + duration)
    middles = (time[1:] + time[:-1]) / 2
    # Of two equally near frames the later one: a clip that was resampled before shows its frames late, never early.
    sources = np.searchsorted(middles - _TIE, np.arange(frames) / FPS, side="right")
    if np.array_equal(sources, np.arange(count)):
        return Placement(sources, "")
    unused, repeated = count - len(np.unique(sources)), frames - len(np.unique(sources))
    change = f"{repeated} of {frames} session frames repeat a neighbour, {unused} of {count} frames are not used"
    kind = f"resampled from {rate:.4g} to {FPS} frames a second" if even else "irregular times, placed by them"
    kind = f"the first {lost} session frames are lost" if lost else kind
    return Placement(sources, f"{kind}: {change}")


def _session_frames(seconds: float) -> int:
    return max(1, round(FPS * seconds))


def _frames_lost_at_the_start(seconds: np.ndarray, duration: float, named: int | None, delay: int) -> int:
    """Return the number of session frames before the first frame of a clip that has its named length from time 0 on.

    Up to `delay` of them are not lost, but a delay of the decoder.
    """
    if named is None or seconds[0] * FPS <= delay + 0.5:
        return 0
    end = seconds[-1] + duration
    from_first, from_zero = _session_frames(end - seconds[0]), _session_frames(end)
    return round(FPS * float(seconds[0])) if from_zero == named != from_first else 0
