"""Orientation of a video by its display matrix, as phones write it. Apart from video.py, which is long."""

from __future__ import annotations

from typing import NamedTuple

import av
import numpy as np

from tune_ego.errors import UserError

_ROUNDING = 1e-3
"""Largest part of a display matrix, relative to its largest, that is taken for 0: its numbers are rounded."""


class Orientation(NamedTuple):
    """Orientation of a video by its display matrix. Frames are transposed first, then mirrored."""

    transposed: bool = False
    mirrored_x: bool = False
    mirrored_y: bool = False

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Turn an image, [H, W, ...]."""
        image = image.swapaxes(0, 1) if self.transposed else image
        return np.ascontiguousarray(image[:: -1 if self.mirrored_y else 1, :: -1 if self.mirrored_x else 1])


def frame_orientation(frame: av.VideoFrame) -> tuple[Orientation, str]:
    """Return the orientation of a frame, and its description in words ("" where the frame is upright).

    Raises `UserError` where the frame is turned by an angle that is no multiple of 90 degrees.
    """
    data = next((bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"), None)
    orientation = Orientation() if data is None else matrix_orientation(np.frombuffer(data, np.int32).reshape(3, 3))
    if orientation == Orientation():
        return orientation, ""
    mirrored = orientation.transposed ^ orientation.mirrored_x ^ orientation.mirrored_y
    turn = f"turned by {frame.rotation} degrees counterclockwise{' and mirrored' if mirrored else ''}, as it is marked"
    return orientation, turn


def matrix_orientation(matrix: np.ndarray) -> Orientation:
    """Return the orientation of FFmpeg's display matrix, int32 [3, 3] for row vectors (x, y, 1).

    A matrix of zeros counts as none. Raises `UserError` for other angles than multiples of 90 degrees.
    """
    turn = matrix[:2, :2].astype(np.float64)
    turn[np.abs(turn) <= _ROUNDING * np.abs(turn).max()] = 0
    match (turn != 0).tolist():
        case [[False, False], [False, False]]:
            return Orientation()
        case [[True, False], [False, True]]:
            return Orientation(False, bool(turn[0, 0] < 0), bool(turn[1, 1] < 0))
        case [[False, True], [True, False]]:
            return Orientation(True, bool(turn[1, 0] < 0), bool(turn[0, 1] < 0))
        case _:
            raise UserError("its display matrix turns it by an angle that is no multiple of 90 degrees")
