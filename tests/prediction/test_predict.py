"""`predict` from a video to files: content, agreement of the files, wrong input, true actions."""

from __future__ import annotations

import csv
import itertools
import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import tune_ego
from tests.dataset.test_irregular_videos import encoded, grey
from tests.evaluation.test_evaluate import checkpoint
from tune_ego.cli import app
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.synthetic import synthesize
from tune_ego.errors import UserError
from tune_ego.prediction.predict import PredictionSettings
from tune_ego.prediction.segments import SegmentSettings
from tune_ego.prediction.trained_model import load_model
from tune_ego.prediction.truth import read_truth, true_segments
from tune_ego.prediction.window_file import attention_peak, read_windows
from tune_ego.prediction.write import find_videos, predict_files

EASY = PredictionSettings(detection=SegmentSettings(threshold=0.0, smooth=0, merge=0, shortest=0.2, nms=0.3))
"""Settings with which even random weights detect something."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, shards: str) -> str:
    folder = tmp_path_factory.mktemp("trained")
    checkpoint(folder, shards)
    return str(folder / "run")


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Synthetic EGTEA with the videos of its two sessions."""
    root = tmp_path_factory.mktemp("sessions") / "egtea"
    synthesize(root, verbs=2, nouns=2, clips=40, seconds=0.8, size=(96, 72), sessions=True, seed=3)
    return root


