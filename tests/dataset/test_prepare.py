from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import COMMAND
from tests.dataset.test_write_task import (
    MOVING,
    SESSION,
    SETTINGS,
    SHORT,
    STILL,
    still_frames,
    write_folder,
    write_video,
)
from tune_ego.bench.resume import descendants
from tune_ego.dataset import video
from tune_ego.dataset.annotations import find_clips, find_gaze, read_annotations
from tune_ego.dataset.gaze import read_gaze
from tune_ego.dataset.prepare import _block_count, prepare
from tune_ego.dataset.shards import open_shards, read_clip
from tune_ego.dataset.synthetic import synthesize
from tune_ego.errors import UserError


def copy(egtea: Path, to: Path) -> Path:
    shutil.copytree(egtea, to)
    return to


def test_shards_hold_every_frame_label_and_gaze_point(egtea: Path, shards: str) -> None:
    annotations = read_annotations(egtea)
    table = {row["clip"]: row for row in open_shards(shards).table.to_pylist()}
    assert table.keys() == {clip.name.name for clip in annotations.clips}
    for clip in annotations.clips:
        name, row = clip.name, table[clip.name.name]
        assert row["frames"] == name.last_frame - name.first_frame
        assert (row["action"], row["verb"], row["nouns"]) == (
            clip.action - 1,
            clip.verb - 1,
            [n - 1 for n in clip.nouns],
        )
        assert (row["split1"], row["split2"], row["split3"]) == clip.roles
        assert (row["session"], row["subject"]) == (name.session, name.subject)
        file = pq.ParquetFile(f"{shards}/{row['shard']}")
        groups = range(row["row_group"], row["row_group"] + -(-row["frames"] // 16))
        frames = file.read_row_groups(groups).to_pylist()
        assert [frame["frame"] for frame in frames] == list(range(row["frames"]))
        assert {frame["clip"] for frame in frames} == {name.name}
        gaze = read_gaze(find_gaze(egtea)[name.session].uri).frames(name.first_frame, row["frames"])
        assert [frame["gaze_valid"] for frame in frames] == gaze.valid.tolist()
        assert row["gaze_frames"] == gaze.valid.sum()
        assert [frame["gaze_event"] for frame in frames] == gaze.event.tolist()
        for column, values in (("gaze_x", gaze.x), ("gaze_y", gaze.y)):
            expected = [value if valid else None for value, valid in zip(values.tolist(), gaze.valid)]
            assert [frame[column] for frame in frames] == expected


def test_shards_hold_the_video_and_its_flow(egtea: Path, shards: str) -> None:
    """Every image to the byte: the frame, and the motion from it to the next one; the last motion is repeated."""
    data = open_shards(shards)
    matcher = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    rows = data.table.to_pylist()
    for row in rows[::4]:
        images = list(video.decode(find_clips(egtea)[row["clip"]].uri, (48, 36)))
        table = read_clip(data, row)
        assert table["rgb"].to_pylist() == [jpeg(image) for image in images]
        grey = [cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in images]
        fields = [matcher.calc(before, after, None) for before, after in pairwise(grey)]
        levels = [np.rint((np.clip(field, -20, 20) + 20) * (255 / 40)).astype(np.uint8) for field in fields]
        stored = table["flow"].to_pylist()
        assert [*stored[:-1]] == [jpeg(np.vstack([level[..., 0], level[..., 1]])) for level in levels]
        assert stored[-1] == stored[-2]
        assert len({*stored}) > len(stored) / 2


def jpeg(image: np.ndarray) -> bytes:
    return cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes()


def test_the_counts_are_those_of_the_clips(shards: str) -> None:
    data = open_shards(shards)
    rows, info = data.table.to_pylist(), data.info
    assert {name: value for name, value in info.items() if name.startswith("clips") or name.endswith("repeated")} == {
        "clips": 40,
        "clips_left_out": 0,
        "clips_without_gaze": 0,
        "clips_shorter_than_a_window": sum(row["frames"] < 16 for row in rows),
        "clips_of_another_length": 0,
        "clips_placed_by_time": 0,
        "clips_turned": 0,
        "clips_kept_damaged": 0,
        "flow_fields_repeated": 40,
    }
    assert info["clips_shorter_than_a_window"] > 0
    assert info["frames"] == sum(row["frames"] for row in rows)
    assert (info["actions"], info["verbs"], info["nouns"]) == (
        ["Slide red_disc", "Slide blue_square", "Lift red_disc", "Lift blue_square"],
        ["Slide", "Lift"],
        ["red_disc", "blue_square"],
    )
    assert data.verbs_and_nouns() == ([0, 0, 1, 1], [0, 1, 0, 1])


def test_splits_and_folds_choose_whole_shards(shards: str) -> None:
    columns = ["split1", "split2", "split3", "stratified_fold", "session_fold"]
    seen: dict[str, tuple[object, ...]] = {}
    for row in open_shards(shards).table.to_pylist():
        key = tuple(row[column] for column in columns)
        assert seen.setdefault(row["shard"], key) == key


def test_a_second_run_changes_nothing_and_a_killed_one_goes_on(tmp_path: Path, made: list[str]) -> None:
    root, out = write_folder(tmp_path / "egtea"), tmp_path / "out"
    prepare(str(root), str(out), SETTINGS)
    files = {path: path.read_bytes() for path in sorted(out.rglob("*.parquet"))}
    times = {path: path.stat().st_mtime_ns for path in files if "frames" in str(path)}
    assert len(times) == 3
    victim = sorted(times)[1]
    for path in (out / "dataset.json", victim):
        path.unlink()
    with pytest.raises(UserError, match="no finished data set"):
        open_shards(str(out))
    made.clear()
    prepare(str(root), str(out), SETTINGS)
    assert made == [str(victim.relative_to(out))]
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.parquet"))} == files
    assert all(path.stat().st_mtime_ns == times[path] for path in times.keys() - {victim})


def test_the_longest_shards_are_made_first(tmp_path: Path, made: list[str]) -> None:
    """The clips' names say 20, 10 and 2 frames; their stratified folds are 7, 3 and 1."""
    prepare(str(write_folder(tmp_path / "egtea")), str(tmp_path / "out"), SETTINGS)
    assert [re.findall(r"stratified_fold=(\d)", shard) for shard in made] == [["7"], ["3"], ["1"]]


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "no mp4"), (b"", "is empty"), (b"nonsense" * 99, "Invalid data")]
)
def test_unusable_clips_over_the_threshold_end_the_run(
    egtea: Path, tmp_path: Path, content: bytes | None, reason: str
) -> None:
    root = copy(egtea, tmp_path / "egtea")
    for path in [Path(file.uri) for file in sorted(find_clips(root).values())[:3]]:
        path.unlink()
        if content is not None:
            path.write_bytes(content)
    with pytest.raises(UserError, match=f"3 of 40 clips cannot be used.*{reason}.*--allow-missing"):
        prepare(str(root), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_missing_clips_are_counted_where_allowed(tmp_path: Path, made: list[str]) -> None:
    root = write_folder(tmp_path / "egtea")
    (root / "cropped_clips" / f"{MOVING}.mp4").unlink()
    (root / "gaze_data" / f"{SESSION}.txt").unlink()
    info = prepare(str(root), str(tmp_path / "out"), SETTINGS, allow_missing=True)
    no_gaze = "no gaze file of its session"
    assert info["problems"] == [
        {"clip": MOVING, "stage": "video", "reason": "no mp4 of this name", "kept": False},
        {"clip": SHORT, "stage": "gaze", "reason": no_gaze, "kept": True},
        {"clip": SHORT, "stage": "length", "reason": "3 frames, its name says 2", "kept": True},
        {"clip": STILL, "stage": "gaze", "reason": no_gaze, "kept": True},
    ]
    assert pq.read_table(tmp_path / "out" / "problems.parquet").to_pylist() == info["problems"]
    assert [info[name] for name in ("clips", "frames", "clips_left_out", "clips_without_gaze")] == [2, 23, 1, 2]
    rows = {row["clip"]: row["frames"] for row in open_shards(str(tmp_path / "out")).table.to_pylist()}
    assert rows == {STILL: 20, SHORT: 3}


def test_clips_most_of_which_are_not_as_long_as_named_end_the_run(tmp_path: Path, made: list[str]) -> None:
    """Two of three; with one of them the data set is finished."""
    root, out = write_folder(tmp_path / "egtea"), tmp_path / "out"
    write_video(root / "cropped_clips" / f"{MOVING}.mp4", still_frames(15))
    prepare(str(root), str(out), SETTINGS)
    write_video(root / "cropped_clips" / f"{STILL}.mp4", still_frames(30))
    (out / "problems.parquet").unlink()
    message = f"{out}: 2 of 3 clips are not as long as their names say, first {MOVING}: 15 frames, its name says 10.*"
    with pytest.raises(UserError, match=f"{message}--allow-missing; full list: {out}/problems.parquet"):
        prepare(str(root), str(out), SETTINGS)
    problems = pq.read_table(out / "problems.parquet").to_pylist()
    assert [row["clip"] for row in problems if row["stage"] == "length"] == [MOVING, SHORT, STILL]
    with pytest.raises(UserError, match="no finished data set"):
        open_shards(str(out))
    info = prepare(str(root), str(out), SETTINGS, allow_missing=True)
    assert (info["clips"], info["clips_of_another_length"]) == (3, 3)


def test_a_gaze_file_of_neither_layout_ends_the_run(egtea: Path, tmp_path: Path) -> None:
    root = copy(egtea, tmp_path / "egtea")
    path = Path(next(iter(find_gaze(root).values())).uri)
    path.write_text("Time\tX\tY\n1\t2\t3\n")
    with pytest.raises(UserError, match=rf"{path.name}: neither gaze layout"):
        prepare(str(root), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_shards_of_another_schema_version_are_refused(shards: str, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    path = tmp_path / "shards" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 99}))
    with pytest.raises(UserError, match="schema version 99"):
        open_shards(str(tmp_path / "shards"))


