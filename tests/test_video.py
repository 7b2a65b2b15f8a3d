from __future__ import annotations

from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tune_ego.dataset import video
from tune_ego.errors import UserError


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


def cut_without_encoding(source: Path, target: Path, start: float) -> None:
    """From `start` seconds on, packet by packet: from the key frame before on, with an edit list that hides these."""
    with av.open(str(source)) as old, av.open(str(target), "w", options={"movflags": "faststart"}) as new:
        stream = old.streams.video[0]
        copied = new.add_stream_from_template(stream)
        first = round(start / stream.time_base)
        old.seek(first, stream=stream)
        for packet in old.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts, packet.stream = packet.pts - first, packet.dts - first, copied
                new.mux(packet)


def moving_video(path: Path, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"g": "24", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 72, "yuv420p"
        scene = cv2.resize(np.random.default_rng(0).integers(0, 256, (12, 40, 3), np.uint8), (320, 96))
        for time in range(frames):
            image = np.ascontiguousarray(scene[:72, 2 * time : 2 * time + 96])
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def test_a_clip_cut_by_copying_has_the_frames_that_it_shows(tmp_path: Path) -> None:
    moving_video(tmp_path / "whole.mp4", 72)
    cut = tmp_path / "cut.mp4"
    cut_without_encoding(tmp_path / "whole.mp4", cut, 34 / 24)
    with av.open(str(cut)) as container:
        assert container.streams.video[0].frames > 38  # what its index says
    frames = list(video.decode(str(cut), (96, 72)))
    assert len(frames) == video.probe(str(cut)).frames == 38
    expected = list(video.decode(str(tmp_path / "whole.mp4"), (96, 72)))[34:]
    assert all((frame == other).all() for frame, other in zip(frames, expected))


@pytest.mark.parametrize("name", ["whole", "cut"])
def test_a_clip_that_breaks_off_is_found_with_and_without_decoding(tmp_path: Path, name: str) -> None:
    moving_video(tmp_path / "source.mp4", 72)
    path = tmp_path / f"{name}.mp4"
    cut_without_encoding(tmp_path / "source.mp4", path, 0 if name == "whole" else 34 / 24)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 200])
    with pytest.raises(UserError, match="breaks off after"):
        video.probe(str(path))
    with pytest.raises(UserError, match=r"breaks off after|damaged|decoded"):
        list(video.decode(str(path), (96, 72)))
