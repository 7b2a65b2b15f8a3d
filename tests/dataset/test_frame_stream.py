"""Frames of videos that are read once: rates, irregular times, damage, rotation, streams; in bounded memory."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from tests.dataset.test_irregular_videos import SIZE, encoded, grey, numbers
from tune_ego.dataset.frame_stream import FrameStream
from tune_ego.dataset.frame_times import SessionClock, place_frames
from tune_ego.errors import UserError

REAL = Path(__file__).parents[3] / "shared" / "video"


def read(source: str) -> tuple[FrameStream, list[int]]:
    with FrameStream(source) as stream:
        frames = list(stream.frames(SIZE))
        assert [frame.number for frame in frames] == list(range(len(frames)))
        return stream, numbers([frame.image for frame in frames])


def write(folder: Path, data: bytes, name: str = "v.mp4") -> str:
    (folder / name).write_bytes(data)
    return str(folder / name)


def clock_places(seconds: np.ndarray) -> list[int]:
    clock, places = SessionClock(1 / 24), list[int]()
    for index, time in enumerate(seconds):
        places += [index - 1] * clock.add(float(time))
    return places + [len(seconds) - 1] * clock.end()


@pytest.mark.parametrize("rate", [12, 23.976, 24, 25, 29.97, 30, 50, 60])
@pytest.mark.parametrize("frames", [1, 2, 5, 400])
def test_a_clock_that_sees_one_frame_at_a_time_places_as_one_that_sees_all(rate: float, frames: int) -> None:
    seconds = 3.2 + np.arange(frames) / rate
    assert clock_places(seconds) == place_frames(seconds).sources.tolist()


def test_irregular_times_and_jumps() -> None:
    seconds = np.cumsum(np.random.default_rng(0).uniform(0.01, 0.1, 200))
    whole, streamed = place_frames(seconds).sources.tolist(), clock_places(seconds)
    assert streamed[: len(whole) - 2] == whole[:-2] and abs(len(streamed) - len(whole)) <= 2
    clock = SessionClock(1 / 24)
    times = [n / 24 for n in (0, 1, 2, 2, 4, 3, 5)]  # one time twice, one frame late
    assert sum(clock.add(time) for time in times) + clock.end() == 6 and clock.jumps == 0
    clock = SessionClock(1 / 24)
    jumping = [0, 1 / 24, 2 / 24, 500, 500 + 1 / 24, 400, None, 400 + 2 / 24]
    assert sum(clock.add(time) for time in jumping) + clock.end() == 8
    assert clock.jumps == 2


def test_frames_of_other_rates_are_resampled(tmp_path: Path) -> None:
    stream, shown = read(write(tmp_path, encoded([grey(n) for n in range(30)], rate=30)))
    assert shown == place_frames(np.arange(30) / 30).sources.tolist() and len(shown) == 24
    assert stream.rate == 30 and stream.damaged == stream.jumps == 0 and stream.size == (64, 48)
    assert stream.duration == pytest.approx(1.0)
    times = [n / 24 + (0.5 if n >= 10 else 0) for n in range(20)]  # a pause of half a second
    _, shown = read(write(tmp_path, encoded([grey(n) for n in range(20)], times)))
    assert len(shown) == 32 and shown.count(9) + shown.count(10) == 14


def test_times_of_decoding_and_raw_streams_are_not_taken_for_those_of_the_frames(tmp_path: Path) -> None:
    """AVI has the times of decoding, a raw stream none; its rate is in its own headers."""
    expected = place_frames(np.arange(60) / 30).sources.tolist()
    for form, name in (("avi", "v.avi"), ("h264", "v.h264")):
        stream, shown = read(write(tmp_path, encoded([grey(n % 40) for n in range(60)], rate=30, format=form), name))
        assert stream.rate == 30 and stream.jumps == 0, form
        assert shown == [source % 40 for source in expected], form


def test_turned_videos_are_upright(tmp_path: Path) -> None:
    image = np.full((48, 64, 3), 40, np.uint8)
    image[:, :20] = 220
    stream, _ = read(write(tmp_path, encoded([image] * 6, rotation=(90, False))))
    assert stream.size == (48, 64) and "90 degrees" in stream.turn


def test_a_truncated_video_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    data = encoded([grey(n % 40) for n in range(60)], format="matroska")
    whole = read(write(tmp_path, data, "whole.mkv"))[1]
    stream, shown = read(write(tmp_path, data[: len(data) * 2 // 3], "cut.mkv"))
    assert 20 < len(shown) < 60 and shown[:-6] == whole[: len(shown) - 6]  # B-frames near the end need lost frames
    assert stream.duration is not None


def test_damaged_places_are_counted(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = [random.integers(0, 255, (48, 64, 3)).astype(np.uint8) for _ in range(48)]
    data = bytearray(encoded(images, group=12))
    start = data.index(b"mdat") + 2000
    data[start : start + 64] = bytes(64)
    stream, shown = read(write(tmp_path, bytes(data)))
    assert stream.damaged >= 1 and "frame" in stream.first_damage and len(shown) >= 40


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such file"),
        (b"", "cannot be opened as a video"),
        (b"<!DOCTYPE html><html></html>", "no video but a web page"),
        (b"start end action\n" * 50, "cannot be opened as a video"),
    ],
)
def test_what_is_no_video_is_one_line(content: bytes | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "v.mp4").write_bytes(content)
    with pytest.raises(UserError, match=rf"v\.mp4: {message}"):
        read(str(tmp_path / "v.mp4"))


def test_ten_bits_and_very_wide_images(tmp_path: Path) -> None:
    deep = str(tmp_path / "deep.mkv")
    with av.open(deep, "w") as container:
        track = container.add_stream("libx264", rate=24, options={"qp": "4"})
        track.width, track.height, track.pix_fmt = 64, 48, "yuv420p10le"
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(grey(number), format="rgb24").reformat(format="yuv420p10le")
            container.mux(track.encode(frame))
        container.mux(track.encode(None))
    assert read(deep)[1] == list(range(20))
    wide = write(tmp_path, encoded([np.full((432, 7680, 3), 16 + 4 * n, np.uint8) for n in range(2)]), "wide.mp4")
    stream, shown = read(wide)
    assert stream.size == (7680, 432) and shown == [0, 1]


def test_files_without_frames(tmp_path: Path) -> None:
    sound = str(tmp_path / "sound.mp4")
    with av.open(sound, "w") as container:
        track = container.add_stream("aac", rate=16000, layout="mono")
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        silence.sample_rate = 16000
        container.mux(track.encode(silence))
        container.mux(track.encode(None))
    with pytest.raises(UserError, match=r"sound\.mp4: the file holds no video stream"):
        read(sound)
    data = encoded([grey(n) for n in range(3)], format="matroska")
    first_cluster = data.index(bytes.fromhex("1f43b675"))
    with pytest.raises(UserError, match=r"none\.mkv: "):
        read(write(tmp_path, data[:first_cluster], "none.mkv"))


def test_a_stream_on_standard_input_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded([grey(n) for n in range(20)], format="mpegts")

    class Pipe(io.RawIOBase):
        """A stream that cannot seek."""

        def __init__(self) -> None:
            self._inner = io.BytesIO(data)

        def read(self, size: int | None = -1) -> bytes:
            return self._inner.read(size)

        def readable(self) -> bool:
            return True

        def seekable(self) -> bool:
            return False

    class Stdin:
        buffer = Pipe()

    monkeypatch.setattr(sys, "stdin", Stdin())
    _, shown = read("-")
    assert shown == list(range(20))


def test_real_videos(shared: Path) -> None:
    files = sorted(REAL.glob("*.mp4"))
    assert len(files) == 3
    for file in files:
        with FrameStream(str(file)) as stream:
            count = sum(1 for _ in stream.frames((160, 120)))
            assert stream.duration is not None and abs(count / 24 - stream.duration) < 0.1
            assert stream.damaged == 0 and min(stream.size) > 100
