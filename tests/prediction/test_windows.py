"""Windows of a video: the bytes of the shards, places of the windows, views."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluation.test_evaluate import checkpoint
from tune_ego.dataset.flow import flow_method
from tune_ego.dataset.frame_stream import FrameStream
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import score_clips
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import View, Window, dense_starts, views
from tune_ego.prediction.predict import PredictionSettings, WindowSettings, predict_video
from tune_ego.prediction.scoring import WindowScores
from tune_ego.prediction.trained_model import load_model
from tune_ego.prediction.windows import crop_views, video_windows


def clip_file(egtea: Path, name: str) -> str:
    return str(next((egtea / "cropped_clips").rglob(f"{name}.mp4")))


def test_a_clip_s_video_gives_the_windows_of_its_shards(egtea: Path, shards: str) -> None:
    data = open_shards(shards)
    clips = [max(data.test(1), key=lambda clip: clip.frames), min(data.test(1), key=lambda clip: clip.frames)]
    assert clips[1].frames < 16 < clips[0].frames
    for clip in clips:
        with FrameStream(clip_file(egtea, clip.name)) as stream:
            images = [frame.image for frame in stream.frames(data.image_size)]
        windows = list(video_windows(images, flow_method("dis"), 8))
        assert [window.start for window in windows] == dense_starts(clip.frames)
        reader = WindowReader([clip], ("rgb", "flow"), data.image_size, 32)
        for chosen in (View(2, 8, False), View(1, 3, True)):
            expected = reader.read_batch([Window(0, window.start, *chosen) for window in windows])
            crops = [crop_views(window, [chosen], 32) for window in windows]
            assert (np.concatenate([rgb for rgb, _ in crops]) == expected["rgb"]).all()
            assert (np.concatenate([flow for _, flow in crops]) == expected["flow"]).all()


def test_scores_of_a_clip_s_video_are_those_of_evaluate(egtea: Path, shards: str, tmp_path: Path) -> None:
    trainer = checkpoint(tmp_path, shards, fusion_weight=0.3)
    data = open_shards(shards)
    clips = data.test(1)[:3]
    tested = score_clips(trainer.model, trainer.config, clips, data)[0].reduce(0.3)
    model = load_model(tmp_path / "run", "cpu")
    for place, clip in enumerate(clips):
        windows: list[WindowScores] = []
        segments = predict_video(model, clip_file(egtea, clip.name), PredictionSettings(), on_window=windows.append)
        assert segments.frames == clip.frames and segments.scores_FK.shape == (clip.frames, len(data.actions))
        for name in ("rgb", "flow", "fused"):
            mean = np.mean([window.scores[name] for window in windows], axis=0)
            np.testing.assert_allclose(mean, tested[name][place].numpy(), atol=1e-5)
        whole = segments.scores_FK.sum(axis=1)
        np.testing.assert_allclose(whole, np.ones(clip.frames), atol=1e-5)


def test_all_views_are_averaged(egtea: Path, shards: str, tmp_path: Path) -> None:
    checkpoint(tmp_path, shards)
    model = load_model(tmp_path / "run", "cpu")
    file = clip_file(egtea, open_shards(shards).test(1)[0].name)
    windows: list[WindowScores] = []
    settings = PredictionSettings(WindowSettings(stride=5, crops=3, flips=True))
    predict_video(model, file, settings, on_window=windows.append)
    with FrameStream(file) as stream:
        images = [frame.image for frame in stream.frames(model.image_size)]
    chosen = views(model.image_size, 32, 3, flips=True)
    assert chosen[0] == View(2, 8, False) and {view.left for view in chosen} == {0, 8, 16} and len(chosen) == 6
    for window, expected in zip(windows, video_windows(images, flow_method("dis"), 5), strict=True):
        rgb, flow = crop_views(expected, chosen, 32)
        prediction = model(torch.from_numpy(rgb), torch.from_numpy(flow))
        np.testing.assert_allclose(window.scores["rgb"], prediction.stream_scores["rgb"].mean(dim=0), atol=1e-5)
        centre = prediction.attention["flow"][0]
        np.testing.assert_allclose(window.attention["flow"], centre / centre.max(), atol=1e-5)


@pytest.mark.parametrize(("frames", "stride", "starts"), [(16, 8, [0]), (3, 8, [0]), (33, 16, [0, 16, 17])])
def test_windows_cover_a_video(frames: int, stride: int, starts: list[int]) -> None:
    images = [np.full((48, 64, 3), 7 * number, np.uint8) for number in range(frames)]
    windows = list(video_windows(images, flow_method("dis"), stride))
    assert [window.start for window in windows] == starts
    for window in windows:
        levels = np.round(window.rgb_THW3.mean(axis=(1, 2, 3)) / 7).tolist()
        assert levels == [min(window.start + t, frames - 1) for t in range(16)]


def test_a_video_without_frames_and_settings_out_of_range() -> None:
    with pytest.raises(UserError, match="holds no frame"):
        list(video_windows([], flow_method("dis"), 8))
    for settings in (WindowSettings(0), WindowSettings(17), WindowSettings(8, 2)):
        with pytest.raises(UserError, match=r"--(stride|crops) \d+: "):
            settings.check()
