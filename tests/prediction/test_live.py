"""Streams: a line for each window, skipped windows, delay, errors."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import COMMAND
from tests.dataset.test_irregular_videos import encoded, grey
from tests.evaluation.test_evaluate import checkpoint
from tune_ego.errors import UserError
from tune_ego.feed.sampling import views
from tune_ego.prediction.live import Arrived, LatestWindow, predict_live
from tune_ego.prediction.predict import PredictionSettings, model_flow
from tune_ego.prediction.scoring import score_windows
from tune_ego.prediction.trained_model import load_model
from tune_ego.prediction.windows import video_windows


def image(number: int) -> np.ndarray:
    return np.full((4, 4, 3), number, np.uint8)


def levels(arrived: Arrived) -> list[int]:
    return [int(image[0, 0, 0]) for image in arrived.images]


def test_windows_that_come_while_the_model_is_busy_are_skipped() -> None:
    """A window is complete with the frame after it, for the flow of its last frame; at the end without."""
    go = threading.Event()

    def source() -> Iterator[np.ndarray]:
        yield from (image(number) for number in range(20))
        go.wait(10)
        yield from (image(number) for number in range(20, 60))

    moments = iter(range(100))
    latest = LatestWindow(source(), 8, now=lambda: float(next(moments)))
    first = latest.take()
    assert first is not None and (first.number, first.start, first.moment) == (0, 0, 15.0)
    assert levels(first) == list(range(17))
    go.set()
    latest._thread.join(10)  # meanwhile windows 1 to 5 are replaced by the next ones
    last = latest.take()
    assert last is not None and (last.number, last.start, last.moment) == (6, 44, 59.0)
    assert levels(last) == list(range(44, 60)) and latest.take() is None


@pytest.mark.parametrize(("frames", "starts"), [(5, [0]), (16, [0]), (17, [0, 1]), (24, [0, 8]), (25, [0, 8, 9])])
def test_the_last_window_ends_with_the_stream(frames: int, starts: list[int]) -> None:
    taken = threading.Semaphore(0)
    seen = []

    class Slow(LatestWindow):
        """Gives each window, by waiting until the one before it was taken."""

        def _give(self, arrived: Arrived) -> None:
            super()._give(arrived)
            taken.acquire()

    latest = Slow((image(number) for number in range(frames)), 8)
    while (arrived := latest.take()) is not None:
        seen.append(arrived.start)
        assert levels(arrived)[:16] == list(range(arrived.start, min(arrived.start + 16, frames)))
        taken.release()
    assert seen == starts


def test_a_stream_is_scored_in_windows_of_the_model_s_form(
    shards: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every second frame: a window spans 31 frames. The last one of 40 frames starts at 9; it is the file's."""
    checkpoint(tmp_path, shards, streams="rgb", data__frame_step=2)
    model = load_model(tmp_path / "run", "cpu")
    width, height = model.image_size
    random = np.random.default_rng(0)
    images = [random.integers(0, 256, (height, width, 3)).astype(np.uint8) for _ in range(40)]
    monkeypatch.setattr("tune_ego.prediction.live._stdin_images", lambda size: iter(images))
    lines: list[str] = []
    predict_live(model, "-", PredictionSettings(), lines.append)
    last = json.loads(lines[-1])
    assert (round(last["start"] * 24), round(last["end"] * 24)) == (9, 40)
    *_, window = video_windows(images, model_flow(model, None), 8, model.config.data.window)
    (scored,) = score_windows(model, [window], views(model.image_size, 32))
    assert last["score"] == pytest.approx(float(scored.main.max()), abs=2e-4)
    assert last["action"] == model.classes[int(scored.main.argmax())]


def test_an_error_of_the_stream_comes_after_its_last_window() -> None:
    def source() -> Iterator[np.ndarray]:
        yield from (image(number) for number in range(17))
        raise UserError("broken")

    latest = LatestWindow(source(), 8)
    latest._thread.join(10)
    assert latest.take() is not None
    with pytest.raises(UserError, match="broken"):
        latest.take()


def test_a_pipe_gives_lines_of_json(shards: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, shards)
    data = encoded([grey(n % 40) for n in range(80)], format="matroska")
    command = [sys.executable, "-c", COMMAND, "predict", str(tmp_path / "run"), "-"]
    done = subprocess.run(command, input=data, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    lines = [json.loads(line) for line in done.stdout.decode().splitlines()]
    scored = [round(line["start"] * 24) for line in lines]
    assert scored == sorted(set(scored)) and scored[-1] == 64 and set(scored) <= set(range(0, 65, 8))
    assert len(lines) + sum(line["skipped"] for line in lines) == 9
    for line in lines:
        assert line["delay"] >= 0 and line["action"] == line["top"][0]["action"]
        assert line["end"] == pytest.approx(line["start"] + 16 / 24, abs=2e-3)
    wrong = subprocess.run(command, input=b"no video", capture_output=True, check=False)
    assert (
        wrong.returncode == 2 and b"-: cannot be opened as a video" in wrong.stderr and b"Traceback" not in wrong.stderr
    )