def test_files_of_a_video_agree(run: str, sessions: Path, tmp_path: Path) -> None:
    video = sorted((sessions / "videos").iterdir())[1]
    predict_files(run, [str(video)], str(tmp_path), EASY, [], overlay=True)
    content = json.loads((tmp_path / f"{video.name}.actions.json").read_text())
    segments = content["segments"]
    assert segments and content["model"] == run and content["flow"] == "dis" and content["remarks"] == []
    with av.open(str(video)) as container:
        frames = container.streams.video[0].frames
    assert content["seconds"] == pytest.approx(frames / 24, abs=1e-3)
    for segment in segments:
        assert 0 <= segment["start"] < segment["end"] <= content["seconds"]
        assert f"{segment['verb']} {segment['noun']}" == segment["action"]
        assert len(segment["top"]) == 4  # of 4 classes
    with (tmp_path / f"{video.name}.actions.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["start"], row["action"]) for row in rows] == [(str(s["start"]), s["action"]) for s in segments]
    table = pq.read_table(tmp_path / f"{video.name}.windows.parquet")
    assert table["first_frame"].to_pylist()[:3] == [0, 8, 16]
    assert table["first_frame"].to_pylist()[-1] == frames - 16
    np.testing.assert_allclose(np.sum(table["fused"].to_pylist(), axis=1), 1, atol=1e-5)
    page = (tmp_path / f"{video.name}.html").read_text()
    assert re.findall(r"""(?:src|href)=["'](?!data:|#)""", page) == [] and page.count("<rect ") > len(segments)
    for segment in segments[:5]:
        assert segment["action"] in page
    with av.open(str(tmp_path / f"{video.name}.overlay.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == frames


def test_windows_that_are_read_are_those_that_were_written(run: str, sessions: Path, tmp_path: Path) -> None:
    video = str(sorted((sessions / "videos").iterdir())[1])
    predict_files(run, [video], str(tmp_path), EASY, [], overlay=False)
    name = f"{tmp_path}/{Path(video).name}.windows.parquet"
    windows = list(read_windows(name))
    table = pq.read_table(name)
    assert len(windows) == table.num_rows > 20
    for row, window in zip(table.to_pylist(), windows):
        assert row["action"] == window.main.argmax() and row["start"] == window.start / 24
        assert window.attention["rgb"].shape == (2, 1, 1) and window.thumbnail.startswith(b"\xff\xd8")
        assert (row["rgb_peak_x"], row["rgb_peak_y"]) == attention_peak(window.attention["rgb"], (48, 36), 32)


def test_the_peak_is_a_place_in_the_whole_image() -> None:
    cells = np.zeros((2, 4, 4), np.float32)
    cells[:, 1, 3] = 1
    assert attention_peak(cells, (320, 240), 224) == pytest.approx(((48 + 196) / 320, (8 + 84) / 240))


def test_python_and_command_give_the_same(run: str, sessions: Path, tmp_path: Path) -> None:
    video = sorted((sessions / "videos").iterdir())[1]
    result = CliRunner().invoke(app, ["predict", run, str(video), "--out", str(tmp_path), "--threshold", "0"])
    assert result.exit_code == 0, result.output
    segments = tune_ego.load_model(run, device="cpu").predict(
        video, PredictionSettings(detection=SegmentSettings(threshold=0))
    )
    written = json.loads((tmp_path / f"{video.name}.actions.json").read_text())["segments"]
    table = segments.to_arrow()
    assert table["action"].to_pylist() == [segment["action"] for segment in written] != []
    np.testing.assert_allclose(table["score"].to_pylist(), [segment["score"] for segment in written], atol=1e-3)
    assert table["top"].to_pylist()[0][0]["action"] == written[0]["top"][0]["action"]


def test_the_example_of_the_page_runs(run: str, sessions: Path, capsys: pytest.CaptureFixture[str]) -> None:
    video = str(sorted((sessions / "videos").iterdir())[1])
    page = (Path(__file__).parents[2] / "docs" / "predict.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(example.replace('"RUN"', repr(run)).replace('"VIDEO.mp4"', repr(video)), scope)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(scope["model"].predict(video)) > 0 and " s: " in lines[0]
    assert scope["table"].column_names == ["start", "end", "action", "score", "top"]


def test_whole_images_are_cropped_in_the_centre(run: str) -> None:
    model = load_model(run, "cpu")
    random = np.random.default_rng(0)
    rgb = random.integers(0, 256, (2, 16, 36, 48, 3)).astype(np.uint8)
    flow = random.integers(0, 256, (2, 16, 2, 36, 48)).astype(np.uint8)
    cropped = model(torch.from_numpy(rgb[:, :, 2:34, 8:40]), torch.from_numpy(flow[..., 2:34, 8:40]))
    assert torch.equal(model.predict_windows(rgb, flow).scores, cropped.scores)
    with pytest.raises(ValueError, match="expected images of 48 x 36 pixels"):
        model.predict_windows(rgb[:, :, 1:], flow)
    with pytest.raises(ValueError, match="flow is not given"):
        model.predict_windows(rgb)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: encoded([grey(n) for n in range(5)]), 5),
        (lambda: encoded([grey(n) for n in range(40)], rate=60), 16),
        (lambda: encoded([np.full((720, 1280, 3), 90, np.uint8)] * 20), 20),
        (lambda: encoded([grey(n) for n in range(24)], rotation=(180, True)), 24),
        (lambda: encoded([grey(n) for n in range(20)], [n / 24 + (n > 9) * 0.25 for n in range(20)]), 26),
    ],
    ids=["5 frames", "60 frames a second", "large", "turned", "variable rate"],
)
def test_videos_of_every_kind(make: object, expected: int, run: str, tmp_path: Path) -> None:
    (tmp_path / "v.mp4").write_bytes(make())  # type: ignore[operator]
    segments = load_model(run, "cpu").predict(tmp_path / "v.mp4")
    assert segments.frames == expected and np.isfinite(segments.scores_FK).all()


def test_wrong_input_is_one_line(run: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    twins = [str(tmp_path / folder / "v.mp4") for folder in ("a", "b")]
    for name in (str(tmp_path / "text.mp4"), *twins):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text("no video")
    for arguments, message in (
        ([run, str(tmp_path / "empty")], "the folder holds no video"),
        ([run, str(tmp_path / "text.mp4")], "cannot be opened as a video"),
        ([run, str(tmp_path / "absent.mp4")], "there is no such file"),
        ([run, *twins, "--out", str(tmp_path)], "two videos of this name"),
        ([run, "v.mp4", "--stride", "0"], "--stride 0: goes from 1 to 16"),
        ([run, "v.mp4", "--threshold", "7"], "--threshold 7.0: goes from 0 to 1"),
        ([run, str(tmp_path / "text.mp4"), "--flow-weights", "raft.pth"], "the model was trained with dis flow"),
        ([run, *twins], "2 of 2 videos could not be used"),
        ([run, "-", "--threshold", "0.5"], "the options of the detection are for files"),
        ([run, "-", "--overlay"], "are for files, not for a stream"),
        ([run, "-", "v.mp4"], "give it alone"),
        ([run], "needs videos, - or --camera"),
        ([run, "--camera", "97"], "there is no such camera"),
        ([str(tmp_path / "empty"), str(tmp_path / "text.mp4")], "no whole checkpoint"),
    ):
        result = CliRunner().invoke(app, ["predict", *arguments])
        assert isinstance(result.exception, UserError) and message in str(result.exception), result.output


def test_videos_in_a_folder(tmp_path: Path) -> None:
    for name in ("b.mp4", "a.MKV", "notes.txt", "below/c.mov", "b.mp4.overlay.mp4", "._b.mp4"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [Path(video).name for video in find_videos([str(tmp_path)])] == ["a.MKV", "b.mp4", "c.mov"]


def test_sessions_hold_their_clips(sessions: Path) -> None:
    """Frame n of the session's video is frame n of its clips, and nothing is detected twice."""
    names = {path.stem: path for path in (sessions / "cropped_clips").rglob("*.mp4")}
    truth = read_truth([str(f) for f in (sessions / "action_annotation").glob("*_split1.txt")], ["a", "b", "c", "d"])
    assert sum(map(len, truth.values())) == 40 and len(truth) == 2
    for session, segments in truth.items():
        with av.open(str(sessions / "videos" / f"{session}.mp4")) as container:
            images = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert segments[-1].end * 24 < len(images)
        gaps = [after.start - before.end for before, after in itertools.pairwise(segments)]
        assert all(0.99 <= gap <= 3.01 for gap in gaps)
        members = sorted(name for name in names if name.startswith(session))
        for name in members[:3]:
            first = int(name.rpartition("-F")[0].rpartition("-F")[2])
            with av.open(str(names[name])) as container:
                clip = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            for number in (0, len(clip) - 1):
                difference = np.abs(clip[number].astype(int) - images[first + number].astype(int)).mean()
                assert difference < 4


def test_scores_of_a_detection(run: str, sessions: Path, tmp_path: Path) -> None:
    videos = [str(path) for path in sorted((sessions / "videos").iterdir())]
    split = [str(path) for path in (sessions / "action_annotation").glob("*_split1.txt")]
    scores = predict_files(run, videos, str(tmp_path), EASY, split, overlay=False)
    assert scores is not None and json.loads((tmp_path / "detection.json").read_text()) == scores
    assert 0 <= scores["frame_accuracy"] <= 1 and set(scores["map"]) == {"0.1", "0.2", "0.3", "0.4", "0.5"}
    assert len(videos) == 2
    truth, model = read_truth(split, load_model(run).classes), load_model(run)
    right = total = 0
    for video in videos:
        scores_FK = model.predict(video, EASY).scores_FK
        for one in true_segments(truth, video):
            span = scores_FK[round(one.start * FPS) : round(one.end * FPS)]
            right, total = right + (model.classes[span.mean(axis=0).argmax()] == one.action), total + 1
    assert 0 < right < total and scores["clip_accuracy"] == pytest.approx(right / total)


def test_a_table_of_true_actions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("video, start ,end,action\nv,3.5,4,wash cup\nv, 1,2,cut onion\nw,0,1,cut onion\n")
    truth = read_truth([str(tmp_path / "t.csv")], ["cut onion", "wash cup"])
    assert {video: [segment.action for segment in segments] for video, segments in truth.items()} == {
        "v": ["cut onion", "wash cup"],
        "w": ["cut onion"],
    }
    for text, message in (
        ("video,start,end,action\nv,3,2,cut onion\n", r"t\.csv:2: start 3 and end 2"),
        ("video,start,end,action\nv,a,2,cut onion\n", r"t\.csv:2: start and end are seconds"),
        ("video,start,end,action\nv,1,2,fly\n", r"t\.csv:2: the model has no action 'fly'"),
        ("video,start,end,action\nv,1,inf,cut onion\n", r"t\.csv:2: start 1 and end inf"),
        ("something else\n", r"t\.csv:1: expected 'ClipName"),
    ):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            read_truth([str(tmp_path / "t.csv")], ["cut onion", "wash cup"])


@pytest.mark.parametrize("changes", [{"streams": "rgb"}, {"streams": "flow", "model__stam_depth": 0}])
def test_models_of_one_stream(changes: dict[str, object], shards: str, sessions: Path, tmp_path: Path) -> None:
    checkpoint(tmp_path, shards, **changes)
    video = sorted((sessions / "videos").iterdir())[1]
    predict_files(str(tmp_path / "run"), [str(video)], str(tmp_path), EASY, [], overlay=True)
    columns = pq.read_table(tmp_path / f"{video.name}.windows.parquet").column_names
    streams = {name for name in ("rgb", "flow", "fused") if name in columns}
    assert streams == {changes["streams"]} and ("flow_attention" in columns) is False
    assert (tmp_path / f"{video.name}.overlay.mp4").stat().st_size > 1000


def test_flow_weights_go_with_raft(run: str) -> None:
    model = load_model(run, "cpu")
    model.flow_method = "raft"
    with pytest.raises(UserError, match="give RAFT's weights"):
        model.predict("v.mp4")
