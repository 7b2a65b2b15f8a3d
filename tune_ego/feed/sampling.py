"""Order of the training samples, and the clip, frames, crop and flip of each sample. No Ray and no torch here.

All functions are pure. In a training set of N clips, sample n is the (n mod N)-th clip of a permutation seeded by
(seed, n div N). Its window, crop and flip are drawn by a generator seeded by (seed, n).
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tune_ego.config import WINDOW_FRAMES
from tune_ego.dataset.shards import Clip

_EPOCH_ORDER, _WINDOW_DRAW = 0, 1  # independent random streams of one seed
EVALUATION_STEP = 8
"""Frames between the starts of two evaluation windows (Lu, Liao, Li, ICCV Workshops 2019)."""


class Window(NamedTuple):
    """16 consecutive frames of a clip, their crop and whether they are mirrored."""

    clip: int
    """Index in the list of clips."""
    start: int
    """First frame."""
    top: int
    """First row of the crop, pixels."""
    left: int
    """First column of the crop, pixels."""
    flip: bool


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, clips: int) -> np.ndarray:
    """Return the order of the clips in an epoch, int64 [clips]."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_EPOCH_ORDER, epoch))).permutation(clips)


def training_window(clips: list[Clip], seed: int, sample: int, image_size: tuple[int, int], crop: int) -> Window:
    """Return the window of a training sample, numbered from the start of the run. `image_size` is (width, height).

    The order of the random draws must not change: the same seed would give other samples.
    """
    epoch, place = divmod(sample, len(clips))
    clip = int(_permutation(seed, epoch, len(clips))[place])
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_WINDOW_DRAW, sample)))
    start = int(random.integers(max(clips[clip].frames - WINDOW_FRAMES, 0) + 1))
    top = int(random.integers(image_size[1] - crop + 1))
    left = int(random.integers(image_size[0] - crop + 1))
    return Window(clip, start, top, left, bool(random.integers(2)))


def centre_window(clip: int, start: int, image_size: tuple[int, int], crop: int) -> Window:
    """Return a window with a crop in the centre of the image; `image_size` is (width, height)."""
    return Window(clip, start, (image_size[1] - crop) // 2, (image_size[0] - crop) // 2, False)


def dense_starts(frames: int) -> list[int]:
    """Return the starts of a clip's evaluation windows: 0, 8, 16, ... and the start of the last possible window."""
    last = max(frames - WINDOW_FRAMES, 0)
    starts = list(range(0, last + 1, EVALUATION_STEP))
    return starts if starts[-1] == last else [*starts, last]


def spread_starts(frames: int, count: int) -> list[int]:
    """Return the starts of `count` evenly spaced windows, fewer for short clips.

    For an odd `count`, a window is in the middle of the clip.
    """
    last = max(frames - WINDOW_FRAMES, 0)
    return sorted({round(last * (2 * index + 1) / (2 * count)) for index in range(count)})
