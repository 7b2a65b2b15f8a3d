"""`predict`: from a trained model and a video to detected actions, in files beside each other.

F session frames, W windows, K classes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from tune_ego.console import progress
from tune_ego.dataset.flow import FlowMethod, flow_method
from tune_ego.dataset.frame_stream import FrameStream, SessionFrame
from tune_ego.dataset.gaze import FPS
from tune_ego.errors import UserError
from tune_ego.feed.sampling import EVALUATION_STEP, views
from tune_ego.prediction.scoring import WindowScores, score_windows
from tune_ego.prediction.segments import Segment, SegmentSettings, detect_segments, frame_scores
from tune_ego.prediction.windows import video_windows

if TYPE_CHECKING:
    from tune_ego.prediction.trained_model import TrainedModel


class WindowSettings(NamedTuple):
    """Windows of a video and their crops."""

    stride: int = EVALUATION_STEP
    """Session frames (1/24 s) between the starts of two windows, 1 to 16."""
    crops: int = 1
    """1: the centre crop; 3: centre, left end, right end."""
    flips: bool = False
    """Add the mirrored form of each crop."""

    def check(self) -> None:
        """Raise `UserError` for a value out of range."""
        if not 1 <= self.stride <= 16:
            raise UserError(f"--stride {self.stride}: goes from 1 to 16 frames; larger ones would skip frames")
        if self.crops not in (1, 3):
            raise UserError(f"--crops {self.crops}: 1 or 3")


class PredictionSettings(NamedTuple):
    """All settings of a prediction."""

    windows: WindowSettings = WindowSettings()
    detection: SegmentSettings = SegmentSettings()
    flow_weights: str | None = None
    """Path or URI of RAFT's weights, for models that were trained with RAFT's flow."""

    def check(self) -> None:
        """Raise `UserError` for a value out of range."""
        self.windows.check()
        self.detection.check()


class Segments(list[Segment]):
    """Detected actions of a video, by start."""

    def __init__(self, segments: list[Segment], frames: int, scores_FK: np.ndarray, remarks: list[str]) -> None:
        super().__init__(segments)
        self.frames = frames
        """Session frames of the video: its length in seconds times 24."""
        self.scores_FK = scores_FK
        """Class scores of each session frame, float32: the mean over the windows that hold it."""
        self.remarks = remarks
        """Irregularities of the video, in words."""

    def to_arrow(self) -> pa.Table:
        """Return a table: `start` and `end` in seconds, `action`, `score`, and `top`, a list of (action, score)."""
        top = [[{"action": action, "score": score} for action, score in segment.top] for segment in self]
        columns = {name: [getattr(segment, name) for segment in self] for name in ("start", "end", "action", "score")}
        return pa.table({**columns, "top": top}, schema=_SCHEMA)


_TOP = pa.list_(pa.struct([("action", pa.string()), ("score", pa.float64())]))
_SCHEMA = pa.schema(
    [("start", pa.float64()), ("end", pa.float64()), ("action", pa.string()), ("score", pa.float64()), ("top", _TOP)]
)


def _still(images: Sequence[np.ndarray]) -> np.ndarray:
    return np.zeros((len(images) - 1, *images[0].shape[:2], 2), np.float32)


_NO_FLOW = FlowMethod(lambda frame: frame, _still, 1)
"""Flow of models without a flow stream: zero."""


def model_flow(model: TrainedModel, flow_weights: str | None) -> FlowMethod:
    """Return the optical-flow method that a model was trained with; one without motion if it has no flow stream.

    Raises:
        UserError: It is RAFT and its weights are not given, or they are given and it is another method.
    """
    if "flow" not in model.streams:
        if flow_weights is not None:
            raise UserError("--flow-weights is for RAFT; the model has no flow stream")
        return _NO_FLOW
    if model.flow_method == "raft" and flow_weights is None:
        raise UserError("the model was trained with RAFT's flow: give RAFT's weights with --flow-weights FILE")
    if model.flow_method != "raft" and flow_weights is not None:
        raise UserError(f"--flow-weights is for RAFT; the model was trained with {model.flow_method} flow")
    return flow_method(model.flow_method, flow_weights)


def predict_video(
    model: TrainedModel,
    source: str,
    settings: PredictionSettings,
    *,
    on_window: Callable[[WindowScores], None] | None = None,
    show_progress: bool = False,
) -> Segments:
    """Detect the actions of a video. Memory does not grow with its length, except for the class scores of each frame.

    Args:
        model: Trained model; it computes where it is.
        source: Path or URI of a video, or `-` for the standard input.
        settings: Windows, crops and detection.
        on_window: Function that is called with the results of each window.
        show_progress: Print a progress bar.

    Raises:
        UserError: A setting is out of range, or the file is no video.
    """
    settings.check()
    windows = settings.windows
    method, form = model_flow(model, settings.flow_weights), model.config.data.window
    chosen = views(model.image_size, model.config.data.crop, windows.crops, flips=windows.flips)
    starts, scores = list[int](), list[np.ndarray]()
    with FrameStream(source) as stream, _progress(stream) if show_progress else nullcontext(_ignore) as advance:
        counted = _Counted(stream, model.image_size, advance)
        for window in score_windows(model, video_windows(counted.images(), method, windows.stride, form), chosen):
            starts.append(window.start)
            scores.append(window.main)
            if on_window is not None:
                on_window(window)
        remarks = _remarks(stream)
    scores_FK = frame_scores(starts, np.stack(scores), counted.frames, form.span)
    return Segments(detect_segments(scores_FK, model.classes, settings.detection), counted.frames, scores_FK, remarks)


def _progress(stream: FrameStream) -> AbstractContextManager[Callable[[int], None]]:
    return progress("frames", None if stream.duration is None else round(stream.duration * FPS))


def _ignore(count: int) -> None:
    """Show no progress."""


class _Counted:
    """Images of a stream, counted while a thread reads them."""

    def __init__(self, stream: FrameStream, image_size: tuple[int, int], advance: Callable[[int], None]) -> None:
        self._stream, self._size, self._advance = stream, image_size, advance
        self.frames = 0

    def images(self) -> Iterator[np.ndarray]:
        frame: SessionFrame
        for frame in self._stream.frames(self._size):
            self.frames = frame.number + 1
            self._advance(1)
            yield frame.image


def _remarks(stream: FrameStream) -> list[str]:
    remarks = [stream.turn] if stream.turn else []
    if abs(stream.rate / FPS - 1) > 0.01:
        remarks.append(f"resampled from {stream.rate:.4g} to {FPS} frames a second")
    if stream.jumps:
        remarks.append(
            f"{stream.jumps} time stamps are not plausible: those frames follow the one before at the usual rate"
        )
    if stream.damaged:
        remarks.append(f"damaged in {stream.damaged} places, first: {stream.first_damage}")
    return remarks
