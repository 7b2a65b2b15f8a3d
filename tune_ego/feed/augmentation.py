"""Crop and mirror: images, flow and gaze. No Ray and no torch here; the functions take NumPy arrays and tensors."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from tune_ego.feed.sampling import Window


def mirrored_flow_x(levels: Any) -> Any:
    """Negate the stored x component of flow, uint8 of any shape: in a mirrored image, left is right."""
    return 255 - levels


def place_image(target: np.ndarray, image: np.ndarray, flip: bool) -> None:
    """Copy an image, 8-bit [H, W], into `target`, mirrored with `flip`."""
    if flip:
        cv2.flip(image, 1, target)
    else:
        target[:] = image


def crop_gaze(gaze_T2: np.ndarray, image_size: tuple[int, int], window: Window, crop: int) -> np.ndarray:
    """Gaze points in coordinates of the crop.

    `gaze_T2` holds x, y in [0, 1] of the image, `image_size` is (width, height) and `crop` a side, pixels. Returns
    x, y in [0, 1] of the crop, or outside it where the gaze is; mirrored with the window.
    """
    points_T2 = (gaze_T2 * image_size - (window.left, window.top)) / crop
    if window.flip:
        points_T2[:, 0] = 1 - points_T2[:, 0]
    return points_T2
