"""Order of the training samples, and the clip, frames, crop and flip of each sample. No Ray and no torch here.

All functions are pure. In a training set of N clips, sample n is the (n mod N)-th clip of an order seeded by
(seed, n div N). Its window, crop and flip are drawn by a generator seeded by (seed, n).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from tune_ego.config import LU_WINDOW, AugmentConfig, Sampling, WindowForm
from tune_ego.dataset.shards import Clip

_EPOCH_ORDER, _WINDOW_DRAW, _REGION_DRAW = 0, 1, 2  # independent random streams of one seed
_SHARE_EXPONENTS: dict[Sampling, float] = {"uniform": 1.0, "square_root": 0.5, "class_balanced": 0.0}
"""Power of a class's number of clips to which its share of the samples is proportional."""
EVALUATION_STEP = 8
"""Frames between the starts of two evaluation windows (Lu, Liao, Li, ICCV Workshops 2019)."""


class Window(NamedTuple):
    """Frames of a clip from a start on (`WindowForm`), their crop and whether they are mirrored."""

    clip: int
    """Index in the list of clips."""
    start: int
    """First frame."""
    top: int
    """First row of the crop, pixels."""
    left: int
    """First column of the crop, pixels."""
    flip: bool
    region: tuple[int, int] | None = None
    """(width, height) of the region that is scaled to the crop, pixels; None: the region is the crop."""


class View(NamedTuple):
    """Square crop of a window's images."""

    top: int
    left: int
    flip: bool
    """Mirrored after cropping."""


def _epoch_generator(seed: int, epoch: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_EPOCH_ORDER, epoch)))


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, clips: int) -> np.ndarray:
    """Return the order of the clips in an epoch, int64 [clips]."""
    return _epoch_generator(seed, epoch).permutation(clips)


def class_samples(labels: Sequence[int], classes: int, sampling: Sampling) -> np.ndarray:
    """Return the mean number of samples of each class in an epoch, float64 [classes]; their sum is that of the clips.

    Args:
        labels: Label of each training clip, from 0.
        classes: Number of classes. One without clips has 0 samples.
        sampling: `DataConfig.sampling`.
    """
    clips_K = np.bincount(labels, minlength=classes).astype(np.float64)
    shares_K = np.where(clips_K > 0, clips_K ** _SHARE_EXPONENTS[sampling], 0.0)
    samples_K: np.ndarray = shares_K * (len(labels) / shares_K.sum())
    return samples_K


@lru_cache(maxsize=4)
def _resampled_order(seed: int, epoch: int, labels: tuple[int, ...], sampling: Sampling) -> np.ndarray:
    """Return the clips of an epoch in which clips have unequal shares, int64 [clips], some of them repeated.

    Systematic resampling: a clip that is due x times on average occurs x times, rounded down or up. A class occurs
    within one of its mean number of samples.
    """
    random = _epoch_generator(seed, epoch)
    label_N = np.array(labels)
    by_class_N = np.lexsort((random.random(len(label_N)), label_N))  # in random order within a class
    clips_K = np.bincount(label_N)
    due_K = class_samples(labels, len(clips_K), sampling) / np.maximum(clips_K, 1)
    until_N = np.cumsum(due_K[label_N[by_class_N]])
    until_N[-1] = len(label_N)  # without the rounding errors of the sum
    times_N: np.ndarray = np.diff(np.floor(until_N + random.random()).astype(np.int64), prepend=0)
    return random.permutation(np.repeat(by_class_N, times_N))


def training_window(
    clips: list[Clip],
    seed: int,
    sample: int,
    image_size: tuple[int, int],
    crop: int,
    sampling: Sampling = "uniform",
    augment: AugmentConfig = AugmentConfig(),  # noqa: B008 (immutable)
    form: WindowForm = LU_WINDOW,
) -> Window:
    """Return the window of a training sample, numbered from the start of the run. `image_size` is (width, height).

    The order of the random draws must not change: the same seed would give other samples.
    """
    epoch, place = divmod(sample, len(clips))
    if sampling == "uniform":
        order = _permutation(seed, epoch, len(clips))
    else:
        order = _resampled_order(seed, epoch, tuple(clip.label for clip in clips), sampling)
    clip = int(order[place])
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_WINDOW_DRAW, sample)))
    start = int(random.integers(max(clips[clip].frames - form.span, 0) + 1))
    region = _region(seed, sample, image_size, crop, augment)
    width, height = region or (crop, crop)
    top = int(random.integers(image_size[1] - height + 1))
    left = int(random.integers(image_size[0] - width + 1))
    return Window(clip, start, top, left, bool(random.integers(2)), region)


def _region(
    seed: int, sample: int, image_size: tuple[int, int], crop: int, augment: AugmentConfig
) -> tuple[int, int] | None:
    """Return (width, height) of a sample's region, from random numbers of its own; None without scaling."""
    if augment.scale == (1.0, 1.0) and augment.aspect == 1.0:
        return None
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_REGION_DRAW, sample)))
    side = crop * random.uniform(*augment.scale)
    aspect = augment.aspect ** random.uniform(-1, 1)
    sides = (side * aspect**0.5, side / aspect**0.5)
    width, height = (min(max(round(length), 1), most) for length, most in zip(sides, image_size))
    return width, height


def views(image_size: tuple[int, int], crop: int, crops: int = 1, *, flips: bool = False) -> list[View]:
    """Return the crops of each window; the first is the centre crop of the test protocol.

    Args:
        image_size: (width, height) of the images, pixels.
        crop: Side of a crop, pixels.
        crops: 1: the centre; 3: the centre, the left end and the right end.
        flips: Add the mirrored form of each.
    """
    width, height = image_size
    top, lefts = (height - crop) // 2, [(width - crop) // 2, 0, width - crop][:crops]
    return [View(top, left, flip) for flip in ((False, True) if flips else (False,)) for left in lefts]


def centre_window(clip: int, start: int, image_size: tuple[int, int], crop: int) -> Window:
    """Return a window with a crop in the centre of the image; `image_size` is (width, height)."""
    return Window(clip, start, (image_size[1] - crop) // 2, (image_size[0] - crop) // 2, False)


def dense_starts(frames: int, span: int = LU_WINDOW.span) -> list[int]:
    """Return the starts of a clip's evaluation windows of `span` frames: 0, 8, 16, ... and the last possible start."""
    last = max(frames - span, 0)
    starts = list(range(0, last + 1, EVALUATION_STEP))
    return starts if starts[-1] == last else [*starts, last]


def spread_starts(frames: int, count: int, span: int = LU_WINDOW.span) -> list[int]:
    """Return the starts of `count` evenly spaced windows of `span` frames, fewer for short clips.

    For an odd `count`, a window is in the middle of the clip.
    """
    last = max(frames - span, 0)
    return sorted({round(last * (2 * index + 1) / (2 * count)) for index in range(count)})
