"""Reading of windows of clips from shards: images, gaze and labels. No Ray and no torch here.

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
from tune_ego.config import LU_WINDOW, Config, WindowForm
from tune_ego.dataset.flow import split_components
from tune_ego.dataset.shards import FRAMES_PER_ROW_GROUP, Clip, Shards, describe_stray_rows
from tune_ego.errors import UserError
from tune_ego.feed.augmentation import crop_gaze, crop_shape, mirrored_flow_x, place_image, place_region, scaled_flow
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.sampling import Window


class WindowReader:
    """Reader of windows of a list of clips. Of each clip only the row groups that hold the window are read."""

    def __init__(
        self,
        clips: list[Clip],
        streams: tuple[str, ...],
        image_size: tuple[int, int],
        crop: int,
        cache: ShardCache | None = None,
        form: WindowForm = LU_WINDOW,
    ) -> None:
        """Create a reader.

        Args:
            clips: Clips to which the windows refer by index.
            streams: `rgb`, `flow` or both.
            image_size: (width, height) of the images in the shards, pixels.
            crop: Side of the square crop, pixels.
            cache: Cache for shards that are not on this machine's disk.
            form: Frames that a window holds.
        """
        self.clips, self.streams, self.image_size, self.crop, self.cache = clips, streams, image_size, crop, cache
        self.form = form
        self._columns = [*streams, "gaze_x", "gaze_y", "gaze_valid"]

    def read_batch(self, windows: list[Window | None]) -> dict[str, np.ndarray]:
        """Read a batch of windows. None is padding and gives zeros.

        Returns:
            `rgb` uint8 [B, T, H, W, 3] and/or `flow` uint8 [B, T, 2, H, W] (x, y), `gaze` float32 [B, T, 2] in crop
            coordinates, `gaze_valid` bool [B, T], `label` and `clip` int64 [B], `present` bool [B].

        Raises:
            UserError: A shard is damaged.
        """
        images = {
            name: np.empty((len(windows), self.form.frames, *crop_shape(name, self.crop)), np.uint8)
            for name in self.streams
        }
        batch = images | self._labels_and_empty_gaze(windows)
        for place, window in enumerate(windows):
            sample = {name: value[place] for name, value in batch.items()}  # views into the batch
            if window is None:
                for name in self.streams:
                    sample[name].fill(0)
                continue
            table, rows_T = self._read_window(window)
            self._fill_gaze(sample, table, rows_T, window)
            for name in self.streams:
                self._fill_images(sample[name], table[name], rows_T, window)
        return batch

    def read_encoded(self, windows: list[Window | None]) -> dict[str, np.ndarray]:
        """Read a batch with its JPEG images undecoded, for decoding on the GPU (`feed.decoding`).

        Returns:
            The arrays of `read_batch` except `rgb` and `flow`. In place of `rgb`: `rgb_jpeg` uint8 [bytes], all JPEG
            files one after another, and `rgb_bytes` int64 [B, T], their sizes, 0 in padding. `flow` likewise. `place`
            int64 [B, 6]: top, left, width and height of the region, side of the crop, 1 where the window is mirrored.

        Raises:
            UserError: A shard is damaged, or the header of an image is.
        """
        batch = self._labels_and_empty_gaze(windows)
        files: dict[str, list[np.ndarray]] = {name: [] for name in self.streams}
        for place, window in enumerate(windows):
            if window is None:
                for stream_files in files.values():
                    stream_files += [np.empty(0, np.uint8)] * self.form.frames
                continue
            table, rows_T = self._read_window(window)
            sample = {name: value[place] for name, value in batch.items()}  # views into the batch
            self._fill_gaze(sample, table, rows_T, window)
            for name, stream_files in files.items():
                values = _column_bytes(table[name])
                for row in rows_T.tolist():
                    self._check_header(values[row], name, self.clips[window.clip])
                    stream_files.append(values[row])
        for name, stream_files in files.items():
            sizes = [len(file) for file in stream_files]
            batch[f"{name}_jpeg"] = np.concatenate(stream_files)
            batch[f"{name}_bytes"] = np.array(sizes, np.int64).reshape(-1, self.form.frames)
        batch["place"] = np.array([self._place(window) for window in windows], np.int64)
        return batch

    def _place(self, window: Window | None) -> tuple[int, int, int, int, int, bool]:
        """Return an entry of `place` in `read_encoded`."""
        if window is None:
            return (0, 0, self.crop, self.crop, self.crop, False)
        width, height = window.region or (self.crop, self.crop)
        return (window.top, window.left, width, height, self.crop, window.flip)

    def _labels_and_empty_gaze(self, windows: list[Window | None]) -> dict[str, np.ndarray]:
        """Return the arrays of a batch without images. Gaze is still 0 and not valid."""
        count = len(windows)
        indices = [0 if window is None else window.clip for window in windows]
        return {
            "gaze": np.zeros((count, self.form.frames, 2), np.float32),
            "gaze_valid": np.zeros((count, self.form.frames), bool),
            "clip": np.array(indices, np.int64),
            "label": np.array([self.clips[index].label for index in indices], np.int64),
            "present": np.array([window is not None for window in windows]),
        }

    def _read_window(self, window: Window) -> tuple[pa.Table, np.ndarray]:
        """Return (the row groups that hold a window, the rows [T] of its frames in them)."""
        clip = self.clips[window.clip]
        offset_T = self.form.step * np.arange(self.form.frames)
        frame_T = np.minimum(window.start + offset_T, clip.frames - 1)  # short clips repeat the last
        table, first_frame = self._read_row_groups(clip, frame_T)
        return table, frame_T - first_frame

    def _read_row_groups(self, clip: Clip, frame_T: np.ndarray) -> tuple[pa.Table, int]:
        """Return (the row groups that hold the frames, the clip frame of their first row)."""
        groups = range(int(frame_T[0]) // FRAMES_PER_ROW_GROUP, int(frame_T[-1]) // FRAMES_PER_ROW_GROUP + 1)
        try:
            file = _open_shard(clip.shard, self.cache, threading.get_ident())
            for group in groups:
                stray = describe_stray_rows(file, clip.row_group + group, clip.name, group * FRAMES_PER_ROW_GROUP)
                if stray is not None:
                    raise UserError(f"{clip.shard}: {clip.name} should be there, but {stray}; run prepare again")
            table = file.read_row_groups([clip.row_group + group for group in groups], self._columns, use_threads=False)
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(clip, f"cannot be read ({error})") from error
        return table, groups[0] * FRAMES_PER_ROW_GROUP

    def _fill_gaze(self, sample: dict[str, np.ndarray], table: pa.Table, rows_T: np.ndarray, window: Window) -> None:
        """Write the gaze of a window into `gaze` [T, 2] and `gaze_valid` [T] of a sample."""
        gaze_T2 = np.stack([table[name].to_numpy()[rows_T] for name in ("gaze_x", "gaze_y")], axis=-1)
        sample["gaze"][:] = crop_gaze(gaze_T2, self.image_size, window, self.crop)
        sample["gaze_valid"][:] = table["gaze_valid"].to_numpy()[rows_T]

    def _fill_images(self, images: np.ndarray, column: pa.ChunkedArray, rows_T: np.ndarray, window: Window) -> None:
        """Decode the images of a window, and write their crops into a sample of the batch.

        `images` is uint8 [T, side, side, 3] (RGB) or [T, 2, side, side] (flow).
        """
        is_rgb = images.shape[-1] == 3
        width, height = self.image_size
        # A row of BGR pixels, reversed byte by byte, is the mirrored row of RGB pixels. `place_image` therefore mirrors
        # single bytes, which is three times faster than cv2.flip of three channels.
        mirrors_bytes = window.flip and window.region is None
        colours, channels = ("BGR" if mirrors_bytes else "RGB", 3) if is_rgb else ("GRAY", 1)
        buffer = np.empty((height, width, 3) if is_rgb else (2 * height, width, 1), np.uint8)
        crop_rows = slice(window.top, window.top + self.crop)
        crop_bytes = slice(channels * window.left, channels * (window.left + self.crop))
        files = _column_bytes(column)
        for t, row in enumerate(rows_T.tolist()):
            if t and row == rows_T[t - 1]:  # the repeated last frame of a short clip
                images[t] = images[t - 1]
                continue
            image = self._decode(files[row], colours, buffer, self.clips[window.clip])
            if window.region is not None:
                self._fill_region(images[t], image, window.region, window)
                continue
            # One plane [1, H, 3 W] with the colours side by side, or two planes [2, H, W] of flow.
            planes = image.reshape(1, height, -1) if is_rgb else split_components(image[..., 0])
            targets = images[t].reshape(len(planes), self.crop, -1)  # [1, side, 3 side] or [2, side, side], a view
            for target, plane in zip(targets, planes):
                place_image(target, plane[crop_rows, crop_bytes], window.flip)
            if window.flip and not is_rgb:
                images[t, 0] = mirrored_flow_x(images[t, 0])

    def _fill_region(self, target: np.ndarray, image: np.ndarray, region: tuple[int, int], window: Window) -> None:
        """Scale a region of an image to the crop: `target` is [side, side, 3] (RGB) or [2, side, side] (flow)."""
        width, height = region
        rows, columns = slice(window.top, window.top + height), slice(window.left, window.left + width)
        if target.shape[-1] == 3:
            place_region(target, image[rows, columns], window.flip)
            return
        for component, plane, length in zip(target, split_components(image[..., 0]), region):
            place_region(component, plane[rows, columns], window.flip)
            component[:] = np.rint(scaled_flow(component.astype(np.float32), self.crop / length))
        if window.flip:
            target[0] = mirrored_flow_x(target[0])

    def _decode(self, file: np.ndarray, colours: str, buffer: np.ndarray, clip: Clip) -> np.ndarray:
        """Decode a JPEG file into a buffer of the expected shape, [H, W, 3] or [2H, W, 1]."""
        try:
            image = simplejpeg.decode_jpeg(file, colours, buffer=buffer)
            if image.shape != buffer.shape:
                raise ValueError(f"of {image.shape[1]} x {image.shape[0]} pixels")
        except ValueError as error:
            name = "flow" if colours == "GRAY" else "rgb"
            raise self._damaged(clip, f"holds a damaged {name} image ({error})") from error
        return image

    def _check_header(self, file: np.ndarray, stream: str, clip: Clip) -> None:
        """Raise `UserError` where the header of a JPEG file is damaged or names another size."""
        width, height = self.image_size
        try:
            image_height, image_width = simplejpeg.decode_jpeg_header(file)[:2]
            if (image_height, image_width) != (_stored_height(stream, height), width):
                raise ValueError(f"of {image_width} x {image_height} pixels")
        except ValueError as error:
            raise self._damaged(clip, f"holds a damaged {stream} image ({error})") from error

    def _damaged(self, clip: Clip, fault: str) -> UserError:
        """Return the error for a damaged shard, with the remedy."""
        copy = ""
        if self.cache is not None and not storage.is_local(clip.shard):
            copy = f" (the damage may be in its copy in {self.cache.folder}: empty that folder first)"
        return UserError(f"{clip.shard}: {clip.name} {fault}; delete this file and run prepare again{copy}")


def _stored_height(stream: str, height: int) -> int:
    """Return the height of a stream's images in the shards. Flow has its y component below its x component."""
    match stream:
        case "rgb":
            return height
        case "flow":
            return 2 * height
        case _:
            raise ValueError(f"no stream {stream!r}")


