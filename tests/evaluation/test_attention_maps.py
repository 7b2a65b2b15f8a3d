"""Looks at windows and the pictures of them, against numbers worked out by hand: made-up models, no shards."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.config import WindowForm
from tune_ego.dataset.shards import Clip
from tune_ego.evaluation import attention_maps as attention
from tune_ego.evaluation import visualize
from tune_ego.evaluation.attention_maps import ScoredWindow, main_score, panels, score_windows, validation_strip
from tune_ego.feed.batches import ClipBatch
from tune_ego.feed.sampling import Window, dense_starts
from tune_ego.model import StreamOutput

NONE = np.zeros(0)


def look(start: int = 0, gaze: tuple[float, float] = (0.5, 0.5), valid: bool = True, **more: Any) -> ScoredWindow:
    frames = np.full((16, 40, 40, 3), 90, np.uint8)
    made = ScoredWindow(Window(0, start, 0, 0, False), frames, np.tile(gaze, (16, 1)), np.full(16, valid), {}, {})
    return made._replace(**more)


def test_the_window_shown_for_each_frame_of_a_clip_of_35() -> None:
    """Windows start at 0, 8, 16 and 19; their middles are 7.5, 15.5, 23.5 and 26.5; of two as near, the first."""
    assert dense_starts(35) == [0, 8, 16, 19]
    scored = [look(start) for start in (0, 8, 16, 19)]
    shown = [visualize.window_at(scored, frame) for frame in range(35)]
    assert [found.window.start for found, _ in shown] == [0] * 12 + [8] * 8 + [16] * 6 + [19] * 9
    assert [place for _, place in shown] == [*range(12), *range(4, 12), *range(4, 10), *range(7, 16)]


@pytest.mark.parametrize(
    ("slices", "expected"),
    [
        (1, [0] * 16),
        (2, [0] * 8 + [1] * 8),
        (4, [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4),
    ],
)
def test_the_slice_of_the_map_for_each_frame(slices: int, expected: list[int]) -> None:
    maps = np.arange(slices, dtype=np.float32).reshape(slices, 1, 1)
    made = look(attention={"flow": maps})
    lights = [made.light("flow", frame) for frame in range(16)]
    assert [int(light[0, 0]) for light in lights if light is not None] == expected
    assert made.light("rgb", 0) is None


@pytest.mark.parametrize(
    ("x", "y", "valid", "drawn"),
    [
        (0.25, 0.75, True, True),
        (0.0, 0.0, True, True),
        (0.25, 0.75, False, False),
        (1.0, 0.5, True, False),
        (0.5, 1.0, True, False),
        (-0.01, 0.5, True, False),
        (0.5, -0.01, True, False),
        (np.nan, np.nan, False, False),
    ],
)
def test_gaze_is_drawn_inside_the_crop_alone(x: float, y: float, valid: bool, drawn: bool) -> None:
    assert look(gaze=(x, y), valid=valid).gaze(3) == ((x, y) if drawn else None)


def ring(image: np.ndarray) -> tuple[int, int]:
    """(row, column) of the middle of what is orange, the gaze's ring."""
    rows, columns = np.nonzero((image == np.array((230, 60, 20))).all(axis=2))
    return (int(rows.min() + rows.max()) // 2, int(columns.min() + columns.max()) // 2)


def test_panels_are_the_frame_and_the_streams_attention_with_the_gaze_on_all() -> None:
    """The gaze at x = 0.2, y = 0.7 of 100 pixels: column 20, row 70. RGB attends to the upper right, flow not at all
    in the first half and to the lower left in the second."""
    maps = {"rgb": np.zeros((2, 2, 2), np.float32), "flow": np.zeros((2, 2, 2), np.float32)}
    maps["rgb"][0, 0, 1] = maps["flow"][1, 1, 0] = 1
    made = look(gaze=(0.2, 0.7), attention=maps)
    shown = panels(made, 0, 100)
    assert list(shown) == ["frame", "rgb", "flow"]
    assert {picture.shape for picture in shown.values()} == {(100, 100, 3)}
    assert {ring(picture) for picture in shown.values()} == {(70, 20)}
    assert shown["frame"][5, 5].tolist() == [90, 90, 90]
    yellow = shown["rgb"][..., 0].astype(int) - shown["rgb"][..., 2]
    assert yellow[1, 95] > 50 > 0 > yellow[10, 10] and yellow[90, 90] < 0 and yellow[90, 10] < 0
    assert (shown["flow"][90, 10] == shown["flow"][10, 90]).all()
    yellow = panels(made, 15, 100)["flow"][..., 0].astype(int) - panels(made, 15, 100)["flow"][..., 2]
    assert yellow[95, 1] > 50 > 0 > yellow[10, 90]
    without = panels(made._replace(gaze_valid_T=np.zeros(16, bool)), 0, 100)
    assert (without["frame"] == 90).all()


class Reader:
    """Windows whose frame t is grey of value 10 x start + t; the gaze of frame t at (t / 16, start / 100)."""

    made: tuple[Any, ...] = ()

    def __init__(self, *arguments: Any, form: WindowForm) -> None:
        Reader.made = arguments
        assert form == (16, 1)

    def read_batch(self, windows: list[Window]) -> dict[str, np.ndarray]:
        starts, frames = np.array([window.start for window in windows]), np.arange(16)
        value = (10 * starts[:, None] + frames).astype(np.uint8)
        gaze = np.stack(np.broadcast_arrays(frames / 16, starts[:, None] / 100), axis=-1).astype(np.float32)
        return {
            "rgb": np.broadcast_to(value[:, :, None, None, None], (*value.shape, 4, 4, 3)).copy(),
            "flow": np.zeros((len(windows), 16, 2, 4, 4), np.uint8),
            "gaze": gaze,
            "gaze_valid": np.arange(16) % 2 == np.zeros((len(windows), 1)),
            "label": np.zeros(len(windows), np.int64),
            "clip": np.zeros(len(windows), np.int64),
            "present": np.ones(len(windows), bool),
        }


class Model(torch.nn.Module):
    """Class scores whose softmax is (3/4, 1/4) of RGB and (1/5, 4/5) of flow, and maps by the first frame's value."""

    def forward(self, clips: dict[str, torch.Tensor]) -> dict[str, StreamOutput]:
        assert not self.training and not torch.is_grad_enabled()
        value = (clips["rgb"][:, 0, 0, 0, 0] + 1) * 127.5  # 10 x the window's start
        count = len(value)
        maps = torch.zeros(count, 2, 1, 2)
        maps[:, 0, 0, 0] = value + 4
        maps[:, 1, 0, 1] = 2
        logits = {"rgb": torch.tensor([3.0, 1.0]).log(), "flow": torch.tensor([1.0, 4.0]).log()}
        outputs = {"rgb": StreamOutput(logits["rgb"].expand(count, 2), maps)}
        if self.both:
            outputs["flow"] = StreamOutput(logits["flow"].expand(count, 2), torch.zeros(count, 2, 1, 2))
        return outputs

    both = True


def opened(both: bool = True) -> Any:
    model = Model().train()
    model.both = both
    config = tiny_config(fusion_weight=0.3, data__crop=32)
    return SimpleNamespace(model=model, config=config, shards=SimpleNamespace(image_size=(48, 36), actions=["a", "b"]))


def test_a_look_holds_the_fused_scores_and_maps_whose_highest_value_is_1(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.3 x 3/4 + 0.7 x 1/5 = 0.365 and 0.3 x 1/4 + 0.7 x 4/5 = 0.635. Ten windows: two forward passes."""
    monkeypatch.setattr(attention, "WindowReader", Reader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    clips = [Clip("c", 1, 99, "", 0)]
    windows = [Window(0, start, 0, 0, False) for start in range(10)]
    scored = score_windows(opened(), clips, windows)
    assert Reader.made == (clips, ("rgb", "flow"), (48, 36), 32)
    assert [found.window for found in scored] == windows
    for start, found in enumerate(scored):
        assert list(found.scores) == ["rgb", "flow", "fused"] and main_score(found) == "fused"
        np.testing.assert_allclose(found.scores["rgb"], [0.75, 0.25], rtol=1e-6)
        np.testing.assert_allclose(found.scores["flow"], [0.2, 0.8], rtol=1e-6)
        np.testing.assert_allclose(found.scores["fused"], [0.365, 0.635], rtol=1e-6)
        np.testing.assert_allclose(found.attention["rgb"].ravel(), [1, 0, 0, 2 / (10 * start + 4)], rtol=1e-4)
        assert (found.attention["flow"] == 0).all() and found.attention["flow"].shape == (2, 1, 2)
        assert found.frames_THW3[:, 0, 0, 0].tolist() == [10 * start + t for t in range(16)]
        assert found.gaze_valid_T.tolist() == [True, False] * 8
        np.testing.assert_allclose(found.gaze_T2[3], [3 / 16, start / 100], rtol=1e-6)


def test_one_stream_has_nothing_to_fuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "WindowReader", Reader)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (found,) = score_windows(opened(both=False), [], [Window(0, 0, 0, 0, False)])
    assert list(found.scores) == ["rgb"] == [main_score(found)] and list(found.attention) == ["rgb"]


def strip_of(clips: int, present: int, rgb: bool = True, gaze: tuple[float, float] = (0.25, 0.75)) -> np.ndarray | None:
    frames = torch.zeros(clips, 16, 8, 8, 3, dtype=torch.uint8)
    frames[:, 8] = (40 + 20 * torch.arange(clips, dtype=torch.uint8))[:, None, None, None]
    maps = torch.zeros(clips, 2, 2, 2)
    maps[:, 1, 0, 1] = 5  # the middle frame, 8 of 16, is in the second slice
    points, valid = torch.full((clips, 16, 2), torch.nan), torch.zeros(clips, 16, dtype=torch.bool)
    points[:, 8], valid[:, 8] = torch.tensor(gaze), True
    label, here = torch.zeros(clips, dtype=torch.int64), torch.arange(clips) < present
    batch = ClipBatch(frames if rgb else None, None, points, valid, label, label, here)
    outputs = {"rgb": StreamOutput(torch.zeros(clips, 2), None), "flow": StreamOutput(torch.zeros(clips, 2), maps)}
    return validation_strip(batch, outputs)


def test_a_validation_strip_shows_the_middle_frame_above_its_attention() -> None:
    """Columns of 112 pixels, one a clip that is present; the gaze at (0.25, 0.75) of 112: column 28, row 84."""
    strip = strip_of(3, 2)
    assert strip is not None and strip.shape == (224, 224, 3)
    assert strip[4, 4].tolist() == [40] * 3 and strip[4, 116].tolist() == [60] * 3
    yellow = strip[112:, :112, 0].astype(int) - strip[112:, :112, 2]
    assert yellow[1, 108] > 50 > 0 > yellow[10, 10] and yellow[100, 104] < 0
    for top, left in ((0, 0), (112, 0), (0, 112), (112, 112)):
        assert ring(strip[top : top + 112, left : left + 112]) == (84, 28)


def test_a_validation_strip_holds_six_clips_at_most_and_grey_where_there_is_no_rgb() -> None:
    many, grey = strip_of(8, 8), strip_of(1, 1, rgb=False, gaze=(0.25, 1.0))
    assert many is not None and many.shape == (224, 6 * 112, 3)
    assert grey is not None and (grey[:112] == 128).all()  # the gaze is outside
    without = {"rgb": StreamOutput(torch.zeros(1, 2), None)}
    assert validation_strip(ClipBatch(None, None, *[torch.zeros(1)] * 5), without) is None


def test_the_highest_scores_are_shown_and_the_true_class_last_where_it_is_not_among_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The four highest of (0.1, 0.4, 0.05, 0.2, 0.15, 0.1) are classes 1, 3, 4 and 0."""
    written: list[str] = []
    monkeypatch.setattr(visualize, "_put", lambda image, text, *more: written.append(text))
    scores = np.array([0.1, 0.4, 0.05, 0.2, 0.15, 0.1])
    visualize._bars(scores, 3, list("abcdef"), "flow")
    assert written == ["flow scores", "b", "40.0 %", "d (true)", "20.0 %", "e", "15.0 %", "a", "10.0 %"]
    written.clear()
    visualize._bars(scores, 2, list("abcdef"), "rgb")
    assert written == ["rgb scores", "b", "40.0 %", "d", "20.0 %", "e", "15.0 %", "c (true)", "5.0 %"]


def test_the_plot_s_points_lie_at_the_windows_middles_and_scores() -> None:
    """288 pixels, 31 frames: frame 7.5 is at 46 + 226 x 7.5 / 30 = 102.5, frame 22.5 at 215.5; score 1 is at
    row 48, 0 at row 138, 0.5 at 93."""
    clip = Clip("c", 1, 31, "", 0)
    scores = [{"rgb": np.array([0.0, 1.0])}, {"rgb": np.array([0.5, 0.5])}]
    scored = [look(start, scores=score) for start, score in zip((0, 15), scores)]
    plot = visualize._plot(scored, clip, 288, 30)
    orange = (plot == np.array((213, 94, 0))).all(axis=2)
    assert orange[48, 102] and orange[93, 216] and not orange[:, 225:].any() and not orange[100:].any()
    assert (plot[60, 272] == 120).all() and (plot[60, 271] != 120).any()  # the frame shown now, 30, at the right end


@pytest.mark.parametrize(
    ("start", "frames", "middle"),
    [(0, 35, 7.5), (19, 35, 26.5), (0, 10, 4.5)],
)
def test_a_short_clip_s_middle_is_its_own(start: int, frames: int, middle: float) -> None:
    clip = Clip("c", 0, frames, "", 0)
    assert visualize._middle(look(start), clip, 0.25, lambda frame, score: (frame, score)) == (middle, 0.25)


def test_the_windows_of_a_clip_are_those_of_the_evaluation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Windows begin at 0, 8, 16 and 19 of 35; a crop of 32 from the middle of 48 x 36: 2 rows down, 8 columns right."""
    made: list[Window] = []

    def scored(model: Any, clips: list[Clip], windows: list[Window]) -> list[ScoredWindow]:
        made.extend(windows)
        half = np.array([0.5, 0.5])
        return [look(window.start, scores={"rgb": half}, attention={}) for window in windows]

    clip = Clip("c", 1, 35, "", 0)
    monkeypatch.setattr(visualize, "open_model", lambda *_: opened())
    monkeypatch.setattr(visualize, "as_clip", lambda *_: clip)
    monkeypatch.setattr(visualize, "find_record", lambda *_: {"split1": "test"})
    monkeypatch.setattr(visualize, "score_windows", scored)
    monkeypatch.setattr(visualize, "_video", lambda *_: b"video")
    visualize.visualize("run", "c", "shards", str(tmp_path / "out"))
    assert made == [Window(0, start, 2, 8, False) for start in (0, 8, 16, 19)]
    assert (tmp_path / "out.mp4").read_bytes() == b"video" and (tmp_path / "out.png").stat().st_size > 1000
