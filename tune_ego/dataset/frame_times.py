"""Placement of a video's frames on the session's clock of 24 frames a second.

Gaze is recorded per session frame. A clip that was encoded again may have another frame rate, or frames that were lost
or doubled, so that its frame i is not the clip's session frame i. No video is read here.
"""

from __future__ import annotations

import math
import statistics
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
_LARGEST_STEP_BACK = 1.0
"""Longest time, seconds, by which a frame of a stream may be before the one that is displayed before it."""
_RECENT = 24
"""Frames whose median duration is the usual one."""


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


class SessionClock:
    """Placement of the frames of a video that is read once, from its first frame on, without its end in sight.

    Each session frame gets the displayed frame that is nearest in time, as in `place_frames`. A frame that is up to a
    second before the latest one, or at its time, takes its place. Where the times jump backward by more, or forward by
    over 10 s, the clock continues after the usual duration of a frame.
    """

    def __init__(self, duration: float) -> None:
        """Start the clock. `duration` is that of a frame, in seconds, where times are absent."""
        self._duration = duration
        self._first: float | None = None
        self._last = 0.0
        """Time of the latest frame since the first one, seconds."""
        self._shift = 0.0
        self._given = 0
        """Session frames that have their displayed frame."""
        self._recent: list[float] = []
        """Latest durations of frames, seconds."""
        self.jumps = 0
        """Number of times that were not plausible."""

    def add(self, seconds: float | None) -> int:
        """Add the next displayed frame by its presentation time. Return how many session frames show the one before."""
        if self._first is None:
            self._first = seconds or 0.0
            return 0
        time = None if seconds is None else seconds - self._first + self._shift
        step = None if time is None else time - self._last
        if step is not None and -_LARGEST_STEP_BACK < step <= 0:
            return 0
        if step is None or not 0 < step <= _LARGEST_GAP:
            usual = statistics.median(self._recent) if self._recent else self._duration
            if time is not None:
                self.jumps += 1
                self._shift += self._last + usual - time
            step = usual
        self._recent = [*self._recent[-_RECENT:], step]
        middle = self._last + step / 2
        self._last += step
        return self._give(math.ceil((middle - _TIE) * FPS))

    def end(self) -> int:
        """Return how many session frames show the last displayed frame."""
        if self._first is None:
            return 0
        usual = statistics.median(self._recent) if self._recent else self._duration
        return self._give(max(1, round(FPS * (self._last + usual))))

    def _give(self, until: int) -> int:
        count = max(until - self._given, 0)
        self._given += count
        return count
