from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tune_ego.dataset import video


def write_video(path: Path, pixel_format: str, size: tuple[int, int], color_range: int | None = None) -> None:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "4"})
        stream.width, stream.height, stream.pix_fmt = *size, pixel_format
        if color_range is not None:
            stream.codec_context.color_range = color_range
        for _ in range(3):
            coarse = rng.integers(0, 256, (6, 8, 3), np.uint8)
            image = cv2.resize(coarse, size, interpolation=cv2.INTER_CUBIC)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def first_frame(path: Path) -> av.VideoFrame:
    with av.open(str(path)) as container:
        return next(container.decode(video=0))


def bt_601(frame: av.VideoFrame) -> np.ndarray:
    """BGR after ITU-R BT.601, limited range, in float64; chroma is repeated."""
    planes = frame.to_ndarray().astype(np.float64)
    height, width = frame.height, frame.width
    y = (planes[:height] - 16) / 219
    u, v = (planes[height:].reshape(2, height // 2, width // 2) - 128) / 224
    u, v = (plane.repeat(2, axis=0).repeat(2, axis=1) for plane in (u, v))
    red, blue = y + 1.402 * v, y + 1.772 * u
    green = (y - 0.299 * red - 0.114 * blue) / 0.587
    return np.clip(np.stack([blue, green, red], axis=-1), 0, 1) * 255


def test_colours_are_bt_601_s(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", "yuv420p", (96, 64))
    (image, *rest) = video.decode(str(tmp_path / "a.mp4"), (96, 64))
    assert len(rest) == 2
    expected = bt_601(first_frame(tmp_path / "a.mp4"))
    assert np.abs(image - expected).max() < 1.6
    assert abs((image - expected).mean()) < 0.2


@pytest.mark.parametrize(
    ("pixel_format", "size", "color_range"), [("yuv444p", (96, 64), None), ("yuv420p", (96, 64), 2)]
)
def test_other_formats_are_converted_by_ffmpeg(
    tmp_path: Path, pixel_format: str, size: tuple[int, int], color_range: int | None
) -> None:
    write_video(tmp_path / "a.mp4", pixel_format, size, color_range)
    image = next(video.decode(str(tmp_path / "a.mp4"), size))
    np.testing.assert_array_equal(image, first_frame(tmp_path / "a.mp4").to_ndarray(format="bgr24"))
