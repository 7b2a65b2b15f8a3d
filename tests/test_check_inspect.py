"""`prepare --check` and `inspect`, without Ray."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np
import pytest
import torch

from tune_ego.dataset.annotations import find_clips, find_gaze, read_annotations
from tune_ego.dataset.check import check
from tune_ego.dataset.flow import FlowMethod
from tune_ego.dataset.inspection import draw_clip, flow_colours, show_counts
from tune_ego.dataset.prepare import NO_USABLE_GAZE, Settings, plan, write_task
from tune_ego.dataset.shards import Problem, open_shards
from tune_ego.errors import UserError

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
    verdict = check(str(egtea), SETTINGS, str(tmp_path / "shards"))
    assert files_of(egtea) == before and not any(tmp_path.iterdir())
    named = [clip.name for clip in read_annotations(str(egtea)).clips]
    assert verdict.facts["frames"] == sum(name.last_frame - name.first_frame for name in named)
    assert (verdict.facts["clips usable"], verdict.facts["sizes"]) == (40, {"96x72": 40})
    assert verdict.problems == []
    assert "prepare would keep 40 clips and leave out 0" in capsys.readouterr().out


def test_the_estimated_size_is_that_of_the_shards(egtea: Path, shards: str) -> None:
    stored = sum(path.stat().st_size for path in (Path(shards) / "frames").rglob("*.parquet"))
    estimate = check(str(egtea), SETTINGS).estimate
    assert estimate is not None and estimate.core_seconds > 0
    assert estimate.bytes == pytest.approx(stored, rel=0.5)  # small files: the footers of the shards weigh in


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
    (folder / "cropped_clips" / "OP09-R09-Other-1-2-F000001-F000002.mp4").write_bytes(b"")
    session, gaze = next((name, Path(file.uri)) for name, file in find_gaze(str(folder)).items() if name in poor)
    gaze.write_text("".join(gaze.read_text().splitlines(keepends=True)[:60]))
    verdict = check(str(folder), SETTINGS)
    assert verdict.facts["videos without annotation"] == 1
    assert Problem(absent, "video", "no mp4 of this name", kept=False) in verdict.problems
    kinds = {(problem.clip, problem.stage) for problem in verdict.problems if problem.reason != NO_USABLE_GAZE}
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


def test_clips_that_prepare_would_find_without_gaze_are_named(folder: Path, tmp_path: Path) -> None:
    gaze = Path(sorted(find_gaze(str(folder)).values())[0].uri)
    lines = gaze.read_text().splitlines(keepends=True)
    gaze.write_text("".join(lines[: len(lines) * 3 // 4]))
    verdict = check(str(folder), SETTINGS)
    found = {problem for problem in verdict.problems if problem.reason == NO_USABLE_GAZE}
    tasks = plan(read_annotations(str(folder)), find_clips(str(folder)), find_gaze(str(folder)))
    problems = {problem for task in tasks for problem in write_task(task, str(tmp_path), SETTINGS).problems}
    assert found == problems and found
    assert verdict.facts["clips without gaze"] == len(found)


def test_doubled_clips_are_named(folder: Path) -> None:
    name, file = sorted(find_clips(str(folder)).items())[0]
    (folder / "cropped_clips" / "0").mkdir()
    (folder / "cropped_clips" / "0" / f"{name}.mp4").write_bytes(b"")
    (problem,) = check(str(folder), SETTINGS).problems
    assert problem == Problem(name, "annotation", f"2 mp4 have this name; {file.uri} counts", kept=True)


def test_the_estimate_takes_one_thread_and_a_limited_time(
    egtea: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    threads: list[int] = []
    pairs: list[int] = []

    def slow(frames: Sequence[np.ndarray]) -> np.ndarray:
        threads.append(torch.get_num_threads())
        pairs.append(len(frames) - 1)
        time.sleep(0.05)
        return np.zeros((len(frames) - 1, 36, 48, 2), np.float32)

    monkeypatch.setattr("tune_ego.dataset.flow.flow_method", lambda *_: FlowMethod(lambda frame: frame, slow, 1))
    monkeypatch.setattr("tune_ego.dataset.check._TRIED_SECONDS", 0.2)
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


def test_check_and_prepare_find_the_same(folder: Path, tmp_path: Path) -> None:
    annotations = read_annotations(str(folder))
    empty, cut = (Path(find_clips(str(folder))[name].uri) for name in sorted(find_clips(str(folder)))[:2])
    empty.write_bytes(b"")
    cut_in_the_middle(cut)
    found = [problem for problem in check(str(folder), SETTINGS).problems if not problem.kept]
    tasks = plan(annotations, find_clips(str(folder)), find_gaze(str(folder)))
    mine = [task for task in tasks if {empty.stem, cut.stem} & {clip.name.name for clip in task.clips}]
    results = [write_task(task, str(tmp_path / "out"), SETTINGS) for task in mine]
    lost = {problem.clip: problem.reason for result in results for problem in result.problems if not problem.kept}
    assert {problem.clip for problem in found} == lost.keys() == {empty.stem, cut.stem}
    kept = {record["clip"] for result in results for record in result.records}
    assert kept == {clip.name.name for task in mine for clip in task.clips} - lost.keys()
    assert "Invalid data" in lost[empty.stem]
    assert any(word in lost[cut.stem] for word in ("breaks off", "damaged", "decoded"))


def test_counts_are_those_of_the_annotations(shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    show_counts(shards)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    clips = read_annotations(str(Path(shards).parent / "egtea")).clips
    for split in (1, 2, 3):
        counts = [sum(clip.roles[split - 1] == role for clip in clips) for role in ("train", "test")]
        assert [str(split), *map(str, counts)] in lines
    for session in {clip.name.session for clip in clips}:
        count = sum(clip.name.session == session for clip in clips)
        assert any(line[:2] == [session, str(count)] for line in lines)
    info = open_shards(shards).info
    assert ["left", "out", "0"] in lines and any(f"{info['clips']}," in line for line in lines)


def test_the_picture_shows_frames_gaze_and_flow(shards: str, tmp_path: Path) -> None:
    record = next(row for row in open_shards(shards).table.to_pylist() if row["gaze_frames"] == row["frames"])
    draw_clip(shards, record["clip"], str(tmp_path / "clip.png"))
    image = np.asarray(cv2.imread(str(tmp_path / "clip.png"), cv2.IMREAD_COLOR_RGB))
    width, height = open_shards(shards).image_size
    assert image.shape[1] == 8 * (width + 6) + 6 and image.shape[0] > 3 * height
    top = image.shape[0] - 3 * (height + 6)
    frames = image[top : top + height]
    assert ((frames[..., 0] > 200) & (frames[..., 1] < 90) & (frames[..., 2] < 60)).any()  # the gaze point
    assert image[top + height + 6 : top + 2 * height + 6].std() > 5


def test_the_hue_of_flow_is_its_direction() -> None:
    field = np.zeros((1, 4, 2), np.float32)
    field[0, 1:] = [(8, 0), (0, 8), (-80, 0)]
    still, right, down, left = flow_colours(field)[0].tolist()
    assert still == [255, 255, 255]
    assert right == [255, 0, 0]
    assert (down[1], left) == (255, [0, 255, 255])


def test_unknown_and_left_out_clips_are_refused(shards: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="OP01-R01-Tea is not in these shards"):
        draw_clip(shards, "OP01-R01-Tea", str(tmp_path / "x.png"))
    known = open_shards(shards).table["clip"][0].as_py()
    with pytest.raises(UserError, match=f"is not in these shards; nearest: {known}"):
        draw_clip(shards, known[:-1], str(tmp_path / "x.png"))
    root = Path(shutil.copytree(shards, tmp_path / "shards"))
    info = json.loads((root / "dataset.json").read_text())
    info["problems"] = [{"clip": "OP01-R01-Tea", "stage": "video", "reason": "no mp4 of this name", "kept": False}]
    (root / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match="OP01-R01-Tea was left out: no mp4 of this name"):
        draw_clip(str(root), "OP01-R01-Tea", str(tmp_path / "x.png"))
    assert not (tmp_path / "x.png").exists()
