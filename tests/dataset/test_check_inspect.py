"""`prepare --check` and `inspect`, without Ray."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from tests.dataset.test_irregular_videos import encoded, grey
from tests.dataset.test_write_task import (
    MOVING,
    SESSION,
    SHORT,
    STILL,
    rows_of,
    still_frames,
    task_of,
    write_folder,
    write_shards,
    write_video,
)
from tune_ego.dataset.annotations import find_clips, find_gaze, read_annotations
from tune_ego.dataset.check import Estimate, _print_estimate, _size, check
from tune_ego.dataset.flow import FlowMethod, FlowName
from tune_ego.dataset.prepare import NO_USABLE_GAZE, Settings, plan_shards, write_task
from tune_ego.dataset.shards import Problem, open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.inspection import contact_sheet, draw_clip, draw_gaze, flow_colours, overlay, show_counts

SETTINGS = Settings((48, 36))


def cut_in_the_middle(clip: Path) -> None:
    """Half of the same video with its index at the front: it opens, and breaks off."""
    whole = clip.with_name("whole.mp4")
    with av.open(str(clip)) as source, av.open(str(whole), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                out.mux(packet)
    data = whole.read_bytes()
    clip.write_bytes(data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2])
    whole.unlink()


def files_of(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.fixture
def folder(egtea: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(egtea, tmp_path / "egtea"))


def test_a_whole_folder_is_ready(egtea: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = files_of(egtea)
    result = check(str(egtea), SETTINGS, str(tmp_path / "shards"))
    assert files_of(egtea) == before and not any(tmp_path.iterdir())
    named = [clip.name for clip in read_annotations(str(egtea)).clips]
    assert result.facts["frames"] == sum(name.last_frame - name.first_frame for name in named)
    assert (result.facts["clips usable"], result.facts["sizes"]) == (40, {"96x72": 40})
    assert result.problems == []
    assert "prepare would keep 40 clips and leave out 0" in capsys.readouterr().out


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """Three clips of 20, 10 and 3 frames in one session, with gaze at its frames 0 to 59 without 44."""
    return write_folder(tmp_path / "small")


FACTS = {
    "clips annotated": 3,
    "clips usable": 3,
    "frames": 33,
    "clips under 16 frames": 2,
    "videos without annotation": 0,
    "sizes": {"64x48": 3},
    "sessions": 1,
    "sessions with gaze": 1,
    "clips without gaze": 0,
}
LENGTH = Problem(SHORT, "length", "3 frames, its name says 2", kept=True)


@pytest.mark.parametrize(
    ("offset", "with_gaze", "problems"),
    [
        (0, 32, []),
        (-20, 23, []),  # the first clip starts 10 frames before the gaze
        (15, 24, [Problem(SHORT, "gaze", NO_USABLE_GAZE, kept=True)]),
        (
            40,
            10,
            [
                Problem(SESSION, "gaze", "only 30.3 % of its frames have gaze", kept=True),
                Problem(MOVING, "gaze", NO_USABLE_GAZE, kept=True),
                Problem(SHORT, "gaze", NO_USABLE_GAZE, kept=True),
            ],
        ),
    ],
)
def test_facts_of_a_small_folder(small: Path, offset: int, with_gaze: int, problems: list[Problem]) -> None:
    result = check(str(small), Settings((64, 48), frame_offset=offset))
    videos = (small / "cropped_clips").glob("*.mp4")
    without = sum(problem.reason == NO_USABLE_GAZE for problem in problems)
    assert result.facts == {
        **FACTS,
        "bytes of video": sum(path.stat().st_size for path in videos),
        "clips without gaze": without,
        "frames with gaze": with_gaze / 33,
    }
    assert sorted(result.problems) == sorted([LENGTH, *problems])


def test_a_session_without_a_gaze_file_is_named_once(small: Path) -> None:
    (small / "gaze_data" / f"{SESSION}.txt").unlink()
    result = check(str(small), Settings((64, 48)))
    assert result.problems == [LENGTH, Problem(SESSION, "gaze", "no gaze file of this session", kept=True)]
    names = ("sessions", "sessions with gaze", "clips without gaze", "frames with gaze")
    assert [result.facts[name] for name in names] == [1, 0, 3, 0]


def test_the_check_and_the_summary_name_clips_that_were_placed_by_time_or_turned(
    small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One clip of 20 session frames at 30 frames a second, and one of 3 that is stored upside down."""
    clips = small / "cropped_clips"
    (clips / f"{STILL}.mp4").write_bytes(encoded([grey(number) for number in range(25)], rate=30))
    (clips / f"{SHORT}.mp4").write_bytes(encoded([grey(number) for number in range(3)], rotation=(180, False)))
    expected = {(STILL, "time", "resampled from 30 to 24"), (SHORT, "rotation", "turned by")}
    result = check(str(small), Settings((64, 48)))
    found = {(clip, stage) for clip, stage, *_ in result.problems if stage in ("time", "rotation")}
    assert found == {(clip, stage) for clip, stage, _ in expected}
    shown = capsys.readouterr().out
    assert all(words in shown for *_, words in expected)
    out = write_shards(small, tmp_path / "out", Settings((64, 48)))
    info = open_shards(out).info
    assert (info["clips_placed_by_time"], info["clips_turned"]) == (1, 1)
    show_counts(out)
    shown = capsys.readouterr().out
    assert re.search(r"placed by their times +1\b", shown) and re.search(r"turned upright +1\b", shown)


