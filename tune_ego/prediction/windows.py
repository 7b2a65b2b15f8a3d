"""Windows of a video of any length, as the shards would hold them. No torch here.

T frames of a window, V views (crops) of a window, H, W.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg

from tune_ego.config import LU_WINDOW, WindowForm
from tune_ego.dataset.flow import FlowMethod, split_components
from tune_ego.dataset.video import encode_each
from tune_ego.feed.augmentation import mirrored_flow_x
from tune_ego.feed.sampling import View


class VideoWindow(NamedTuple):
    """Session frames with their flow, uncropped."""

    start: int
    """First session frame."""
    rgb_THW3: np.ndarray
    """uint8, RGB."""
    flow_T2HW: np.ndarray
    """uint8 levels, x before y."""


def crop_views(window: VideoWindow, chosen: list[View], crop: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the crops of a window: frames uint8 [V, T, crop, crop, 3] and flow uint8 [V, T, 2, crop, crop]."""
    rgb, flow = [], []
    for top, left, flip in chosen:
        rows, columns = slice(top, top + crop), slice(left, left + crop)
        rgb_THW3, flow_T2HW = window.rgb_THW3[:, rows, columns], window.flow_T2HW[:, :, rows, columns]
        if flip:
            rgb_THW3, flow_T2HW = rgb_THW3[:, :, ::-1], flow_T2HW[..., ::-1].copy()
            flow_T2HW[:, 0] = mirrored_flow_x(flow_T2HW[:, 0])
        rgb.append(rgb_THW3)
        flow.append(flow_T2HW)
    return np.stack(rgb), np.stack(flow)


def video_windows(
    frames: Iterable[np.ndarray],
    method: FlowMethod,
    stride: int,
    form: WindowForm = LU_WINDOW,
) -> Iterator[VideoWindow]:
    """Yield the windows at frames 0, stride, 2 stride, ... and one that ends with the video.

    Images and flow pass through JPEG files, as those of the shards do: a window of a clip's video has the bytes that
    training and `evaluate` read. A video shorter than a window gives one window, which repeats its last frame.

    Args:
        frames: Session frames, BGR uint8 [H, W, 3].
        method: Optical flow of the model's training shards.
        stride: Frames between the starts of two windows, 1 to 16.
        form: Frames that a window holds.

    Raises:
        UserError: There are no frames.
    """
    cv2.setNumThreads(1)  # the model computes beside this
    latest: deque[tuple[np.ndarray, np.ndarray]] = deque(maxlen=form.span)
    count = end = 0  # frames so far, frames up to the end of the last window

    def window() -> VideoWindow:
        images = [*latest, *[latest[-1]] * (form.span - len(latest))][:: form.step]
        rgb_THW3, flow_T2HW = (np.stack(stream) for stream in zip(*images))
        return VideoWindow(max(count - form.span, 0), rgb_THW3, flow_T2HW)

    for rgb, flow in encode_each(frames, method):
        levels_HW = simplejpeg.decode_jpeg(flow, "GRAY")[..., 0]
        latest.append((simplejpeg.decode_jpeg(rgb, "RGB"), split_components(levels_HW)))
        count += 1
        if count >= form.span and (count - form.span) % stride == 0:
            yield window()
            end = count
    if end < count:
        yield window()
