"""Views of a model: the pictures' sources against a plain computation, the files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from tests.evaluation.test_evaluate import checkpoint
from tests.report.test_report import check_page
from tests.stub_experiment import write_experiment
from tune_ego.dataset.shards import Clip, open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.attention_maps import ScoredWindow, as_clip, score_windows
from tune_ego.evaluation.evaluate import evaluate, open_model
from tune_ego.evaluation.inspection import overlay
from tune_ego.evaluation.visualize import _COLOURS, _TRUE, _bars, _lines, _plot, visualize, window_at
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window, centre_window, dense_starts
from tune_ego.report.page import SECTIONS
from tune_ego.report.write import write_report


def test_what_is_drawn_is_what_the_model_says(tmp_path: Path, shards: str) -> None:
    trainer = checkpoint(tmp_path, shards, fusion_weight=0.3)
    opened = open_model(str(tmp_path / "run"), shards)
    clip = open_shards(shards).test(1)[0]
    assert as_clip(opened.shards, clip.name) == clip
    size = opened.shards.image_size
    windows = [centre_window(0, start, size, 32) for start in dense_starts(clip.frames)]
    scored = score_windows(opened, [clip], windows)
    assert [look.window for look in scored] == windows
    reader = WindowReader([clip], ("rgb", "flow"), size, 32)
    for look in scored:
        sample = reader.read_batch([look.window])
        scores = {}
        trainer.model.eval()
        for name, axes in (("rgb", (0, 4, 1, 2, 3)), ("flow", (0, 2, 1, 3, 4))):
            image = torch.from_numpy(sample[name]).permute(axes).float() / 127.5 - 1
            with torch.inference_mode():
                logits, attention = trainer.model[name](image)
            scores[name] = logits[0].double().softmax(0).numpy()
            np.testing.assert_allclose(look.scores[name], scores[name], atol=1e-6)
            np.testing.assert_allclose(look.attention[name], attention[0] / attention.max(), atol=1e-5)
            assert (look.light(name, 7) == look.attention[name][0]).all()
            assert (look.light(name, 8) == look.attention[name][1]).all()
        np.testing.assert_allclose(look.scores["fused"], 0.3 * scores["rgb"] + 0.7 * scores["flow"], atol=1e-6)
        assert (look.frames_THW3 == sample["rgb"][0]).all()
        for frame in range(16):
            point = look.gaze(frame)
            inside = (
                sample["gaze_valid"][0, frame]
                and ((sample["gaze"][0, frame] >= 0) & (sample["gaze"][0, frame] < 1)).all()
            )
            assert (point is not None) == bool(inside)
            assert point is None or point == tuple(sample["gaze"][0, frame].tolist())
    for frame in range(clip.frames):
        look, place = window_at(scored, frame)
        assert look.window.start + place == frame and 0 <= place < 16


def test_light_falls_where_the_gaze_loss_puts_it() -> None:
    """Cell j of W stands for the place j / W."""
    light = np.zeros((4, 4), np.float32)
    light[1, 2] = 1
    image = overlay(np.full((80, 80, 3), 128, np.uint8), light).astype(int)
    yellow = image[..., 0] - image[..., 2]  # viridis is yellow at 1
    assert np.unravel_index(yellow.argmax(), yellow.shape) == (20, 40)


def test_files_of_a_clip(tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint(tmp_path, shards)
    clip = open_shards(shards).test(1)[1]
    scored = visualize(str(tmp_path / "run"), clip.name, shards, str(tmp_path / "out"))
    with av.open(str(tmp_path / "out.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.codec_context.pix_fmt == "yuv420p"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == clip.frames and all(side % 2 == 0 for side in frames[0].shape[:2])
    strip = cv2.imread(str(tmp_path / "out.png"))
    assert strip is not None and strip.shape[1] > 1000 and strip.std() > 20
    printed = capsys.readouterr().out
    assert f"{clip.name}: {open_shards(shards).actions[clip.label]} (test clip of split 1)" in printed
    for look in scored:
        assert f"{100 * look.scores['flow'][clip.label]:.1f} %" in printed


@pytest.mark.parametrize("changes", [{"streams": "rgb"}, {"streams": "flow"}, {"model__stam_depth": 0}])
def test_one_stream_and_no_attention(
    tmp_path: Path, shards: str, changes: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint(tmp_path, shards, **changes)
    clip = open_shards(shards).test(1)[0]
    scored = visualize(str(tmp_path / "run"), clip.name, shards, str(tmp_path / "out"))
    assert (tmp_path / "out.mp4").stat().st_size > 1000 and (tmp_path / "out.png").exists()
    assert len(scored[0].scores) == (1 if "streams" in changes else 3)
    assert ("No attention to draw" in capsys.readouterr().out) == ("model__stam_depth" in changes)


def test_a_narrow_picture_shows_all_of_the_title_and_the_true_class() -> None:
    title = "OP01-R01-Synthetic-11167-12625-F000268-F000303: Divide/Pull Apart bread (test clip of split 1)"
    lines = _lines(title, 288)
    assert "".join(lines).replace(" ", "") == title.replace(" ", "") and len(lines) > 1
    assert all(cv2.getTextSize(line, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)[0][0] <= 284 for line in lines)
    assert "".join(_lines("x" * 90, 288)) == "x" * 90
    heading = "score of the true class, each window at its middle"
    assert cv2.getTextSize(heading, cv2.FONT_HERSHEY_SIMPLEX, 0.38, 1)[0][0] < 288 - 46
    scores = np.array([0.3, 0.25, 0.2, 0.15, 0.06, 0.04])
    bars = [_bars(scores, label, list("abcdef"), "rgb") for label in (5, 3)]
    for image in bars:
        green = (image == np.array(_TRUE)).all(axis=2).any(axis=1)
        assert green.any() and green.argmax() > image.shape[0] * 0.7  # the last bar
    none, half = np.zeros(0), np.array([0.5, 0.5])
    look = ScoredWindow(Window(0, 0, 0, 0, False), none, none, none, dict.fromkeys(("rgb", "flow", "fused"), half), {})
    plot = _plot([look], Clip("c", 0, 16, "", 0), 288, None)
    for name in ("rgb", "flow"):  # their legend is below the heading
        rows = (plot == np.array(_COLOURS[name])).all(axis=2).any(axis=1)
        assert rows.any() and rows.argmax() > 20


def test_a_clip_that_is_not_there(tmp_path: Path, shards: str) -> None:
    checkpoint(tmp_path, shards)
    name = open_shards(shards).test(1)[0].name
    with pytest.raises(UserError, match=f"is not in these shards; nearest: .*{name}"):
        visualize(str(tmp_path / "run"), name[:-1], shards, str(tmp_path / "out"))
    assert not (tmp_path / "out.mp4").exists()


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_attention_in_the_report(tmp_path: Path, shards: str) -> None:
    """Given shards and a checkpoint: cases with pictures, right ones and wrong ones, of the model's own scores."""
    checkpoint(tmp_path, shards)
    run = str(tmp_path / "run")
    torch.save(open_model(run, shards).model.state_dict(), _made(tmp_path / "run" / "final") / "model.pt")
    result = evaluate(run, shards)
    assert result["checkpoint"].endswith("final/model.pt")
    write_experiment(tmp_path / "search", 4)
    out = tmp_path / "report.html"
    numbers = write_report(str(tmp_path / "search"), str(out), run, None, shards)
    page = check_page(out, SECTIONS)
    found = numbers["attention_cases"]
    assert found["clips"] == found["clips_seen"] == result["clips"]
    assert found["cases"] and out.read_text().count("data:image/jpeg;base64,") == len(found["cases"])
    for case in found["cases"]:
        assert case["right"] == (case["label"] == case["predicted"]) == (case["group"] == "best")
        assert case["label_score"] <= case["predicted_score"] and case["clip"] in page.text
    assert numbers["evaluation"]["streams"][-1]["micro_accuracy"] == result["fused"]["micro_accuracy"]
    assert json.loads(out.with_suffix(".json").read_text())["attention_cases"] == found