def test_lost_gaze_samples_are_counted(small: Path) -> None:
    file = small / "gaze_data" / f"{SESSION}.txt"
    file.write_text(file.read_text().replace("\t10\tFix", "\t10x\tFix").replace("\t11\tFix", "\t11x\tFix"))
    result = check(str(small), Settings((64, 48)))
    assert result.problems == [LENGTH, Problem(SESSION, "gaze", "2 of its samples cannot be read", kept=True)]


def test_the_size_of_the_shards_is_estimated_from_clips_of_usual_length(small: Path, tmp_path: Path) -> None:
    """By length the clips have 3, 10 and 20 frames; a quarter, half and three quarters of the way: 3, 10 and 10."""
    estimate = check(str(small), Settings((64, 48))).estimate
    write_task(task_of(small, [SHORT, MOVING]), str(tmp_path), Settings((64, 48)))
    short, moving = (
        sum(len(row["rgb"]) + len(row["flow"]) for row in rows_of(tmp_path, clip)) for clip in (SHORT, MOVING)
    )
    assert estimate is not None and estimate.core_seconds > 0
    assert estimate.bytes == pytest.approx((short + 2 * moving) / 23 * 33)


@pytest.mark.parametrize(
    ("flow_name", "gpu", "shown"),
    [
        ("dis", False, ["on 4 CPU cores, flow dis", "0:30:00", "2.5 GB"]),
        ("tvl1", True, ["on a GPU, flow tvl1", "2:00:00"]),
    ],
)
def test_time_is_that_of_all_cores_or_of_one_gpu(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flow_name: FlowName,
    gpu: bool,
    shown: list[str],
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {1, 3, 5, 7})
    monkeypatch.setattr("tune_ego.dataset.flow.runs_on_gpu", lambda name: gpu)
    _print_estimate(Estimate(7200.0, 2.5e9), Settings(flow=flow_name), None)
    printed = capsys.readouterr().out
    assert all(text in printed for text in shown)


@pytest.mark.parametrize(
    ("count", "text"), [(1e9, "1.0 GB"), (999e6, "999.0 MB"), (2.26e12, "2,260.0 GB"), (0, "0.0 MB")]
)
def test_sizes_are_decimal(count: float, text: str) -> None:
    assert _size(count) == text


def test_what_is_missing_and_odd_is_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos = {name: Path(file.uri) for name, file in find_clips(str(folder)).items()}
    absent, other, poor = (sorted(videos)[place] for place in (0, 1, 2))
    named = {
        clip.name.name: clip.name.last_frame - clip.name.first_frame for clip in read_annotations(str(folder)).clips
    }
    longest = max(sorted(videos)[2:], key=named.__getitem__)
    assert named[longest] > named[other]
    videos[absent].unlink()
    shutil.copy(videos[longest], videos[other])
    for frames in ("F000001-F000002", "F000003-F000004"):
        (folder / "cropped_clips" / f"OP09-R09-Other-1-2-{frames}.mp4").write_bytes(b"")
    session, gaze = next((name, Path(file.uri)) for name, file in find_gaze(str(folder)).items() if name in poor)
    gaze.write_text("".join(gaze.read_text().splitlines(keepends=True)[:60]))
    result = check(str(folder), SETTINGS)
    assert result.facts["videos without annotation"] == 2
    assert Problem(absent, "video", "no mp4 of this name", kept=False) in result.problems
    kinds = {(problem.clip, problem.stage) for problem in result.problems if problem.reason != NO_USABLE_GAZE}
    assert kinds == {(absent, "video"), (other, "length"), (session, "gaze")}
    assert "leave out 1" in (printed := capsys.readouterr().out) and absent in printed


