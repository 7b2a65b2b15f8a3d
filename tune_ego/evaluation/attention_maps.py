"""Attention maps and class scores of windows, and pictures of the maps over the frames.

T frames of a window, T' slices of its attention map, H, W, K classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import cv2
import numpy as np
import torch

from tune_ego.dataset.shards import Clip, Shards
from tune_ego.evaluation.evaluate import OpenedModel
from tune_ego.evaluation.inspection import draw_gaze, find_record, overlay
from tune_ego.feed.batches import ClipBatch, to_device
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window
from tune_ego.model import StreamOutput
from tune_ego.training.hardware import autocast_dtype
from tune_ego.training.metrics import fuse

_BATCH = 8
"""Windows in a forward pass."""


class ScoredWindow(NamedTuple):
    """Results of a model for one window."""

    window: Window
    frames_THW3: np.ndarray
    """RGB uint8: the crop that the model sees."""
    gaze_T2: np.ndarray
    """x, y in [0, 1] of the crop, or outside it."""
    gaze_valid_T: np.ndarray
    scores: dict[str, np.ndarray]
    """Softmax scores [K] of each stream, and `fused` where there are two."""
    attention: dict[str, np.ndarray]
    """Each stream's map [T', H, W], its highest value 1; none without attention."""
    step: int = 1
    """Distance of two of the window's frames, in frames of the clip."""

    @property
    def span(self) -> int:
        """Frames of the clip from the window's first frame to its last."""
        return (len(self.frames_THW3) - 1) * self.step + 1

    def gaze(self, frame: int) -> tuple[float, float] | None:
        """Return the gaze point of one of the window's frames; None without gaze inside the crop."""
        x, y = (float(value) for value in self.gaze_T2[frame])
        return (x, y) if self.gaze_valid_T[frame] and 0 <= x < 1 and 0 <= y < 1 else None

    def light(self, stream: str, frame: int) -> np.ndarray | None:
        """Return the slice [H, W] of a stream's map at one of the window's frames; None without attention."""
        if stream not in self.attention:
            return None
        slices = self.attention[stream]
        return slices[frame * len(slices) // len(self.frames_THW3)]


def main_score(result: ScoredWindow) -> str:
    """Return the name of the main scores: `fused`, or the only stream."""
    return list(result.scores)[-1]


def score_windows(opened: OpenedModel, clips: list[Clip], windows: list[Window]) -> list[ScoredWindow]:
    """Run the model over windows of the clips. Raises `UserError` for a damaged shard."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = autocast_dtype(opened.config.train.precision, device) if device.type == "cuda" else None
    model = opened.model.to(device).eval()
    data = opened.config.data
    # Frames are read for the pictures, also if the model has no RGB stream.
    reader = WindowReader(clips, ("rgb", "flow"), opened.shards.image_size, data.crop, form=data.window)
    scored = []
    for first in range(0, len(windows), _BATCH):
        piece = windows[first : first + _BATCH]
        batch = reader.read_batch(list(piece))
        with torch.inference_mode(), torch.autocast(device.type, dtype, enabled=dtype is not None):
            outputs = model(to_device(batch, device).model_input())
        for place, window in enumerate(piece):
            scores = {name: out.logits_BK[place].double().softmax(0).cpu().numpy() for name, out in outputs.items()}
            if len(scores) == 2:
                scores["fused"] = fuse(scores, opened.config.fusion_weight)
            maps = {
                name: out.attention_BTHW[place].float().cpu().numpy()
                for name, out in outputs.items()
                if out.attention_BTHW is not None
            }
            maps = {name: value / max(float(value.max()), 1e-12) for name, value in maps.items()}
            seen = (batch["rgb"][place], batch["gaze"][place], batch["gaze_valid"][place])
            scored.append(ScoredWindow(window, *seen, scores, maps, data.frame_step))
    return scored


def as_clip(shards: Shards, name: str) -> Clip:
    """Return a clip by its name. Raises `UserError`, with the nearest names, if the shards have no such clip."""
    return shards.clip(find_record(shards, name))


def panels(result: ScoredWindow, frame: int, side: int) -> dict[str, np.ndarray]:
    """Draw one frame of a window, RGB uint8 [side, side, 3]: `frame`, and each stream's attention over it."""
    image = cv2.resize(result.frames_THW3[frame], (side, side), interpolation=cv2.INTER_LINEAR)
    pictures = {"frame": image.copy()}
    for stream in result.attention:
        light = result.light(stream, frame)
        pictures[stream] = overlay(image, light)
    point = result.gaze(frame)
    for picture in pictures.values() if point else ():
        draw_gaze(picture, *point)  # type: ignore[misc]
    return pictures


_STRIP_CLIPS, _STRIP_SIDE = 6, 112


def validation_strip(batch: ClipBatch, outputs: Mapping[str, StreamOutput]) -> np.ndarray | None:
    """Draw some clips of a batch side by side, RGB uint8: the middle frame, and below it each stream's attention.

    With the gaze point where there is one; None without attention. Where there is no RGB stream, the frame is grey.
    """
    maps = {name: out.attention_BTHW for name, out in outputs.items() if out.attention_BTHW is not None}
    if not maps:
        return None
    middle, columns = batch.gaze_BT2.shape[1] // 2, []
    for place in range(min(_STRIP_CLIPS, int(batch.present_B.sum()))):
        frame = np.full((_STRIP_SIDE, _STRIP_SIDE, 3), 128, np.uint8)
        if batch.rgb_BTHWC is not None:
            frame = cv2.resize(batch.rgb_BTHWC[place, middle].cpu().numpy(), frame.shape[:2])
        column = [frame.copy()]
        for map_BTHW in maps.values():
            light = map_BTHW[place, map_BTHW.shape[1] // 2].float().cpu().numpy()
            column.append(overlay(frame, light / max(float(light.max()), 1e-12)))
        x, y = (float(value) for value in batch.gaze_BT2[place, middle].cpu())
        if batch.gaze_valid_BT[place, middle] and 0 <= x < 1 and 0 <= y < 1:
            for picture in column:
                draw_gaze(picture, x, y)
        columns.append(np.concatenate(column))
    return np.concatenate(columns, axis=1)
