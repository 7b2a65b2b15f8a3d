"""Optical flow between two frames, and its 8-bit form."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np

BOUND = 20.0
"""Flow is clipped to [-BOUND, BOUND] pixels (Lu)."""


def dis() -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
    """Dense inverse search (Kroeger et al., ECCV 2016; OpenCV's medium preset).

    The returned function takes two grey uint8 frames [H, W] and gives the motion from the first to the
    second, [H, W, 2] float32 pixels, x then y.
    """
    method = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def between(before_HW: np.ndarray, after_HW: np.ndarray) -> np.ndarray:
        # Without an initial field the method would start from its previous result: order must not matter.
        return method.calc(before_HW, after_HW, np.zeros((*before_HW.shape, 2), np.float32))

    return between


def quantise(field_HW2: np.ndarray) -> np.ndarray:
    """[H, W, 2] pixels -> [2H, W] uint8, linear from [-20, 20] to [0, 255]; the x component above the y component."""
    levels = np.rint((np.clip(field_HW2, -BOUND, BOUND) + BOUND) * (255 / (2 * BOUND)))
    return np.concatenate([levels[..., 0], levels[..., 1]]).astype(np.uint8)


def split_components(grey: np.ndarray) -> np.ndarray:
    """[2H, W] uint8, as stored -> [H, W, 2] uint8."""
    height = grey.shape[0] // 2
    return np.stack([grey[:height], grey[height:]], axis=-1)
