"""Which clip, frames, crop and flip a sample has, and reading it. No Ray and no torch here.

Both are pure functions: of a training set of N clips, sample n is the (n mod N)-th clip of a permutation seeded by
(seed, n div N), and its window, crop and flip are drawn by a generator seeded by (seed, n).

B batch, T time, H, W, C channels.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from tune_ego import storage
from tune_ego.config import WINDOW_FRAMES, Config, DataConfig
from tune_ego.dataset.flow import split_components
from tune_ego.dataset.shards import FRAMES_PER_ROW_GROUP, Clip, Shards, open_shards, stray_rows
from tune_ego.errors import UserError
from tune_ego.feed.cache import ShardCache

_ORDER, _DRAW = 0, 1  # independent random streams of one seed
EVALUATION_STEP = 8
"""Frames between two evaluation windows (Lu)."""


class Window(NamedTuple):
    clip: int
    """Index in the list of clips."""
    start: int
    top: int
    left: int
    flip: bool


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, clips: int) -> np.ndarray:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, epoch))).permutation(clips)


def training_window(clips: list[Clip], seed: int, sample: int, image_size: tuple[int, int], crop: int) -> Window:
    """Sample number `sample` of the run's order; `image_size` is (width, height)."""
    epoch, place = divmod(sample, len(clips))
    clip = int(_permutation(seed, epoch, len(clips))[place])
    random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_DRAW, sample)))
    start = int(random.integers(max(clips[clip].frames - WINDOW_FRAMES, 0) + 1))
    top = int(random.integers(image_size[1] - crop + 1))
    left = int(random.integers(image_size[0] - crop + 1))
    return Window(clip, start, top, left, bool(random.integers(2)))


