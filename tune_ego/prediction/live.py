"""`predict -` and `predict --camera`: a line of JSON for each window of a stream that has no end, as it comes.

A thread reads the stream. The model scores the latest complete window. Windows that came while it was busy are skipped
and counted, so a slow machine does not fall behind.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from tune_ego.config import LU_WINDOW
from tune_ego.dataset.frame_stream import STDIN, FrameStream
from tune_ego.dataset.frame_times import SessionClock
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.video import resize
from tune_ego.errors import UserError
from tune_ego.feed.sampling import views
from tune_ego.prediction.predict import PredictionSettings, model_flow
from tune_ego.prediction.scoring import score_windows
from tune_ego.prediction.segments import top_classes
from tune_ego.prediction.windows import video_windows

if TYPE_CHECKING:
    from tune_ego.prediction.trained_model import TrainedModel


class Arrived(NamedTuple):
    """Window of a stream, not yet with flow."""

    start: int
    """First session frame."""
    images: list[np.ndarray]
    """BGR uint8 [H, W, 3]: the window's frames, and the next one where there is one, for the flow of the last."""
    number: int
    """Number of the window in the stream, from 0."""
    moment: float
    """Monotonic clock when its last frame arrived, seconds."""


class LatestWindow:
    """The latest complete window of a stream, which a thread reads. The thread does nothing else, to keep up."""

    def __init__(
        self,
        images: Iterable[np.ndarray],
        stride: int,
        span: int = LU_WINDOW.span,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the thread.

        Args:
            images: Session frames, BGR uint8 [H, W, 3].
            stride: Frames between the starts of two windows.
            span: Frames from the first to the last one of a window.
            now: Clock, seconds.
        """
        self._span = span
        self._changed = threading.Condition()
        self._latest: Arrived | None = None
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._now = now
        self._thread = threading.Thread(target=self._read, args=(images, stride), daemon=True)
        self._thread.start()

    def _read(self, images: Iterable[np.ndarray], stride: int) -> None:
        recent: deque[tuple[np.ndarray, float]] = deque(maxlen=self._span + 1)
        count = end = number = 0  # frames so far, frames up to the end of the last window, windows so far
        try:
            for image in images:
                if self._stopped:
                    return
                recent.append((image, self._now()))
                count += 1
                start = count - len(recent)
                if len(recent) > self._span and start % stride == 0:
                    self._give(Arrived(start, [image for image, _ in recent], number, recent[-2][1]))
                    number, end = number + 1, start + self._span
            if count > end:
                last = list(recent)[-self._span :]
                self._give(Arrived(count - len(last), [image for image, _ in last], number, last[-1][1]))
        except BaseException as error:  # raised again by `take`
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify()

    def _give(self, arrived: Arrived) -> None:
        with self._changed:
            self._latest = arrived
            self._changed.notify()

    def take(self) -> Arrived | None:
        """Wait for a window that has not been taken yet; None when the stream has ended. Raises the stream's errors."""
        with self._changed:
            self._changed.wait_for(lambda: self._latest is not None or self._ended)
            arrived, self._latest = self._latest, None
        if arrived is None and self._error is not None:
            raise self._error
        return arrived

    def stop(self) -> None:
        """End the thread, within a second if the stream blocks."""
        self._stopped = True
        self._thread.join(1)


def predict_live(
    model: TrainedModel, source: str | int, settings: PredictionSettings, write: Callable[[str], None]
) -> None:
    """Score a stream until it ends, and pass a line of JSON for each scored window to `write`.

    Keys: `start` and `end` in seconds of the stream, `action`, `score`, `top` (the five best classes), `delay` (seconds
    from the arrival of the window's last frame to its scores), `skipped` (windows since the line before that were not
    scored).

    Args:
        model: Trained model.
        source: `-`, the standard input, or the number of a camera.
        settings: Windows and crops.
        write: Function that is called with each line.

    Raises:
        UserError: The stream is no video, there is no such camera, or a setting is out of range.
    """
    settings.check()
    method = model_flow(model, settings.flow_weights)._replace(batch=1)  # more would wait for further frames
    images = _camera_images(source, model.image_size) if isinstance(source, int) else _stdin_images(model.image_size)
    chosen = views(model.image_size, model.config.data.crop, settings.windows.crops, flips=settings.windows.flips)
    form = model.config.data.window
    latest = LatestWindow(images, settings.windows.stride, form.span)
    next_number = 0
    try:
        while (arrived := latest.take()) is not None:
            window = next(video_windows(arrived.images, method, 1, form))._replace(start=arrived.start)
            (scored,) = score_windows(model, [window], chosen)
            best = top_classes(scored.main, model.classes)
            top = [{"action": action, "score": round(score, 4)} for action, score in best]
            line: dict[str, Any] = {
                "start": round(scored.start / FPS, 3),
                "end": round((scored.start + form.span) / FPS, 3),
                **top[0],
                "top": top,
                "delay": round(time.monotonic() - arrived.moment, 3),
                "skipped": arrived.number - next_number,
            }
            next_number = arrived.number + 1
            write(json.dumps(line))
    finally:
        latest.stop()


def _stdin_images(image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    with FrameStream(STDIN) as stream:
        yield from (frame.image for frame in stream.frames(image_size))


def _camera_images(number: int, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """Yield the images of a camera, placed on the clock of 24 frames a second by the moments at which they arrive."""
    camera = cv2.VideoCapture(number)
    if not camera.isOpened():
        raise UserError(f"--camera {number}: there is no such camera")
    clock, image, start = SessionClock(1 / FPS), None, time.monotonic()
    try:
        while True:
            was_read, picture = camera.read()
            if not was_read:
                return
            for _ in range(clock.add(time.monotonic() - start)):
                assert image is not None
                yield image
            image = resize(picture, image_size)
    finally:
        camera.release()
