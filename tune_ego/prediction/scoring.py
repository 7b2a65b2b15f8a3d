"""Class scores and attention of every window of a video.

B windows in a batch, V views (crops) of a window, T' slices of an attention map, H, W, K classes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
import torch

from tune_ego.feed.batches import made_ahead
from tune_ego.feed.sampling import View
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.prediction.windows import VideoWindow, crop_views
from tune_ego.training.hardware import autocast_dtype, memory_format
from tune_ego.training.metrics import fuse

if TYPE_CHECKING:
    from tune_ego.prediction.trained_model import TrainedModel

_BATCH = {"cpu": 8, "cuda": 32}
"""Largest number of views in a forward pass, except where one window has more."""
_THUMBNAIL_HEIGHT, _THUMBNAIL_QUALITY = 96, 80


class WindowScores(NamedTuple):
    """Results of a model for one window of a video."""

    start: int
    """First session frame."""
    scores: dict[str, np.ndarray]
    """Stream, and `fused` where there are two -> softmax scores [K], float32, the mean over the views."""
    attention: dict[str, np.ndarray]
    """Stream -> map [T', H, W] of the centre crop, float32, its highest value 1; none without attention."""
    thumbnail: bytes
    """JPEG file of the window's middle frame, 96 pixels high."""

    @property
    def main(self) -> np.ndarray:
        """The fused scores, or those of the only stream, [K]."""
        return list(self.scores.values())[-1]


class _Cropped(NamedTuple):
    start: int
    rgb_VTHW3: np.ndarray
    flow_VT2HW: np.ndarray
    thumbnail: bytes


def score_windows(model: TrainedModel, windows: Iterable[VideoWindow], views: list[View]) -> Iterator[WindowScores]:
    """Yield the results of a model for each window. Windows are read in a thread, in parallel with the model.

    The model computes where it is. On a GPU it computes with the precision that it was trained with.
    """
    device = next(model.parameters()).device
    if device.type == "cpu":
        keep_freed_memory()
    # 16-bit arithmetic is slow on CPUs, and wrong in some of their kernels.
    dtype = autocast_dtype(model.config.train.precision, device) if device.type == "cuda" else None
    model.to(memory_format=memory_format(device, dtype))
    cropped = (
        _Cropped(window.start, *crop_views(window, views, model.config.data.crop), _thumbnail(window))
        for window in windows
    )
    for batch in made_ahead(_batches(cropped, max(1, _BATCH[device.type] // len(views))), 2):
        yield from _score(model, batch, len(views), dtype)


def _batches(windows: Iterator[_Cropped], size: int) -> Iterator[list[_Cropped]]:
    while batch := list(islice(windows, size)):
        yield batch


def _score(model: TrainedModel, batch: list[_Cropped], views: int, dtype: torch.dtype | None) -> Iterator[WindowScores]:
    inputs = {
        "rgb": torch.from_numpy(np.concatenate([window.rgb_VTHW3 for window in batch])),
        "flow": torch.from_numpy(np.concatenate([window.flow_VT2HW for window in batch])),
    }
    with torch.autocast(next(model.parameters()).device.type, dtype, enabled=dtype is not None):
        prediction = model(**{name: inputs[name] for name in model.streams})
    scores_BK = {
        name: scores.reshape(len(batch), views, -1).double().mean(dim=1).float().cpu().numpy()
        for name, scores in prediction.stream_scores.items()
    }
    if len(scores_BK) > 1:
        scores_BK["fused"] = fuse(scores_BK, model.config.fusion_weight)
    centre = {name: maps[::views].cpu().numpy() for name, maps in prediction.attention.items()}
    for place, window in enumerate(batch):
        yield WindowScores(
            window.start,
            {name: scores[place] for name, scores in scores_BK.items()},
            {name: maps[place] / max(float(maps[place].max()), 1e-12) for name, maps in centre.items()},
            window.thumbnail,
        )


def _thumbnail(window: VideoWindow) -> bytes:
    image = window.rgb_THW3[len(window.rgb_THW3) // 2]
    width = round(_THUMBNAIL_HEIGHT * image.shape[1] / image.shape[0])
    small = cv2.resize(image, (width, _THUMBNAIL_HEIGHT), interpolation=cv2.INTER_AREA)
    done, data = cv2.imencode(
        ".jpg", cv2.cvtColor(small, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, _THUMBNAIL_QUALITY]
    )
    assert done
    return data.tobytes()
