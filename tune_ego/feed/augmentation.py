"""Cropping, scaling and mirroring of images, flow and gaze. No Ray and no torch here.

`mirrored_flow_x` and `scaled_flow` take tensors, too.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from tune_ego.feed.sampling import Window


def crop_shape(stream: str, side: int) -> tuple[int, int, int]:
    """Return the shape of a stream's cropped image in a batch: `rgb` [side, side, 3], `flow` [2, side, side]."""
    match stream:
        case "rgb":
            return (side, side, 3)
        case "flow":
            return (2, side, side)
        case _:
            raise ValueError(f"no stream {stream!r}")


def mirrored_flow_x(levels: Any) -> Any:
    """Return the negated x component of flow, uint8 levels of any shape: mirroring exchanges left and right."""
    return 255 - levels


def scaled_flow(levels: Any, factor: float) -> Any:
    """Return flow, levels from 0 to 255 of any shape, times a factor; 127.5 is no motion. Values are floating-point."""
    return ((levels - 127.5) * factor + 127.5).clip(0, 255)


def place_region(target: np.ndarray, image: np.ndarray, flip: bool) -> None:
    """Scale a region to `target`, both uint8 [height, width, 3] or [height, width]. With `flip` it is mirrored."""
    height, width = target.shape[:2]
    shrinks = image.shape[0] * image.shape[1] > height * width
    scaled = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    target[:] = cv2.flip(scaled, 1) if flip else scaled


def place_image(target: np.ndarray, image: np.ndarray, flip: bool) -> None:
    """Copy an image, uint8 [H, W], into `target`. With `flip` the copy is mirrored."""
    if flip:
        cv2.flip(image, 1, target)
    else:
        target[:] = image


def crop_gaze(gaze_T2: np.ndarray, image_size: tuple[int, int], window: Window, crop: int) -> np.ndarray:
    """Convert gaze points to coordinates of the crop, mirrored if the window is.

    Args:
        gaze_T2: x, y in [0, 1] of the image.
        image_size: (width, height), pixels.
        window: Position of the crop.
        crop: Side of the crop, pixels.

    Returns:
        x, y in [0, 1] of the crop, [T, 2]; outside [0, 1] where gaze is outside the crop.
    """
    points_T2 = (gaze_T2 * image_size - (window.left, window.top)) / (window.region or crop)
    if window.flip:
        points_T2[:, 0] = 1 - points_T2[:, 0]
    return points_T2