def _column_bytes(column: pa.ChunkedArray) -> list[np.ndarray]:
    """Return the bytes of each row of a binary column, uint8 [bytes]: views, not copies."""
    values = []
    for chunk in column.chunks:
        _, offsets, data = chunk.buffers()
        chunk_bytes = np.frombuffer(data, np.uint8)
        ends = np.frombuffer(offsets, np.int32)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        values += [chunk_bytes[start:end] for start, end in pairwise(ends)]
    return values


@lru_cache(maxsize=256)
def _open_shard(uri: str, cache: ShardCache | None, thread: int) -> pq.ParquetFile:
    """Open a shard for one thread, cached: a `ParquetFile` must not be shared between threads.

    Not all of EGTEA's 741 shards stay open. An open shard takes 0.9 MB (measured), and opening it again takes an eighth
    of the time of reading and decoding a window.
    """
    copy = cache.fetch(uri) if cache is not None and not storage.is_local(uri) else None
    try:
        return _open_file(copy or uri)
    except FileNotFoundError:
        if copy is None:
            raise
        return _open_file(uri)  # another process has removed the copy to make room


def _open_file(uri: str) -> pq.ParquetFile:
    filesystem, path = storage.resolve(uri)
    # Reading ahead with threads pays off for requests over the network, and only costs time for local files.
    read_ahead = not storage.is_local(uri)
    return pq.ParquetFile(filesystem.open_input_file(path), pre_buffer=read_ahead, page_checksum_verification=True)


def close_shards() -> None:
    """Drop the open shards that this process has cached."""
    _open_shard.cache_clear()


def check_fits(shards: Shards, config: Config) -> None:
    """Raise `UserError` where the shards' images are smaller than `data.crop`, or the folds hold no clips."""
    if config.data.crop > min(shards.image_size):
        width, height = shards.image_size
        raise UserError(f"data.crop = {config.data.crop} does not fit into the shards' {width} x {height} images")
    shards.train(config.data)
    shards.validation(config.data)
