"""Read windows of clips from shards: JPEG images, gaze and labels. No Ray and no torch here.

B batch, T time, H, W, C channels.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from tune_ego import storage
from tune_ego.config import WINDOW_FRAMES, Config
from tune_ego.dataset.flow import split_components
from tune_ego.dataset.shards import FRAMES_PER_ROW_GROUP, Clip, Shards, stray_rows
from tune_ego.errors import UserError
from tune_ego.feed.augmentation import crop_gaze, mirrored_flow_x, place_image
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.sampling import Window


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
        batch |= self._about(windows)
        for place, window in enumerate(windows):
            sample = {name: value[place] for name, value in batch.items()}
            if window is None:
                for name in self.streams:
                    sample[name].fill(0)
                continue
            table, rows = self._frames(window)
            self._gaze_into(sample, table, rows, window)
            for name in self.streams:
                self._read_images(sample[name], table[name], rows, window, self.clips[window.clip])
        return batch

    def read_encoded(self, windows: list[Window | None]) -> dict[str, np.ndarray]:
        """As `read_batch`, with the images as they are in the shards; `feed.decoding` makes the same of them.

        Instead of `rgb`, `rgb_jpeg` uint8, the JPEG files one after another, and `rgb_bytes` int64 [B, T], their sizes,
        0 in padding; `flow` likewise; `place` int64 [B, 4]: top, left and side of the crop, and 1 where mirrored.
        """
        batch = self._about(windows)
        files: dict[str, list[np.ndarray]] = {name: [] for name in self.streams}
        for place, window in enumerate(windows):
            if window is None:
                for found in files.values():
                    found += [np.empty(0, np.uint8)] * WINDOW_FRAMES
                continue
            table, rows = self._frames(window)
            self._gaze_into({name: value[place] for name, value in batch.items()}, table, rows, window)
            for name, found in files.items():
                values = _values(table[name])
                for row in rows.tolist():
                    self._check_header(values[row], name, self.clips[window.clip])
                    found.append(values[row])
        for name, found in files.items():
            batch[f"{name}_jpeg"] = np.concatenate(found)
            batch[f"{name}_bytes"] = np.array([len(file) for file in found], np.int64).reshape(-1, WINDOW_FRAMES)
        places = [(0, 0, False) if window is None else (window.top, window.left, window.flip) for window in windows]
        batch["place"] = np.array([(top, left, self.crop, flip) for top, left, flip in places], np.int64)
        return batch

    def _about(self, windows: list[Window | None]) -> dict[str, np.ndarray]:
        """What a batch says of its windows, without gaze yet."""
        count, indices = len(windows), [0 if window is None else window.clip for window in windows]
        return {
            "gaze": np.zeros((count, WINDOW_FRAMES, 2), np.float32),
            "gaze_valid": np.zeros((count, WINDOW_FRAMES), bool),
            "clip": np.array(indices, np.int64),
            "label": np.array([self.clips[index].label for index in indices], np.int64),
            "present": np.array([window is not None for window in windows]),
        }

    def _frames(self, window: Window) -> tuple[pa.Table, np.ndarray]:
        """(the row groups that hold a window, the rows of its frames)."""
        clip = self.clips[window.clip]
        frame = np.minimum(window.start + np.arange(WINDOW_FRAMES), clip.frames - 1)  # short clips repeat the last one
        table, first = self._rows(clip, frame)
        return table, frame - first

    def _gaze_into(self, sample: dict[str, np.ndarray], table: pa.Table, rows: np.ndarray, window: Window) -> None:
        gaze = np.stack([table[name].to_numpy()[rows] for name in ("gaze_x", "gaze_y")], axis=-1)
        sample["gaze"][:] = crop_gaze(gaze, self.image_size, window, self.crop)
        sample["gaze_valid"][:] = table["gaze_valid"].to_numpy()[rows]

    def _check_header(self, file: np.ndarray, name: str, clip: Clip) -> None:
        width, height = self.image_size
        try:
            found = simplejpeg.decode_jpeg_header(file)[:2]
            if found != (height if name == "rgb" else 2 * height, width):
                raise ValueError(f"of {found[1]} x {found[0]} pixels")
        except ValueError as error:
            raise self._damaged(clip, f"holds a damaged {name} image ({error})") from error

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
                place_image(target, plane[rows_kept, bytes_kept], window.flip)
            if window.flip and not is_rgb:
                images[t, 0] = mirrored_flow_x(images[t, 0])

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
