from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from tune_ego.dataset import video
from tune_ego.dataset.flow import FlowMethod
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


def write_grey_video(path: Path, image_HW: np.ndarray, frames: int = 2) -> None:
    """Still frames without loss."""
    height, width = image_HW.shape
    planes = np.concatenate([image_HW, np.full((height // 2, width), 128, np.uint8)])
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for _ in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(planes, format="yuv420p")))
        container.mux(stream.encode(None))


def test_shrunk_frames_hold_the_mean_of_the_area(tmp_path: Path) -> None:
    """A quarter of the size; of four columns the two inner ones are black, so the nearest and their mean are too."""
    stripes = np.tile(np.array([235, 16, 16, 235], np.uint8), (64, 24))
    write_grey_video(tmp_path / "a.mp4", stripes)
    for image in video.decode(str(tmp_path / "a.mp4"), (24, 16)):
        assert image.shape == (16, 24, 3)
        np.testing.assert_allclose(image, 127.5, atol=1)


def test_enlarged_frames_are_interpolated_linearly(tmp_path: Path) -> None:
    """Twice the size; the place of pixel i is i / 2 - 1/4, so an edge becomes a quarter and three quarters."""
    edge = np.tile(np.repeat(np.array([16, 235], np.uint8), 8), (32, 1))
    write_grey_video(tmp_path / "a.mp4", edge)
    image = next(video.decode(str(tmp_path / "a.mp4"), (32, 64)))
    assert image.shape == (64, 32, 3)
    np.testing.assert_allclose(image[:, 13:19, 1], np.tile([0, 0, 63.75, 191.25, 255, 255], (64, 1)), atol=1)


def test_width_and_height_of_the_frames_are_not_exchanged(tmp_path: Path) -> None:
    write_grey_video(tmp_path / "a.mp4", np.full((64, 96), 100, np.uint8), frames=3)
    assert [image.shape for image in video.decode(str(tmp_path / "a.mp4"), (48, 16))] == [(16, 48, 3)] * 3
    facts = video.probe(str(tmp_path / "a.mp4"))
    assert (facts.frames, facts.size) == (3, (96, 64))
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert facts.bytes == sum(packet.size for packet in container.demux(video=0))


def decoded(jpeg: bytes) -> np.ndarray:
    return np.asarray(cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_UNCHANGED))


@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_each_frame_has_its_jpeg_and_the_flow_to_the_next_one(batch: int) -> None:
    """Frame k is blue 10 k^2 all over; the made-up flow is a tenth of the change and a tenth of the first frame."""
    blues = [0, 10, 40, 90, 160]
    sizes: list[int] = []

    def fields(views: Sequence[np.ndarray]) -> np.ndarray:
        sizes.append(len(views) - 1)
        pairs = [(views[i + 1] / 10 - views[i] / 10, views[i] / 10) for i in range(len(views) - 1)]
        return np.stack([np.stack(pair, axis=-1) for pair in pairs]).astype(np.float32)

    method = FlowMethod(lambda frame: frame[..., 0].astype(float), fields, batch)
    frames = [np.full((16, 24, 3), (blue, 20, 200), np.uint8) for blue in blues]
    encoded = video.encode_frames(iter(frames), method)
    for jpeg, frame in zip(encoded.rgb, frames, strict=True):
        np.testing.assert_allclose(decoded(jpeg), frame, atol=3)
    # (p + 20) 255 / 40 of the changes 1, 3, 5, 7 and of the frames 0, 1, 4, 9; the last one once more.
    expected = [(133.9, 127.5), (146.6, 133.9), (159.4, 153), (172.1, 184.9), (172.1, 184.9)]
    for jpeg, (x, y) in zip(encoded.flow, expected, strict=True):
        np.testing.assert_allclose(decoded(jpeg), np.repeat([[x], [y]], 16, axis=0).repeat(24, axis=1), atol=2.5)
    assert encoded.flow[-1] == encoded.flow[-2]
    assert max(sizes) == min(batch, 4) and sum(sizes) == 4


def test_a_single_frame_moves_nowhere_and_no_frame_is_refused() -> None:
    def fields(views: Sequence[np.ndarray]) -> np.ndarray:
        raise AssertionError

    method = FlowMethod(lambda frame: frame[..., 0], fields, 1)
    encoded = video.encode_frames([np.zeros((16, 24, 3), np.uint8)], method)
    assert len(encoded.rgb) == len(encoded.flow) == 1
    np.testing.assert_array_equal(decoded(encoded.flow[0]), np.full((32, 24), 128, np.uint8))
    with pytest.raises(UserError, match="the video holds no frame"):
        video.encode_frames([], method)


def test_images_are_jpeg_files_of_quality_90() -> None:
    method = FlowMethod(lambda frame: frame[..., 0], lambda views: np.zeros((1, 16, 24, 2), np.float32), 1)
    encoded = video.encode_frames([np.zeros((16, 24, 3), np.uint8)] * 2, method)
    for jpeg in (*encoded.rgb, *encoded.flow):
        table = jpeg.index(b"\xff\xdb") + 5
        # The standard's 16 11 12 14 12 10 16 14 ..., times 20 plus 50, over 100.
        assert list(jpeg[table : table + 8]) == [3, 2, 2, 3, 2, 2, 3, 3]


def test_files_that_are_no_video_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"nonsense" * 99)
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 44100
        container.mux(stream.encode(sound))
        container.mux(stream.encode(None))
    for name, reason in (("a", "cannot be opened"), ("absent", "cannot be opened"), ("sound", "holds no video stream")):
        for read in (video.probe, video.check_opens):
            with pytest.raises(UserError, match=reason):
                read(str(tmp_path / f"{name}.mp4"))