def test_a_foreign_folder_is_not_written_into(egtea: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        prepare(str(egtea), str(tmp_path))


def watch(command: list[str], out: Path) -> list[tuple[int, int]]:
    """(bytes of the shards in `out`, bytes that a command and its descendants hold) each half second.

    Memory counts as proportional set size.
    """
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    seen = []
    try:
        while process.poll() is None:
            seen.append((made_bytes(out), sum(proportional_set_size(pid) for pid in descendants(process.pid))))
            time.sleep(0.5)
    finally:
        process.kill()
    assert process.returncode == 0
    return seen


def made_bytes(out: Path) -> int:
    return sum(path.stat().st_size for path in out.rglob("part-*.parquet"))


def proportional_set_size(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1000 for line in lines if line.startswith("Pss:"))


def test_small_shards_share_tasks_and_every_job_has_one() -> None:
    small = [40, 50, 60] * 100  # 15,000 frames
    assert _block_count(small, 2) == 30
    assert _block_count(small, 64) == 64
    assert _block_count(small[:5], 64) == 5
    assert _block_count([2000] * 700, 2) == 700


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute and a half on two cores that nobody else uses
def test_memory_does_not_grow_with_the_number_of_clips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    peaks = []
    for clips in (200, 2000):
        root, out = tmp_path / str(clips), tmp_path / f"shards-{clips}"
        synthesize(root, verbs=3, nouns=4, clips=clips, seconds=0.8, size=(160, 120))
        command = ["prepare", str(root), str(out), "--image-size", "160x120"]
        seen = watch([sys.executable, "-c", COMMAND, *command], out)
        assert len(open_shards(str(out)).table) == clips
        peaks.append(max(held for _, held in seen))
    assert peaks[0] > 100e6 and peaks[1] < 1.3 * peaks[0]
    # Most of that is Ray and Python. Was what is made held, it would show from the first tenth of it to the last.
    total = made_bytes(out)
    assert total > 180e6
    assert peaks[1] - max(held for made, held in seen if made < total / 10) < total / 3