def centre_window(clip: int, start: int, image_size: tuple[int, int], crop: int) -> Window:
    return Window(clip, start, (image_size[1] - crop) // 2, (image_size[0] - crop) // 2, False)


def dense_starts(frames: int) -> list[int]:
    """Evaluation windows of a clip: at 0, 8, 16, ... and one that ends with it (Lu)."""
    last = max(frames - WINDOW_FRAMES, 0)
    starts = list(range(0, last + 1, EVALUATION_STEP))
    return starts if starts[-1] == last else [*starts, last]


def spread_starts(frames: int, count: int) -> list[int]:
    """`count` evenly spaced windows; one is in the middle. Short clips may have fewer places than that."""
    last = max(frames - WINDOW_FRAMES, 0)
    return sorted({round(last * (2 * index + 1) / (2 * count)) for index in range(count)})


class WindowReader:
    """Reads windows of a list of clips: the frames of the window and little more."""

    def __init__(
        self,
        clips: list[Clip],
        streams: tuple[str, ...],
        image_size: tuple[int, int],
        crop: int,
        cache: ShardCache | None = None,
    ) -> None:
        """`image_size` is (width, height) of the shards' images, `crop` the side of the square taken from them.

        With a `cache`, shards that are not on this machine's disk are copied there.
        """
        self.clips, self.streams, self.image_size, self.crop, self.cache = clips, streams, image_size, crop, cache
        self._columns = [*streams, "gaze_x", "gaze_y", "gaze_valid"]

    def read_batch(self, windows: list[Window | None]) -> dict[str, np.ndarray]:
        """Windows stacked; None is padding, and comes out as zeros.

        `rgb` uint8 [B, T, H, W, 3] and/or `flow` uint8 [B, T, 2, H, W] (x, y), `gaze` float32 [B, T, 2] in crop
        coordinates, `gaze_valid` bool [B, T], `label` and `clip` int64 [B], `present` bool [B]. Raises `UserError`
        for a damaged shard.
        """
        count, side = len(windows), self.crop
        shapes = {"rgb": (side, side, 3), "flow": (2, side, side)}
        batch = {name: np.empty((count, WINDOW_FRAMES, *shapes[name]), np.uint8) for name in self.streams}
        batch["gaze"] = np.zeros((count, WINDOW_FRAMES, 2), np.float32)
        batch["gaze_valid"] = np.zeros((count, WINDOW_FRAMES), bool)
        for place, window in enumerate(windows):
            sample = {name: value[place] for name, value in batch.items()}
            if window is not None:
                self._read_into(sample, window)
                continue
            for name in self.streams:
                sample[name].fill(0)
        indices = [0 if window is None else window.clip for window in windows]
        batch["clip"] = np.array(indices, np.int64)
        batch["label"] = np.array([self.clips[index].label for index in indices], np.int64)
        batch["present"] = np.array([window is not None for window in windows])
        return batch

    def _read_into(self, sample: dict[str, np.ndarray], window: Window) -> None:
        clip = self.clips[window.clip]
        frame = np.minimum(window.start + np.arange(WINDOW_FRAMES), clip.frames - 1)  # short clips repeat the last one
        table, first = self._rows(clip, frame)
        rows = frame - first
        for name in self.streams:
            self._read_images(sample[name], table[name], rows, window, clip)
        gaze = np.stack([table[name].to_numpy()[rows] for name in ("gaze_x", "gaze_y")], axis=-1)
        gaze = (gaze * self.image_size - (window.left, window.top)) / self.crop
        if window.flip:
            gaze[:, 0] = 1 - gaze[:, 0]
        sample["gaze"][:] = gaze
        sample["gaze_valid"][:] = table["gaze_valid"].to_numpy()[rows]

    def _rows(self, clip: Clip, frame: np.ndarray) -> tuple[pa.Table, int]:
        """(the row groups that hold the frames, clip frame of their first row)."""
        groups = range(int(frame[0]) // FRAMES_PER_ROW_GROUP, int(frame[-1]) // FRAMES_PER_ROW_GROUP + 1)
        try:
            file = _open_shard(clip.shard, self.cache, threading.get_ident())
            for group in groups:
                found = stray_rows(file, clip.row_group + group, clip.name, group * FRAMES_PER_ROW_GROUP)
                if found is not None:
                    raise UserError(f"{clip.shard}: {clip.name} should be there, but {found}; run prepare again")
            table = file.read_row_groups([clip.row_group + group for group in groups], self._columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(clip, f"cannot be read ({error})") from error
        return table, groups[0] * FRAMES_PER_ROW_GROUP

    def _read_images(
        self, images: np.ndarray, column: pa.ChunkedArray, rows: np.ndarray, window: Window, clip: Clip
    ) -> None:
        """Decode the rows of an image column, and put each one's crop straight into its place in the batch."""
        is_rgb = images.shape[-1] == 3
        width, height = self.image_size
        # A row of BGR read backwards, byte by byte, is a row of RGB mirrored: that is three times faster than cv2.flip
        # of three channels.
        colours, channels = ("BGR" if window.flip else "RGB", 3) if is_rgb else ("GRAY", 1)
        scratch = np.empty((height, width, 3) if is_rgb else (2 * height, width, 1), np.uint8)
        rows_kept = slice(window.top, window.top + self.crop)
        bytes_kept = slice(channels * window.left, channels * (window.left + self.crop))
        files = _values(column)
        for t, row in enumerate(rows.tolist()):
            if t and row == rows[t - 1]:
                images[t] = images[t - 1]
                continue
            try:
                image = simplejpeg.decode_jpeg(files[row], colours, buffer=scratch)
                if image.shape != scratch.shape:
                    raise ValueError(f"of {image.shape[1]} x {image.shape[0]} pixels")
            except ValueError as error:
                raise self._damaged(clip, f"holds a damaged {'rgb' if is_rgb else 'flow'} image ({error})") from error
            planes = image.reshape(1, height, -1) if is_rgb else split_components(image[..., 0])
            for target, plane in zip(images[t].reshape(len(planes), self.crop, -1), planes):
                _place(target, plane[rows_kept, bytes_kept], window.flip)
            if window.flip and not is_rgb:
                cv2.bitwise_not(images[t, 0], images[t, 0])  # 255 - x: motion to the left becomes motion to the right

    def _damaged(self, clip: Clip, what: str) -> UserError:
        copy = ""
        if self.cache is not None and not storage.is_local(clip.shard):
            copy = f" (or it is its copy in {self.cache.folder}: empty that first)"
        return UserError(f"{clip.shard}: {clip.name} {what}; delete this file and run prepare again{copy}")


def _values(column: pa.ChunkedArray) -> list[np.ndarray]:
    """The bytes of each row of a binary column, uint8, not copied."""
    values = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        everything = np.frombuffer(data, np.uint8)
        places = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        values += [everything[start:end] for start, end in pairwise(places)]
    return values


def _place(target: np.ndarray, image: np.ndarray, flip: bool) -> None:
    if flip:
        cv2.flip(image, 1, target)
    else:
        target[:] = image


@lru_cache(maxsize=256)
def _open_shard(uri: str, cache: ShardCache | None, thread: int) -> pq.ParquetFile:
    """A reader of one shard for one thread: they must not be shared between threads.

    Not all of EGTEA's 741 shards stay open: each holds 0.9 MB (measured), and opening one again takes an eighth of
    the time of reading and decoding a window.
    """
    copy = cache.fetch(uri) if cache is not None and not storage.is_local(uri) else None
    try:
        return _open_file(copy or uri)
    except FileNotFoundError:
        if copy is None:
            raise
        return _open_file(uri)  # another process has removed the copy, to make room


def _open_file(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.resolve(uri)
    # Ahead-reading by threads pays where each read is a request over the network, and costs where it is a copy.
    ahead = not storage.is_local(uri)
    return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=ahead, page_checksum_verification=True)


def close_shards() -> None:
    """Forget the readers of this process."""
    _open_shard.cache_clear()


def check_fits(shards: Shards, config: Config) -> None:
    """Raise `UserError` where a configuration asks for more than the data set has."""
    if config.data.crop > min(shards.image_size):
        width, height = shards.image_size
        raise UserError(f"data.crop = {config.data.crop} does not fit into the shards' {width} x {height} images")
    shards.train(config.data)
    shards.validation(config.data)


@dataclass(frozen=True)
class FeedPlan:
    """What one worker reads during a run: a sequence of items, each one forward pass of training or validation.

    An iteration is cut into `passes`, and worker r of n takes those numbered r, r + n, ...: they are its training
    items. After every `validate_every`-th iteration and after the last come the validation items. Items are numbered
    from the run's start, so a resumed run begins at an item.
    """

    root: str
    data: DataConfig
    streams: tuple[str, ...]
    seed: int
    iterations: int
    micro_batch: int
    passes: int
    validate_every: int
    validation_windows: int
    workers: int = 1
    rank: int = 0

    @classmethod
    def of(cls, root: str, config: Config, workers: int, rank: int) -> FeedPlan:
        train = config.train
        return cls(
            *(root, config.data, config.stream_names, config.seed, train.iterations, config.micro_batch),
            *(config.passes, train.validate_every, train.validation_windows, workers, rank),
        )

    @property
    def own_passes(self) -> range:
        """The passes of an iteration that this worker takes."""
        return range(self.rank, self.passes, self.workers)

    def validates_after(self, iterations: int) -> bool:
        """Whether a validation follows when `iterations` are done."""
        return iterations % self.validate_every == 0 or iterations == self.iterations

    @property
    def validations(self) -> list[int]:
        """The iterations after which a validation follows."""
        return [done for done in range(1, self.iterations + 1) if self.validates_after(done)]

    @property
    def validation_items(self) -> int:
        """Items of one validation; the same for every worker."""
        return -(-len(_sources(self).validation_windows) // (self.workers * self.micro_batch))

    def first_item(self, iterations: int) -> int:
        """The item that follows when `iterations` are done and validated."""
        return iterations * len(self.own_passes) + iterations // self.validate_every * self.validation_items

    @property
    def items(self) -> int:
        extra = 0 if self.iterations % self.validate_every == 0 else self.validation_items
        return self.first_item(self.iterations) + extra

    def windows(self, item: int) -> tuple[bool, list[Window | None]]:
        """(is it training, this worker's windows) of an item."""
        passes = self.own_passes
        cycle = self.validate_every * len(passes) + self.validation_items
        rounds, place = divmod(item, cycle)
        training_items = min(self.validate_every, self.iterations - rounds * self.validate_every) * len(passes)
        sources = _sources(self)
        if place < training_items:
            iteration, turn = divmod(place, len(passes))
            iteration += rounds * self.validate_every
            first = (iteration * self.passes + passes[turn]) * self.micro_batch
            samples = range(first, first + self.micro_batch)
            size = sources.image_size
            return True, [training_window(sources.train.clips, self.seed, n, size, self.data.crop) for n in samples]
        first = ((place - training_items) * self.workers + self.rank) * self.micro_batch
        chosen = sources.validation_windows[first : first + self.micro_batch]
        return False, [*chosen, *[None] * (self.micro_batch - len(chosen))]

    @property
    def validation_labels(self) -> list[int]:
        return [clip.label for clip in _sources(self).validation.clips]

    def read(self, item: int) -> dict[str, np.ndarray]:
        training, windows = self.windows(item)
        sources = _sources(self)
        if not any(windows):  # another worker's clips only: read one, and count it out
            batch = sources.validation.read_batch([sources.validation_windows[0]] * self.micro_batch)
            return {**batch, "present": np.zeros(self.micro_batch, bool)}
        return (sources.train if training else sources.validation).read_batch(windows)


class _Sources(NamedTuple):
    train: WindowReader
    validation: WindowReader
    validation_windows: list[Window]
    image_size: tuple[int, int]


@lru_cache(maxsize=4)
def _sources(plan: FeedPlan) -> _Sources:
    shards = open_shards(plan.root)
    size = shards.image_size
    train, validation = (
        WindowReader(clips, plan.streams, size, plan.data.crop, ShardCache.of(plan.data))
        for clips in (shards.train(plan.data), shards.validation(plan.data))
    )
    windows = [
        centre_window(index, start, size, plan.data.crop)
        for index, clip in enumerate(validation.clips)
        for start in spread_starts(clip.frames, plan.validation_windows)
    ]
    return _Sources(train, validation, windows, size)


def read_items(plan: FeedPlan, items: Any) -> Any:
    """The batches of a range of items, one after another, in this process."""
    cv2.setNumThreads(1)
    return (plan.read(int(item)) for item in items)
