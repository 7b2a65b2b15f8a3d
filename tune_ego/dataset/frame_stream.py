"""Session frames of a video of any length, or of a stream that has not ended, one after another in bounded memory.

`video` reads trimmed clips: it looks at a whole file before it decodes the first frame, and refuses a damaged one. Here
a file is read once, and damage is counted, because hours of video should not be lost for one damaged frame.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple

import av
import numpy as np

from tune_ego import storage
from tune_ego.dataset import video
from tune_ego.dataset.foreign_files import HEAD, describe_foreign_file
from tune_ego.dataset.frame_times import SessionClock
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.orientation import Orientation, frame_orientation
from tune_ego.errors import UserError

_RAW_FORMATS = ("h264", "hevc", "m4v", "mpegvideo", "mjpeg")
_REMOTE_BUFFER = 1 << 22
"""Bytes that are read at a time from an object store: each time is a request."""
STDIN = "-"
"""Name of the standard input as a source."""


class SessionFrame(NamedTuple):
    """Frame at a multiple of 1/24 s after the first frame of a video."""

    image: np.ndarray
    """The displayed image: upright, resized, BGR uint8 [H, W, 3]. Session frames may share one."""
    number: int


class FrameStream:
    """Open video. Use it as a context manager, and iterate over `frames` once."""

    def __init__(self, source: str) -> None:
        """Open a path, a URI or `-`, the standard input.

        Raises:
            UserError: The file is absent, is no video, or holds no video stream.
        """
        self.source = source
        self._decoding, self._closed = threading.Lock(), False
        self._file: BinaryIO | Any = _open_file(source)
        try:
            self._container = _open_container(self._file, source)
        except UserError:
            self.close()
            raise
        stream = video.video_stream(self._container)
        # The average rate of raw streams, which have no times, is FFmpeg's default and not theirs.
        raw = stream.duration is None and self._container.format.name in _RAW_FORMATS
        self.rate = float((stream.guessed_rate if raw else stream.average_rate) or stream.guessed_rate or FPS)
        """Frames per second, as the file says."""
        self._timed = not (self._container.format.name == "avi" and stream.codec_context.has_b_frames)
        """False for streams with B-frames in AVI files: their times are those of decoding."""
        self.duration = _duration(self._container, stream)
        """Length in seconds, as the file says; None where it does not say."""
        self.size = (0, 0)
        """(width, height) of the displayed images, pixels; set by the first frame."""
        self.damaged = 0
        """Damaged places so far."""
        self.first_damage = ""
        self.turn = ""
        """Turn of the images in words; empty where they were upright."""
        self._clock = SessionClock(1 / self.rate)

    @property
    def jumps(self) -> int:
        """Number of time stamps so far that were not plausible (`SessionClock`)."""
        return self._clock.jumps

    def frames(self, image_size: tuple[int, int]) -> Iterator[SessionFrame]:
        """Yield all session frames, resized to `image_size` (width, height).

        Raises:
            UserError: The video holds no frame, or its images are turned by an angle that is no multiple of 90 degrees.
        """
        reports: list[str] = []
        image, number, orientation = None, 0, None
        decoded = video.decoded_frames(self._container, reports)
        while (frame := self._next(decoded)) is not None:
            self._count_damage(reports)
            if orientation is None:
                orientation, self.turn = self._orientation(frame)
                self.size = (frame.height, frame.width) if orientation.transposed else (frame.width, frame.height)
            for _ in range(self._clock.add(frame.time if self._timed else None)):
                assert image is not None
                yield SessionFrame(image, number)
                number += 1
            image = video.resize(orientation.apply(video.to_bgr(frame)), image_size)
        self._count_damage(reports)
        if image is None:
            raise UserError(f"{self.source}: {self.first_damage or 'the video holds no frame'}")
        for _ in range(self._clock.end()):
            yield SessionFrame(image, number)
            number += 1

    def _orientation(self, frame: av.VideoFrame) -> tuple[Orientation, str]:
        try:
            return frame_orientation(frame)
        except UserError as error:
            raise UserError(f"{self.source}: {error}") from error

    def _next(self, decoded: Iterator[av.VideoFrame]) -> av.VideoFrame | None:
        """Return the next displayed frame; None after the last one, or after `close` in another thread."""
        with self._decoding:
            return None if self._closed else next(decoded, None)

    def _count_damage(self, reports: list[str]) -> None:
        self.damaged += len(reports)
        self.first_damage = self.first_damage or (reports[0] if reports else "")
        reports.clear()

    def close(self) -> None:
        """Close the video. A thread that iterates over its frames then gets no more."""
        with self._decoding:  # FFmpeg crashes where a file is closed while a frame is decoded
            self._closed = True
        if hasattr(self, "_container"):
            self._container.close()
        if not isinstance(self._file, str) and self.source != STDIN:
            self._file.close()

    def __enter__(self) -> FrameStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _open_file(source: str) -> Any:
    """Return what FFmpeg reads: the path of a local file, else an open file."""
    if source == STDIN:
        # Unbuffered: a buffered read would wait until its whole buffer is full, and so delay a live stream.
        return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)
    uri = storage.absolute(source)
    if not storage.exists(uri):
        raise UserError(f"{source}: there is no such file")
    if storage.is_local(uri):
        return uri
    filesystem, path = storage.resolve(uri)
    return filesystem.open_input_file(path)  # read in pieces: a recording of hours has many gigabytes


def _open_container(file: Any, source: str) -> av.container.InputContainer:
    try:
        container = (
            av.open(file) if isinstance(file, str) or source == STDIN else av.open(file, buffer_size=_REMOTE_BUFFER)
        )
    except (av.error.FFmpegError, OSError, ValueError) as error:
        raise UserError(f"{source}: {_describe(source) or f'cannot be opened as a video ({error})'}") from error
    try:
        # One thread: `DecoderLog` reads the log of this thread.
        video.video_stream(container).codec_context.thread_count = 1
    except UserError as error:
        container.close()
        raise UserError(f"{source}: {error}") from error
    return container


def _duration(container: av.container.InputContainer, stream: av.video.VideoStream) -> float | None:
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return None if container.duration is None else container.duration / av.time_base


def _describe(source: str) -> str:
    """Return what a file is that is no video, in words; empty where it is not known."""
    if source == STDIN:
        return ""
    try:
        foreign = describe_foreign_file(storage.read_bytes(source, HEAD))
    except OSError:
        return ""
    return foreign and f"no video but {foreign}"
