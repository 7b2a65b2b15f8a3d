"""`VIDEO.html`: the detected actions of a video as one page that loads nothing else.

F session frames, K classes.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import cv2
import numpy as np

from tune_ego.dataset.gaze import FPS
from tune_ego.evaluation.inspection import overlay
from tune_ego.prediction.scoring import WindowScores
from tune_ego.prediction.segments import Segment
from tune_ego.prediction.window_file import read_windows
from tune_ego.report.page import template_environment

if TYPE_CHECKING:
    from tune_ego.prediction.trained_model import TrainedModel

_STRIP = 16
"""Pictures of the strip below the timeline."""
_CURVES = 5
"""Classes whose score is plotted."""
_POINTS = 600
"""Most points of a curve."""
_DRAWN = 60
"""Segments, those with the highest scores, that have pictures of the attention."""
_COLOURS = ("#0072b2", "#d98200", "#00805c", "#c04a00", "#8a5ad0", "#b8860b", "#2f8fb0", "#a0527a")
_OTHER = "#7a8490"
"""Colour of the classes after the first eight."""


class _Pictures(NamedTuple):
    strip: list[str]
    """Thumbnails, evenly spread over the video, as data URIs."""
    best: dict[int, dict[str, str]]
    """Segment -> `frame` and each stream -> its picture at the segment's best window, as data URIs."""


def render_page(
    source: str, model: TrainedModel, segments: Sequence[Segment], scores_FK: np.ndarray, windows: str, facts: Any
) -> str:
    """Return the page as HTML.

    Args:
        source: The video, in the title.
        model: Model that has scored it.
        segments: Its detected actions.
        scores_FK: Class scores of its frames.
        windows: Path or URI of its windows (`window_file`).
        facts: Pairs of (name, text) for the foot of the page.
    """
    seconds = len(scores_FK) / FPS
    pictures = _draw(segments, len(scores_FK), model, windows)
    lengths: dict[str, float] = {}
    for segment in segments:
        lengths[segment.action] = lengths.get(segment.action, 0) + segment.end - segment.start
    order = sorted(lengths, key=lambda action: -lengths[action])
    colours = {action: _COLOURS[place] if place < len(_COLOURS) else _OTHER for place, action in enumerate(order)}
    return (
        template_environment()
        .get_template("prediction.html.jinja")
        .render(
            source=source,
            seconds=seconds,
            clock=_clock,
            segments=segments,
            colours=colours,
            order=order,
            lengths=lengths,
            curves=_curves(scores_FK, model.classes, order, colours),
            strip=pictures.strip,
            best=pictures.best,
            ticks=_ticks(seconds),
            facts=facts,
        )
    )


def _clock(seconds: float) -> str:
    """Return a time as minutes:seconds.tenths, or hours:minutes:seconds.tenths."""
    tenths = round(seconds * 10)
    hours, rest = divmod(tenths, 36000)
    minutes, rest = divmod(rest, 600)
    text = f"{minutes:02d}:{rest / 10:04.1f}"
    return f"{hours}:{text}" if hours else text


def _ticks(seconds: float) -> list[float]:
    """Return round times for the time axis, at most nine."""
    steps = (0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200)
    step = next((step for step in steps if seconds / step <= 8), seconds)
    return [float(time) for time in np.arange(0, seconds + 1e-9, step)]


def _curves(
    scores_FK: np.ndarray, classes: Sequence[str], order: Sequence[str], colours: dict[str, str]
) -> list[dict[str, str]]:
    """Return the score curves of the classes that are detected longest, as points of a 1000 x 100 drawing."""
    frames = len(scores_FK)
    step = max(1, -(-frames // _POINTS))
    # [points, K]; the highest score of each stretch, so that short actions stay visible
    peaks = np.stack([scores_FK[first : first + step].max(axis=0) for first in range(0, frames, step)])
    times = np.minimum(np.arange(len(peaks)) * step + step / 2, frames)
    chosen = list(order[:_CURVES]) or [classes[int(scores_FK.max(axis=0).argmax())]]
    return [
        {
            "action": action,
            "colour": colours.get(action, _OTHER),
            "points": " ".join(
                f"{1000 * time / frames:.1f},{100 * (1 - score):.1f}"
                for time, score in zip(times, peaks[:, list(classes).index(action)])
            ),
        }
        for action in chosen
    ]


def _draw(segments: Sequence[Segment], frames: int, model: TrainedModel, windows: str) -> _Pictures:
    """Make the strip and the attention pictures in one pass over the windows."""
    places = [(index + 0.5) * frames / _STRIP for index in range(_STRIP)]
    nearest: list[tuple[float, bytes]] = [(np.inf, b"")] * _STRIP
    drawn = sorted(range(len(segments)), key=lambda index: -segments[index].score)[:_DRAWN]
    labels = {index: model.classes.index(segments[index].action) for index in drawn}
    best: dict[int, tuple[float, WindowScores]] = {}
    for window in read_windows(windows):
        middle = window.start + model.config.data.window.span / 2
        for place, target in enumerate(places):
            if abs(middle - target) < nearest[place][0]:
                nearest[place] = (abs(middle - target), window.thumbnail)
        for index in drawn:
            if segments[index].start * FPS <= min(middle, frames - 1) <= segments[index].end * FPS:
                score = float(window.main[labels[index]])
                if index not in best or score > best[index][0]:
                    best[index] = (score, window)
    pictures = {index: _attention(window, model) for index, (_, window) in best.items()}
    return _Pictures([_data_uri(thumbnail) for _, thumbnail in nearest], pictures)


def _attention(window: WindowScores, model: TrainedModel) -> dict[str, str]:
    """Draw the middle frame of a window, and each stream's attention over its centre crop."""
    bgr = cv2.imdecode(np.frombuffer(window.thumbnail, np.uint8), cv2.IMREAD_COLOR)
    image = cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB)
    pictures = {"frame": _data_uri(window.thumbnail)}
    for stream, map_THW in window.attention.items():
        lit = overlay_crop(image, map_THW[len(map_THW) // 2], model.image_size, model.config.data.crop)
        done, data = cv2.imencode(".jpg", cv2.cvtColor(lit, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 80])
        assert done
        pictures[stream] = _data_uri(data.tobytes())
    return pictures


def overlay_crop(image: np.ndarray, map_HW: np.ndarray, image_size: tuple[int, int], crop: int) -> np.ndarray:
    """Draw a map of the centre crop over a whole image, RGB uint8 of any size; outside the crop it is grey.

    `image_size` (width, height) and `crop` are in pixels of the model's images.
    """
    height, width = image.shape[:2]
    left, top = (round((size - crop) / 2 / size * side) for size, side in zip(image_size, (width, height)))
    drawn = overlay(image, None)
    inner = (slice(top, height - top), slice(left, width - left))
    drawn[inner] = overlay(np.ascontiguousarray(image[inner]), map_HW)
    return drawn


def _data_uri(jpeg: bytes) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"