def test_broken_gaze_files_are_refused_after_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = (Path(file.uri) for _, file in sorted(find_gaze(str(folder)).items())[:2])
    first.write_bytes(b"")
    second.write_bytes(second.read_bytes() + bytes(4 << 20))
    absent = Path(next(iter(find_clips(str(folder)).values())).uri)
    absent.unlink()
    with pytest.raises(UserError, match=rf"2 gaze files cannot be used, first .*{first.name}"):
        check(str(folder), SETTINGS)
    printed = "".join(capsys.readouterr().out.split())  # long paths fold, anywhere
    assert all(text in printed for text in (first.stem, second.stem, "NULbytes", absent.stem, "clipsusable"))
    assert "Ready" not in printed


def test_doubled_clips_are_named(folder: Path) -> None:
    name, file = sorted(find_clips(str(folder)).items())[0]
    (folder / "cropped_clips" / "0").mkdir()
    (folder / "cropped_clips" / "0" / f"{name}.mp4").write_bytes(b"")
    (problem,) = check(str(folder), SETTINGS).problems
    assert problem == Problem(name, "annotation", f"2 mp4 have this name; {file.uri} is used", kept=True)


def test_the_estimate_takes_one_thread_and_a_limited_time(
    egtea: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.set_num_threads(2)
    threads: list[int] = []
    pairs: list[int] = []

    def slow(frames: Sequence[np.ndarray]) -> np.ndarray:
        threads.append(torch.get_num_threads())
        pairs.append(len(frames) - 1)
        time.sleep(0.05)
        return np.zeros((len(frames) - 1, 36, 48, 2), np.float32)

    monkeypatch.setattr("tune_ego.dataset.flow.flow_method", lambda *_: FlowMethod(lambda frame: frame, slow, 1))
    monkeypatch.setattr("tune_ego.dataset.check._SAMPLED_SECONDS", 0.2)
    monkeypatch.setattr("tune_ego.dataset.flow.runs_on_gpu", lambda name: True)
    estimate = check(str(egtea), Settings((48, 36), "tvl1")).estimate
    assert set(threads) == {1} and torch.get_num_threads() == 2
    assert sum(pairs) < 12
    assert estimate is not None and estimate.core_seconds > 0.05 * 40 * 10
    assert "at most, on a GPU, flow tvl1" in capsys.readouterr().out


def test_what_prepare_would_refuse_is_refused(folder: Path, tmp_path: Path) -> None:
    names = sorted(find_clips(str(folder)))[:3]
    absent, empty, cut = (Path(find_clips(str(folder))[name].uri) for name in names)
    absent.unlink()
    empty.write_bytes(b"")
    cut_in_the_middle(cut)
    with pytest.raises(UserError, match="3 of 40 clips cannot be used"):
        check(str(folder), SETTINGS)


def test_clips_most_of_which_are_not_as_long_as_named_are_refused_after_the_table(
    small: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of three; with one of them the folder is ready."""
    write_video(small / "cropped_clips" / f"{MOVING}.mp4", still_frames(15))
    check(str(small), Settings((64, 48)))
    assert "Ready: prepare would keep 3 clips" in capsys.readouterr().out
    write_video(small / "cropped_clips" / f"{STILL}.mp4", still_frames(30))
    with pytest.raises(UserError, match=f"{small}: 2 of 3 clips are not as long as their names say, first {MOVING}"):
        check(str(small), Settings((64, 48)))
    printed = capsys.readouterr().out
    assert "30 frames, its name says 20" in printed and "Ready" not in printed
    check(str(small), Settings((64, 48)), allow_missing=True)
    assert "Ready: prepare would keep 3 clips" in capsys.readouterr().out


def test_check_and_prepare_find_the_same(folder: Path, tmp_path: Path) -> None:
    annotations = read_annotations(str(folder))
    empty, cut = (Path(find_clips(str(folder))[name].uri) for name in sorted(find_clips(str(folder)))[:2])
    empty.write_bytes(b"")
    cut_in_the_middle(cut)
    found = [problem for problem in check(str(folder), SETTINGS).problems if not problem.kept]
    tasks = plan_shards(annotations, find_clips(str(folder)), find_gaze(str(folder)))
    mine = [task for task in tasks if {empty.stem, cut.stem} & {clip.name.name for clip in task.clips}]
    results = [write_task(task, str(tmp_path / "out"), SETTINGS) for task in mine]
    lost = {problem.clip: problem.reason for result in results for problem in result.problems if not problem.kept}
    assert {problem.clip for problem in found} == lost.keys() == {empty.stem, cut.stem}
    kept = {record["clip"] for result in results for record in result.records}
    assert kept == {clip.name.name for task in mine for clip in task.clips} - lost.keys()
    assert "Invalid data" in lost[empty.stem]
    assert any(word in lost[cut.stem] for word in ("breaks off", "damaged", "decoded"))


def test_counts_of_a_small_data_set(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three clips train in splits 1 and 2; in split 3 one is tested and two are in neither."""
    data = write_shards(small, tmp_path / "shards")
    capsys.readouterr()
    show_counts(data)
    lines = [" ".join(re.findall(r"[^\s│┃|]+", line)) for line in capsys.readouterr().out.splitlines()]
    expected = ["clips, frames 3, 33", "images, flow 64 x 48, dis", "left out 0", "without gaze 0"]
    expected += [
        "under 16 frames 2",
        "not as long as named 1",
        "1 3 0",
        "2 3 0",
        "3 0 1",
        "Classes (4)",
        "Sessions (1)",
    ]
    expected += ["action1 1 10 90.0 %", "action2 1 20 100.0 %", "action3 1 3 100.0 %", "action4 0 0 -"]
    expected += [f"{SESSION} 3 33 97.0 %"]
    # One session, and so one fold of sessions; actions 1, 2, 3 are dealt out to folds 0 + 3, 1 + 6 and 2 + 9.
    expected += [f"{fold} {int(fold in (1, 3, 7))} {3 * (fold == 0)}" for fold in range(10)]
    assert [line for line in expected if line not in lines] == []


def orange_centres(image: np.ndarray) -> list[tuple[float, float] | None]:
    """The middle of the gaze circle in each column of a sheet's row of pictures, [48, 8 x 70 + 6]; None without one."""
    points: list[tuple[float, float] | None] = []
    for column in range(8):
        part = image[:, 6 + 70 * column : 70 + 70 * column].astype(int)
        y, x = np.nonzero((part[..., 0] > 190) & (part[..., 1] < 110) & (part[..., 2] < 90))
        points.append((x.mean(), y.mean()) if len(x) else None)
    return points


def test_the_picture_shows_frames_gaze_and_flow(small: Path, tmp_path: Path) -> None:
    """Eight of ten frames, 0, 1, 3, 4, 5, 6, 8, 9: session frames from 40 on, whose gaze is (k / 2, k / 4) pixels.

    Frame 4 has no gaze. Below a title and the columns' labels of 22 pixels are rows of 48 pixels, 6 apart.
    """
    draw_clip(write_shards(small, tmp_path / "shards"), MOVING, str(tmp_path / "clip.png"))
    image = np.asarray(cv2.imread(str(tmp_path / "clip.png"), cv2.IMREAD_COLOR_RGB))
    assert image.shape == (22 + 22 + 3 * (48 + 6), 8 * (64 + 6) + 6, 3)
    frames, moved, light = (image[44 + 54 * row : 92 + 54 * row] for row in range(3))
    for pictures in (frames, light):
        for place, point in zip((0, 1, 3, 4, 5, 6, 8, 9), orange_centres(pictures)):
            if place == 4:
                assert point is None
            else:
                assert point == pytest.approx(((40 + place) / 2, (40 + place) / 4), abs=1)
    # The motion is (3, -2) pixels: hue 326 degrees, at 3.6 of 8 pixels' full colour.
    for column in range(8):
        part = moved[8:40, 14 + 70 * column : 62 + 70 * column]
        assert np.median(part.reshape(-1, 3), axis=0) == pytest.approx((255, 140, 204), abs=12)


def test_the_light_is_that_of_the_frame_s_half_window(small: Path, tmp_path: Path) -> None:
    """An offset of -18 leaves the first 8 frames of the first clip without gaze: light from frame 8 on."""
    data = write_shards(small, tmp_path / "shards", Settings((64, 48), frame_offset=-18))
    light = contact_sheet(open_shards(data), STILL)[152:200]
    for column, frame in enumerate((0, 3, 5, 8, 11, 14, 16, 19)):
        part = light[24:, 6 + 70 * column : 70 + 70 * column].astype(int)
        grey = (part.max(axis=-1) == part.min(axis=-1)).all()
        assert grey == (frame < 8)


def test_light_lies_where_its_cell_stands_for() -> None:
    """Cell (2, 5) of 7 x 7 is row 20 and column 50 of 70; half way to the next cells it has half its light.

    0.45 times the grey 100, and 0.55 times viridis' yellow (253, 231, 37) or violet (68, 1, 84).
    """
    frame = np.full((70, 70, 3), 100, np.uint8)
    light = np.zeros((7, 7), np.float32)
    light[2, 5] = 1
    image = overlay(frame, light)
    np.testing.assert_allclose(image[20, 50], (184.2, 172.1, 65.4), atol=2)
    for y, x in ((50, 20), (30, 50), (20, 60), (10, 50), (20, 40), (0, 0), (69, 69)):
        np.testing.assert_allclose(image[y, x], (82.4, 45.6, 91.2), atol=1)
    half = (45 + 0.55 * np.array([33, 145, 140])).tolist()  # viridis at 127 of 255
    for y, x in ((20, 55), (20, 45), (15, 50), (25, 50)):
        np.testing.assert_allclose(image[y, x], half, atol=3)
    red = np.zeros((70, 70, 3), np.uint8)
    red[..., 0] = 200
    np.testing.assert_array_equal(overlay(red, None), np.full((70, 70, 3), 60))  # 0.299 of it


def test_gaze_is_drawn_at_its_place() -> None:
    image = np.full((50, 100, 3), 128, np.uint8)
    draw_gaze(image, 0.75, 0.4)
    y, x = np.nonzero((image != 128).any(axis=-1))
    assert (x.mean(), y.mean()) == pytest.approx((75, 20), abs=0.1)
    assert (x.min(), x.max(), y.min(), y.max()) == pytest.approx((66, 84, 11, 29), abs=1)
    assert image[20, 75].tolist() == [128, 128, 128] and image[20, 79].tolist() == [230, 60, 20]


def test_the_hue_of_flow_is_its_direction() -> None:
    """Red to the right, yellow-green downwards, cyan to the left, violet upwards; paler below 8 pixels."""
    field = np.zeros((1, 6, 2), np.float32)
    field[0, 1:] = [(8, 0), (0, 8), (-80, 0), (0, -8), (4, 0)]
    colours = [(255, 255, 255), (255, 0, 0), (128, 255, 0), (0, 255, 255), (128, 0, 255), (255, 128, 128)]
    np.testing.assert_allclose(flow_colours(field)[0], colours, atol=1)


def test_unknown_and_left_out_clips_are_refused(small: Path, tmp_path: Path) -> None:
    data = write_shards(small, tmp_path / "shards")
    with pytest.raises(UserError, match=r"shards: OP09 is not in these shards; nearest: OP01-"):
        draw_clip(data, "OP09", str(tmp_path / "x.png"))
    with pytest.raises(UserError, match=f"is not in these shards; nearest: {MOVING}$"):
        draw_clip(data, MOVING.lower()[:-1], str(tmp_path / "x.png"))
    file = tmp_path / "shards" / "dataset.json"
    info = json.loads(file.read_text())
    info["problems"] = [{"clip": "OP01-R01-Tea", "stage": "video", "reason": "no mp4 of this name", "kept": False}]
    file.write_text(json.dumps(info))
    open_shards.cache_clear()
    with pytest.raises(UserError, match=r"OP01-R01-Tea was left out: no mp4 of this name$"):
        draw_clip(data, "OP01-R01-Tea", str(tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()
