from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.conftest import COMMAND
from tune_ego.bench.resume import descendants
from tune_ego.dataset import flow, video
from tune_ego.dataset.annotations import find_clips, find_gaze, read_annotations
from tune_ego.dataset.gaze import read_gaze
from tune_ego.dataset.prepare import Settings, plan, prepare, write_task
from tune_ego.dataset.shards import open_shards, read_clip
from tune_ego.dataset.synthetic import synthesize
from tune_ego.errors import UserError


def copy(egtea: Path, to: Path) -> Path:
    shutil.copytree(egtea, to)
    return to


def test_same_seed_same_files(tmp_path: Path, egtea: Path) -> None:
    synthesize(tmp_path / "again", verbs=2, nouns=2, clips=40, seconds=0.8, size=(96, 72), seed=3)
    for pattern in ("action_annotation/*.txt", "gaze_data/**/*.txt", "cropped_clips/**/*.mp4"):
        files = sorted(egtea.glob(pattern))
        assert files
        for file in files:
            assert (tmp_path / "again" / file.relative_to(egtea)).read_bytes() == file.read_bytes()


def test_synthetic_clips_are_h264_of_the_length_their_names_say(egtea: Path) -> None:
    for clip in read_annotations(egtea).clips[:5]:
        with av.open(find_clips(egtea)[clip.name.name].uri) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 24)
            assert sum(1 for _ in container.decode(video=0)) == clip.name.last_frame - clip.name.first_frame


@pytest.mark.parametrize(
    "arguments", [{"clips": 3}, {"verbs": 9}, {"size": (97, 72)}, {"seconds": 0.1}], ids=lambda value: next(iter(value))
)
def test_synthesize_refuses_what_it_cannot_make(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(arguments))}"):
        synthesize(tmp_path / "x", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "x").exists()


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


def test_flow_survives_storage() -> None:
    levels = flow.split_components(flow.quantise(np.dstack([np.linspace(-30, 30, 12).reshape(3, 4)] * 2)))
    assert np.allclose(
        flow.pixels(levels)[0], np.clip(np.linspace(-30, 30, 12).reshape(3, 4), -20, 20), atol=20 / 255 + 1e-6
    )


def test_a_second_run_changes_nothing_and_a_killed_one_goes_on(egtea: Path, tmp_path: Path, ray_cluster: None) -> None:
    out = tmp_path / "out"
    prepare(str(egtea), str(out), Settings((48, 36)))
    files = {path: path.read_bytes() for path in sorted(out.rglob("*.parquet"))}
    times = {path: path.stat().st_mtime_ns for path in files if "frames" in str(path)}
    victims = sorted(times)[::5]
    for path in (out / "dataset.json", *victims):
        path.unlink()
    with pytest.raises(UserError, match="no finished data set"):
        open_shards(str(out))
    prepare(str(egtea), str(out), Settings((48, 36)))
    assert {path: path.read_bytes() for path in sorted(out.rglob("*.parquet"))} == files
    assert all(path.stat().st_mtime_ns == times[path] for path in times.keys() - set(victims))
    with pytest.raises(UserError, match=r"image_size: \[48, 36\] there, \[64, 48\] now"):
        prepare(str(egtea), str(out), Settings((64, 48)))


def test_a_clip_that_breaks_off_is_reported(egtea: Path, tmp_path: Path) -> None:
    root = copy(egtea, tmp_path / "egtea")
    videos = find_clips(root)
    annotations = read_annotations(root)
    task = plan(annotations, videos, find_gaze(root))[0]
    bad = task.clips[0].name.name
    path = Path(videos[bad].uri)
    path.write_bytes(path.read_bytes()[:600])
    result = write_task(task, str(tmp_path / "out"), Settings((48, 36)))
    assert [problem.clip for problem in result.problems if not problem.kept] == [bad]
    assert [record["clip"] for record in result.records] == [clip.name.name for clip in task.clips[1:]]


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


def test_missing_clips_are_counted_where_allowed(egtea: Path, tmp_path: Path, ray_cluster: None) -> None:
    root = copy(egtea, tmp_path / "egtea")
    absent = sorted(find_clips(root))[:3]
    for name in absent:
        Path(find_clips(root)[name].uri).unlink()
    session, gaze = next(iter(find_gaze(root).items()))
    Path(gaze.uri).unlink()
    other, longer = sorted(find_clips(root))[:2]
    shutil.copy(find_clips(root)[longer].uri, find_clips(root)[other].uri)
    info = prepare(str(root), str(tmp_path / "out"), Settings((48, 36)), allow_missing=True)
    assert [problem["clip"] for problem in info["problems"] if not problem["kept"]] == absent
    assert (info["clips"], info["clips_left_out"]) == (37, 3)
    assert pq.read_table(tmp_path / "out" / "problems.parquet").to_pylist() == info["problems"]
    of_session = [clip.name.name for clip in read_annotations(root).clips if clip.name.session == session]
    assert info["clips_without_gaze"] == len({*of_session} - {*absent}) > 0
    rows = {row["clip"]: row for row in open_shards(str(tmp_path / "out")).table.to_pylist()}
    assert rows[other]["frames"] == rows[longer]["frames"]
    assert info["clips_of_another_length"] == 1
    (problem,) = (problem for problem in info["problems"] if problem["stage"] == "length")
    assert (problem["clip"], problem["kept"]) == (other, True)


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
