"""`VIDEO.overlay.mp4`: the video with the detected action as a caption, and the attention beside it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from itertools import chain
from typing import TYPE_CHECKING

import av
import cv2
import numpy as np

from tune_ego import storage
from tune_ego.console import progress, say
from tune_ego.dataset.frame_stream import FrameStream
from tune_ego.dataset.gaze import FPS
from tune_ego.prediction.page import overlay_crop
from tune_ego.prediction.predict import Segments
from tune_ego.prediction.scoring import WindowScores
from tune_ego.prediction.segments import Segment
from tune_ego.prediction.window_file import WINDOWS, read_windows

if TYPE_CHECKING:
    from tune_ego.prediction.trained_model import TrainedModel

OVERLAY = ".overlay.mp4"
_HEIGHT, _CAPTION = 240, 28
"""Height of a picture and of the caption, pixels."""


def write_overlay(model: TrainedModel, video: str, name: str, segments: Segments) -> None:
    """Write the video. It is decoded once more; the attention is that of `NAME.windows.parquet`."""
    span = model.config.data.window.span
    windows = _nearest_windows(read_windows(name + WINDOWS), segments.frames, span)
    with tempfile.NamedTemporaryFile(prefix="tune-ego-", suffix=".mp4") as file:
        _write_video(file.name, model, video, windows, segments)
        storage.write_file(name + OVERLAY, file.name)
    say(f"  {name}{OVERLAY}")


def _write_video(
    file: str, model: TrainedModel, video: str, windows: Iterator[WindowScores], segments: Segments
) -> None:
    width = round(_HEIGHT * model.image_size[0] / model.image_size[1] / 2) * 2
    with (
        FrameStream(video) as stream,
        av.open(file, "w", format="mp4") as container,
        progress("frames", segments.frames) as advance,
    ):
        track = container.add_stream("libx264", rate=FPS, options={"crf": "23", "preset": "veryfast"})
        track.pix_fmt = "yuv420p"
        for frame, window in zip(stream.frames((width, _HEIGHT)), windows):
            image = _draw(cv2.cvtColor(frame.image, cv2.COLOR_BGR2RGB), frame.number, window, model, segments)
            if not track.codec_context.is_open:
                track.height, track.width = image.shape[:2]
            container.mux(track.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            advance(1)
        container.mux(track.encode(None))


def _nearest_windows(windows: Iterator[WindowScores], frames: int, span: int) -> Iterator[WindowScores]:
    """Yield for each frame the window whose middle is nearest to it."""
    current = next(windows)
    following = next(windows, None)
    for frame in range(frames):
        while following is not None and abs(_middle(following, span) - frame) < abs(_middle(current, span) - frame):
            current, following = following, next(windows, None)
        yield current


def _middle(window: WindowScores, span: int) -> float:
    return window.start + (span - 1) / 2


def _draw(image: np.ndarray, frame: int, window: WindowScores, model: TrainedModel, segments: Segments) -> np.ndarray:
    """Draw a frame and each stream's attention side by side, the caption below, RGB uint8 with even sides."""
    span = model.config.data.window.span
    place = min(max(frame - window.start, 0), span - 1)
    pictures = [image] + [
        overlay_crop(image, map_THW[place * len(map_THW) // span], model.image_size, model.config.data.crop)
        for map_THW in window.attention.values()
    ]
    body = np.concatenate(pictures, axis=1)
    caption = np.full((_CAPTION, body.shape[1], 3), 24, np.uint8)
    now = [segment for segment in segments if segment.start * FPS <= frame < segment.end * FPS]
    text = " / ".join(chain([f"{frame / FPS:7.1f} s"], (_caption(segment) for segment in now)))
    cv2.putText(caption, text, (6, 19), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (240, 240, 240), 1, cv2.LINE_AA)
    return np.concatenate([body, caption])


def _caption(segment: Segment) -> str:
    return f"{segment.action} ({100 * segment.score:.0f})"
