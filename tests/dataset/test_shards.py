"""The role of each clip, and its place in the shards."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import handmade
from tune_ego.config import DataConfig
from tune_ego.dataset.annotations import AnnotatedClip, parse_clip_name
from tune_ego.dataset.gaze import Gaze
from tune_ego.dataset.shards import (
    Problem,
    Shards,
    clip_record,
    describe_stray_rows,
    frame_table,
    open_shards,
    read_clip,
    read_shard_records,
    row_groups,
    shard_folder,
    write_shard,
)
from tune_ego.errors import UserError

NAMES = [clip.name for clip in handmade.CLIPS]
ROLES = [  # split, validation, fold -> indices of the clips that train, and of those that validate
    (1, "stratified", 0, [2, 3, 5, 8, 9], [0, 1, 4]),
    (1, "stratified", 1, [0, 1, 4], [2, 3, 5, 8, 9]),
    (1, "by_session", 0, [4, 5, 8, 9], [0, 1, 2, 3]),
    (1, "by_session", 1, [0, 1, 2, 3, 8, 9], [4, 5]),
    (1, "by_session", 2, [0, 1, 2, 3, 4, 5], [8, 9]),
    (2, "stratified", 0, [2, 3, 8, 9], [0, 1, 4, 6]),
    (2, "by_session", 1, [0, 1, 2, 3, 8, 9], [4, 6]),
    (3, "stratified", 0, [5, 7], [6]),
    (3, "by_session", 2, [5, 6], [7]),
]


@pytest.fixture
def shards(handmade_shards: str) -> Shards:
    return open_shards(handmade_shards)


@pytest.mark.parametrize(("split", "validation", "fold", "training", "validating"), ROLES)
def test_validation_clips_are_left_out_of_training(
    shards: Shards, split: int, validation: str, fold: int, training: list[int], validating: list[int]
) -> None:
    data = DataConfig.model_validate({"split": split, "validation": validation, "fold": fold})
    assert [clip.name for clip in shards.train(data)] == [NAMES[index] for index in training]
    assert [clip.name for clip in shards.validation(data)] == [NAMES[index] for index in validating]


@pytest.mark.parametrize(("split", "testing"), [(1, [6, 7]), (2, [5]), (3, [0, 1, 2, 3, 4, 8, 9])])
def test_test_clips_are_those_of_the_split(shards: Shards, split: int, testing: list[int]) -> None:
    assert [clip.name for clip in shards.test(split)] == [NAMES[index] for index in testing]
    assert shards.clip_names("test", split) == [NAMES[index] for index in testing]


@pytest.mark.parametrize(
    ("split", "training"), [(1, [0, 1, 2, 3, 4, 5, 8, 9]), (2, [0, 1, 2, 3, 4, 6, 8, 9]), (3, [5, 6, 7])]
)
def test_names_of_a_role_include_both_folds(shards: Shards, split: int, training: list[int]) -> None:
    assert shards.clip_names("train", split) == [NAMES[index] for index in training]


def test_roles_without_clips_are_named(shards: Shards, handmade_shards: str) -> None:
    with pytest.raises(UserError) as caught:
        shards.validation(DataConfig(split=2, fold=7))
    assert str(caught.value) == f"{handmade_shards}: there are no validation clips in stratified fold 7 (data.fold)"
    only_training = Shards(shards.root, shards.info, shards.table.slice(0, 5))
    with pytest.raises(UserError, match=r": there are no test clips of split 1$"):
        only_training.test(1)
    with pytest.raises(UserError, match=r": there are no training clips$"):
        Shards(shards.root, shards.info, shards.table.slice(0, 2)).train(DataConfig())


def test_a_clip_has_the_fields_of_its_row(shards: Shards, handmade_shards: str) -> None:
    for row, expected in zip(shards.table.to_pylist(), handmade.CLIPS, strict=True):
        clip = shards.clip(row)
        assert (clip.name, clip.label, clip.frames) == (expected.name, expected.action, expected.frames)
        assert clip.shard == f"{handmade_shards}/{handmade.SHARDS[expected.shard]}"
        assert clip.row_group == expected.row_group


def test_a_data_set_names_its_classes_and_image_size(shards: Shards) -> None:
    assert shards.actions == ["Take bowl", "Put bowl", "Take cup,bowl", "Put knife"]
    assert shards.image_size == (48, 40)
    assert shards.verbs_and_nouns() == ([0, 1, 0, 1], [0, 0, 1, 2])


@pytest.mark.parametrize(("frames", "groups"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3), (100, 7)])
def test_a_row_group_holds_sixteen_frames(frames: int, groups: int) -> None:
    assert row_groups(frames) == groups


def annotated(roles: tuple[str, str, str]) -> AnnotatedClip:
    name = parse_clip_name("OP02-R03-Pasta-1000-2000-F000024-F000048")
    return AnnotatedClip(name, action=4, verb=2, nouns=(3, 1), roles=roles, stratified_fold=5, session_fold=8)


def test_a_shard_s_folder_says_roles_and_folds() -> None:
    folder = shard_folder(annotated(("train", "", "test")))
    assert folder == "frames/roles=train-none-test/stratified_fold=5/session_fold=8"


def test_a_clip_s_record_counts_classes_from_zero() -> None:
    valid = np.array([True, False, True, True])
    gaze = Gaze(np.zeros(4, np.float32), np.zeros(4, np.float32), valid, np.array([""] * 4))
    assert clip_record(annotated(("train", "", "test")), 24, gaze, "frames/x.parquet", 6) == {
        "clip": "OP02-R03-Pasta-1000-2000-F000024-F000048",
        "session": "OP02-R03-Pasta",
        "subject": "OP02",
        "action": 3,
        "verb": 1,
        "nouns": [2, 0],
        "split1": "train",
        "split2": "",
        "split3": "test",
        "stratified_fold": 5,
        "session_fold": 8,
        "frames": 24,
        "gaze_frames": 3,
        "shard": "frames/x.parquet",
        "row_group": 6,
    }


def tiny_table(clip: str, frames: int) -> pa.Table:
    """Frames whose images are no JPEG files, and gaze at x 0.25, y 0.5 but for the first frame."""
    x, y = (np.full(frames, value, np.float32) for value in (0.25, 0.5))
    x[0] = y[0] = np.nan
    event = np.array(["", *["Saccade"] * (frames - 1)])
    rgb, flow = ([f"{name} {frame}".encode() for frame in range(frames)] for name in ("rgb", "flow"))
    return frame_table(clip, rgb, flow, Gaze(x, y, np.arange(frames) > 0, event))


def test_a_shard_holds_one_row_a_frame_and_the_records_of_its_clips(tmp_path: Path) -> None:
    uri, record, problem = str(tmp_path / "part.parquet"), {"clip": "a", "frames": 17}, Problem("a", "gaze", "b", True)
    write_shard(uri, [tiny_table("a", 17), tiny_table("b", 2)], [record], [problem], {"a.mp4": "1 2"})
    assert read_shard_records(uri) == ([record], [problem], {"a.mp4": "1 2"})
    with pq.ParquetFile(uri) as file:
        assert [file.metadata.row_group(group).num_rows for group in range(3)] == [16, 1, 2]
        assert file.metadata.num_row_groups == 3
        rows = file.read().to_pylist()
    assert [(row["clip"], row["frame"]) for row in rows] == [*[("a", n) for n in range(17)], ("b", 0), ("b", 1)]
    nothing = {"gaze_x": None, "gaze_y": None, "gaze_event": "", "gaze_valid": False}
    assert rows[17] == {"clip": "b", "frame": 0, "rgb": b"rgb 0", "flow": b"flow 0", **nothing}
    point = {"gaze_x": 0.25, "gaze_y": 0.5, "gaze_event": "Saccade", "gaze_valid": True}
    assert rows[16] == {"clip": "a", "frame": 16, "rgb": b"rgb 16", "flow": b"flow 16", **point}


@pytest.mark.parametrize("content", [b"", b"no Parquet file", None])
def test_what_is_no_shard_has_no_records(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "part.parquet"
    if content is None:  # a Parquet file without the keys
        pq.write_table(pa.table({"clip": ["a"]}), path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: not a whole shard of tune_ego \("):
        read_shard_records(str(path))


@pytest.mark.parametrize(
    ("row_group", "clip", "first_frame", "stray"),
    [
        (0, 0, 0, None),
        (1, 0, 16, None),
        (2, 1, 0, None),
        (3, 1, 16, "there is no row group 3"),
        (4, 1, 16, "there is no row group 4"),
        (0, 1, 0, f"row group 0 holds frames of {NAMES[0]} from 0 on"),
        (1, 0, 0, f"row group 1 holds frames of {NAMES[0]} from 16 on"),
        (2, 0, 32, f"row group 2 holds frames of {NAMES[1]} from 0 on"),
    ],
)
def test_stray_rows_are_those_of_another_clip_or_frame(
    handmade_shards: str, row_group: int, clip: int, first_frame: int, stray: str | None
) -> None:
    with pq.ParquetFile(f"{handmade_shards}/{handmade.SHARDS[0]}") as file:
        assert describe_stray_rows(file, row_group, NAMES[clip], first_frame) == stray


@pytest.mark.parametrize("names", [["a", "b"], ["b", "c"], ["a", "a"]])
def test_a_row_group_of_two_clips_is_stray(tmp_path: Path, names: list[str]) -> None:
    path = tmp_path / "part.parquet"
    table = pa.concat_tables([tiny_table(name, 2) for name in names]).unify_dictionaries()
    pq.write_table(table, path)
    with pq.ParquetFile(path) as file:
        stray = describe_stray_rows(file, 0, "b", 0)
        assert stray == f"row group 0 holds frames of {names[0]} from 0 on"


@pytest.mark.parametrize("index", range(10))
def test_a_whole_clip_is_read_in_its_order(shards: Shards, index: int) -> None:
    table = read_clip(shards, shards.table.to_pylist()[index])
    count = handmade.CLIPS[index].frames
    assert table["clip"].to_pylist() == [NAMES[index]] * count
    assert table["frame"].to_pylist() == list(range(count))
    assert sum(table["gaze_valid"].to_pylist()) == handmade.CLIPS[index].gaze_frames


@pytest.mark.parametrize("change", [{"row_group": 1}, {"frames": 15}, {"frames": 18}, {"clip": NAMES[1]}])
def test_a_clip_that_is_not_where_its_row_says_is_refused(shards: Shards, change: dict[str, Any]) -> None:
    record = {**shards.table.to_pylist()[0], **change}
    message = f"{shards.root}/{handmade.SHARDS[0]}: the rows of {record['clip']} are not where clips.parquet says"
    with pytest.raises(UserError, match=re.escape(message)):
        read_clip(shards, record)


def test_another_clip_of_as_many_frames_is_refused(shards: Shards) -> None:
    record = {**shards.table.to_pylist()[0], "clip": "another"}
    with pytest.raises(UserError, match="the rows of another are not where"):
        read_clip(shards, record)


@pytest.mark.parametrize("damage", ["a byte of an image", "gone"])
def test_a_clip_that_cannot_be_read_is_named(handmade_shards: str, tmp_path: Path, damage: str) -> None:
    root = Path(shutil.copytree(handmade_shards, tmp_path / "copy"))
    shard = root / handmade.SHARDS[0]
    raw = bytearray(shard.read_bytes())
    raw[raw.index(b"\xff\xd8\xff") + 500] ^= 4
    shard.write_bytes(raw)
    if damage == "gone":
        shard.unlink()
    shards = open_shards(str(root))
    with pytest.raises(UserError, match=rf"{re.escape(str(shard))}: {NAMES[0]} cannot be read \("):
        read_clip(shards, shards.table.to_pylist()[0])


@pytest.mark.parametrize(
    ("file", "content", "problem"),
    [
        ("dataset.json", None, "no finished data set here (no readable dataset.json); run: tune-ego prepare"),
        ("dataset.json", "{", "no finished data set here (no readable dataset.json); run: tune-ego prepare"),
        (
            "dataset.json",
            '{"schema_version": 1}',
            "shards of schema version 1; this tune_ego reads version 2: prepare them anew",
        ),
        ("clips.parquet", None, "/clips.parquet: cannot be read ("),
        ("clips.parquet", "none", "/clips.parquet: cannot be read ("),
    ],
)
def test_what_is_no_data_set_is_refused(
    handmade_shards: str, tmp_path: Path, file: str, content: str | None, problem: str
) -> None:
    root = Path(shutil.copytree(handmade_shards, tmp_path / "copy"))
    (root / file).unlink()
    if content is not None:
        (root / file).write_text(content)
    with pytest.raises(UserError) as caught:
        open_shards(str(root))
    assert str(caught.value).startswith(f"{root}{problem}" if file == "clips.parquet" else f"{root}: {problem}")


@pytest.mark.parametrize(
    "name", ["../other/part-0000.parquet", "/etc/part-0000.parquet", "s3://b/p.parquet", ".parquet"]
)
def test_a_shard_outside_of_the_data_set_is_refused(handmade_shards: str, tmp_path: Path, name: str) -> None:
    root = Path(shutil.copytree(handmade_shards, tmp_path / "copy"))
    clips, info = root / "clips.parquet", json.loads((root / "dataset.json").read_text())
    table = pq.read_table(clips)
    column = table.column_names.index("shard")
    table = table.set_column(column, table.schema.field("shard"), pa.array([name] * table.num_rows))
    pq.write_table(table, clips)
    del info["sha256"]
    (root / "dataset.json").write_text(json.dumps(info))
    with pytest.raises(
        UserError, match=rf"/clips\.parquet: cannot be read \('{re.escape(name)}' is no name of a shard\)"
    ):
        open_shards(str(root))


def test_a_process_that_has_read_shards_ends_with_its_own_code(handmade_shards: str) -> None:
    """Threads of Arrow ended half of them with 134."""
    code = f"import sys; from tune_ego.dataset.shards import open_shards; open_shards({handmade_shards!r}); sys.exit(2)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=False) for _ in range(8)]
    assert [run.returncode for run in runs] == [2] * 8


def test_clips_parquet_has_to_be_the_one_that_the_data_set_was_closed_with(
    handmade_shards: str, tmp_path: Path
) -> None:
    """The first data sets have no checksums, and are read all the same."""
    root = Path(shutil.copytree(handmade_shards, tmp_path / "copy"))
    clips, info = root / "clips.parquet", json.loads((root / "dataset.json").read_text())
    pq.write_table(pq.read_table(clips).slice(0, 4), clips)
    with pytest.raises(UserError, match=r"/clips\.parquet: damaged, or written with another dataset\.json"):
        open_shards(str(root))
    del info["sha256"]
    (root / "dataset.json").write_text(json.dumps(info))
    assert open_shards(str(root)).table.num_rows == 4
