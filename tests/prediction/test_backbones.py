"""Each backbone from a checkpoint to test, package and video; windows of 32 frames, and of every second frame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from tests.evaluation.test_evaluate import checkpoint
from tests.prediction.test_windows import clip_file
from tune_ego.config import WindowForm
from tune_ego.dataset.flow import flow_method
from tune_ego.dataset.frame_stream import FrameStream
from tune_ego.dataset.shards import open_shards
from tune_ego.evaluation.evaluate import evaluate, score_clips
from tune_ego.evaluation.visualize import visualize
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import View, Window, dense_starts
from tune_ego.prediction.package import package
from tune_ego.prediction.predict import PredictionSettings
from tune_ego.prediction.trained_model import load_model
from tune_ego.prediction.windows import crop_views, video_windows
from tune_ego.prediction.write import predict_files

LONG = {"data__window_frames": 32, "data__frame_step": 2}
CASES: dict[str, dict[str, Any]] = {
    "i3d": LONG,
    "s3d": {"streams": "flow"},
    "r2plus1d_18": {"streams": "rgb", "data__frame_step": 3},
    "mvit_v2_s": {"streams": "rgb", **LONG},
    "swin3d_t": {"streams": "rgb", "data__window_frames": 32},
}


@pytest.mark.parametrize(
    "name", ["s3d", *(pytest.param(name, marks=pytest.mark.slow) for name in CASES if name != "s3d")]
)
def test_a_model_is_tested_packaged_and_used(name: str, egtea: Path, shards: str, tmp_path: Path) -> None:
    """Scores of the test, of the exported program and of a video's windows are those of the model's own forward."""
    width = {"model__width": 0.05 if name == "i3d" else 1.0}
    trainer = checkpoint(tmp_path, shards, model__backbone=name, **width, **CASES[name])
    form, run = trainer.config.data.window, str(tmp_path / "run")
    data = open_shards(shards)
    clips = data.test(1)[:2]
    tested = score_clips(trainer.model, trainer.config, clips, data)[0].reduce(0.5)
    model = load_model(run, "cpu")
    reader = WindowReader(clips, trainer.config.stream_names, data.image_size, 32, form=form)
    for place, clip in enumerate(clips):
        starts = dense_starts(clip.frames, form.span)
        batch = reader.read_batch([Window(place, start, 2, 8, False) for start in starts])
        prediction = model(**{stream: torch.from_numpy(batch[stream]) for stream in model.streams})
        for stream in model.streams:
            np.testing.assert_allclose(tested[stream][place], prediction.stream_scores[stream].mean(dim=0), atol=1e-5)
    exports = name != "s3d"  # the export to ONNX takes long, and s3d is the case that is not slow
    target = package(run, str(tmp_path / "package"), onnx=exports)
    card = Path(target, "README.md").read_text()
    assert ("an I3D of width 0.05" if name == "i3d" else f"Each is {name} with") in card and f"- {name}\n" in card
    every = "every frame" if form.step == 1 else f"one in {form.step} frames"
    assert f"A window of {form.frames} frames goes in, {every} of a video" in card
    exported = torch.export.load(Path(target, "model.pt2")).module()
    tensors = [torch.from_numpy(np.repeat(batch[stream][:1], 3, axis=0)) for stream in model.streams]
    torch.testing.assert_close(exported(*tensors)[0][:1], prediction.scores[:1], atol=1e-4, rtol=0)
    video = clip_file(egtea, clips[1].name)
    if exports:
        session = onnxruntime.InferenceSession(str(Path(target, "model.onnx")), providers=["CPUExecutionProvider"])
        images = dict(zip(model.streams, (tensor.numpy() for tensor in tensors)))
        np.testing.assert_allclose(session.run(["scores"], images)[0][:1], prediction.scores[:1], atol=1e-4)
    segments = load_model(target, "cpu").predict(video)
    expected = prediction.scores.numpy()
    held = [[n for n, s in enumerate(starts) if s <= frame < s + form.span] for frame in range(clips[1].frames)]
    np.testing.assert_allclose(segments.scores_FK, [expected[inside].mean(axis=0) for inside in held], atol=1e-5)
    predict_files(target, [video], str(tmp_path / "out"), PredictionSettings(), [], overlay=True)
    assert (tmp_path / "out" / f"{Path(video).name}.overlay.mp4").stat().st_size > 1000


@pytest.mark.parametrize("form", [WindowForm(16, 2), WindowForm(32, 1), WindowForm(32, 3)], ids=str)
def test_windows_of_every_form_are_the_same_from_shards_and_video(form: WindowForm, egtea: Path, shards: str) -> None:
    data = open_shards(shards)
    for clip in (max(data.test(1), key=lambda clip: clip.frames), min(data.test(1), key=lambda clip: clip.frames)):
        with FrameStream(clip_file(egtea, clip.name)) as stream:
            images = [frame.image for frame in stream.frames(data.image_size)]
        windows = list(video_windows(images, flow_method("dis"), 8, form))
        assert [window.start for window in windows] == dense_starts(clip.frames, form.span)
        reader = WindowReader([clip], ("rgb", "flow"), data.image_size, 32, form=form)
        expected = reader.read_batch([Window(0, window.start, 2, 8, True) for window in windows])
        assert expected["rgb"].shape[1] == expected["gaze"].shape[1] == form.frames
        rgb, flow = zip(*(crop_views(window, [View(2, 8, True)], 32) for window in windows))
        assert (np.concatenate(rgb) == expected["rgb"]).all() and (np.concatenate(flow) == expected["flow"]).all()
        last = min(clip.frames - 1, windows[0].start + form.span - 1)
        alone = WindowReader([clip], ("rgb", "flow"), data.image_size, 32).read_batch([Window(0, last, 2, 8, True)])
        assert (expected["rgb"][0, -1] == alone["rgb"][0, 0]).all()
        assert (expected["gaze_valid"][0, -1] == alone["gaze_valid"][0, 0]).all()


def test_long_windows_are_trained_evaluated_and_drawn(shards: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, shards, **LONG)
    clip = max(open_shards(shards).test(1), key=lambda clip: clip.frames)
    scored = visualize(str(tmp_path / "run"), clip.name, shards, str(tmp_path / "picture"))
    assert scored[0].frames_THW3.shape[0] == 32 and scored[0].span == 63 and scored[0].attention["rgb"].shape[0] == 4
    assert (tmp_path / "picture.png").stat().st_size > 5000
    result = evaluate(str(tmp_path / "run"), shards)
    assert 0 <= result["fused"]["mean_class_accuracy"] <= 1 and result["attention"]["rgb"]["frames"] > 0
