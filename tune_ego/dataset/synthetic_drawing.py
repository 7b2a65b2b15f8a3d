"""Drawing of synthetic scenes: scenery, objects and a hand."""

from __future__ import annotations

import cv2
import numpy as np

_COLOURS = ((210, 40, 40), (50, 80, 220), (235, 210, 50), (40, 170, 70), (160, 60, 190), (245, 245, 245))
_SKIN = (226, 172, 138)


def background(random: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Return the scenery of a session, RGB uint8 [H, W, 3]."""
    coarse = random.uniform(70, 170, (6, 8, 3)) * 0.6 + random.uniform(90, 150) * 0.4
    fine = random.normal(0, 9, (height // 4, width // 4, 1))
    image = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(image + cv2.resize(fine, (width, height))[..., None], 0, 255).astype(np.uint8)


_SUBPIXEL = 4  # fractional bits of OpenCV's fixed-point coordinates


def _fixed(points: np.ndarray) -> np.ndarray:
    """Convert pixels to OpenCV's fixed-point coordinates."""
    return np.rint(np.asarray(points) * (1 << _SUBPIXEL)).astype(np.int32)


def draw_object(image: np.ndarray, noun: int, centre: np.ndarray, radius: float) -> None:
    """Draw the object of a noun; centre (x, y) and radius in pixels."""
    shapes = {
        1: [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
        2: [(0, -1.05), (1, 0.8), (-1, 0.8)],
        3: [(-0.35, -1), (0.35, -1), (0.35, -0.35), (1, -0.35), (1, 0.35), (0.35, 0.35)]
        + [(0.35, 1), (-0.35, 1), (-0.35, 0.35), (-1, 0.35), (-1, -0.35), (-0.35, -0.35)],
        4: [(0, -1.1), (0.8, 0), (0, 1.1), (-0.8, 0)],
        5: [(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)],
    }
    for scale, colour in ((1.0, tuple(value // 3 for value in _COLOURS[noun])), (0.84, _COLOURS[noun])):
        if noun == 0:
            cv2.circle(
                image,
                _fixed(centre).tolist(),
                int(_fixed(np.array(radius * scale))),
                colour,
                -1,
                cv2.LINE_AA,
                _SUBPIXEL,
            )
        else:
            points = _fixed(centre + radius * scale * np.array(shapes[noun]))
            cv2.fillPoly(image, [points], colour, cv2.LINE_AA, _SUBPIXEL)


def draw_hand(image: np.ndarray, target: np.ndarray, radius: float) -> None:
    """Draw a hand that reaches from the lower edge to the target (x, y), pixels."""
    height, width = image.shape[:2]
    palm = target + (0, 0.9 * radius)
    wrist = np.array([0.5 * width + 0.3 * (palm[0] - 0.5 * width), height + radius])
    cv2.line(
        image, _fixed(palm).tolist(), _fixed(wrist).tolist(), _SKIN, max(2, round(0.9 * radius)), cv2.LINE_AA, _SUBPIXEL
    )
    cv2.circle(image, _fixed(palm).tolist(), int(_fixed(np.array(0.75 * radius))), _SKIN, -1, cv2.LINE_AA, _SUBPIXEL)
