"""Sources before shards are made of them, and the files that close a data set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tests.dataset.test_write_task import MOVING, SHORT, STILL, annotated
from tune_ego import __version__
from tune_ego.dataset.annotations import AnnotatedClip, Annotations, parse_clip_name
from tune_ego.dataset.closing import mark_unfinished, write_dataset
from tune_ego.dataset.shards import Problem, open_shards
from tune_ego.dataset.sources import (
    check_missing_limit,
    describe_lengths,
    file_identities,
    find_unusable_clips,
    length_mismatch,
)
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile


def source(path: Path, content: bytes) -> SourceFile:
    path.write_bytes(content)
    return SourceFile(str(path), len(content), 17)


@pytest.mark.parametrize(
    ("frames", "oddity"), [(19, "19 frames, its name says 20"), (20, None), (21, "21 frames, its name says 20")]
)
def test_a_clip_has_as_many_frames_as_lie_between_those_of_its_name(frames: int, oddity: str | None) -> None:
    assert length_mismatch(annotated(STILL), frames) == oddity  # F000010 to F000030


@pytest.mark.parametrize(
    ("unusable", "clips", "over"), [(2, 40, False), (3, 40, True), (0, 0, False), (1, 19, True), (1, 20, False)]
)
def test_five_of_a_hundred_clips_may_be_lost(unusable: int, clips: int, over: bool) -> None:
    problems = [Problem(f"clip{place}", "video", "is gone", False) for place in range(unusable)]
    if over:
        message = f"here: {unusable} of {clips} clips cannot be used, first clip0: is gone. That is over 5%"
        with pytest.raises(UserError, match=message):
            check_missing_limit(problems, clips, "here")
    else:
        check_missing_limit(problems, clips, "here")


def test_a_video_is_known_by_its_size_and_its_first_and_last_8_kib(tmp_path: Path) -> None:
    content = bytes(range(256)) * 80  # 20,480 bytes
    files = {"same": content, "shorter": content[:9000] + content[9256:], "small": b"few"}
    for place in (0, 8191, len(content) - 8192, len(content) - 1):
        files[f"{place}"] = content[:place] + b"\xaa" + content[place + 1 :]
    files["middle"] = content[:8192] + b"\xab" + content[8193:]
    identity_of = file_identities([source(tmp_path / f"{name}.mp4", data) for name, data in files.items()])
    identity = {Path(uri).stem: value for uri, value in identity_of.items()}
    ends = hashlib.sha256(content[:8192] + content[-8192:]).hexdigest()[:16]
    assert identity["same"] == identity["middle"] == f"20480 {ends}"
    assert identity["small"] == f"3 {hashlib.sha256(b'few' * 2).hexdigest()[:16]}"
    assert len(set(identity.values())) == len(files) - 1


def test_a_gaze_file_is_known_by_all_of_it(tmp_path: Path) -> None:
    content = b"x" * 30000
    files = [source(tmp_path / "a.txt", content), source(tmp_path / "b.TXT", content[:15000] + b"y" + content[15001:])]
    assert list(file_identities(files).items()) == [
        (file.uri, hashlib.sha256(Path(file.uri).read_bytes()).hexdigest()[:16]) for file in files
    ]
    with pytest.raises(UserError, match=r"gone\.txt: cannot be read"):
        file_identities([SourceFile(str(tmp_path / "gone.txt"), 1, 0)])


def test_on_an_object_store_size_and_time_tell_files_apart() -> None:
    files = [SourceFile("s3://b/x.mp4", 12, 34), SourceFile("s3://b/y.txt", 5, 6)]
    assert file_identities(files) == {"s3://b/x.mp4": "12 34", "s3://b/y.txt": "5 6"}


def test_unusable_videos_are_named_in_the_order_of_the_clips(tmp_path: Path) -> None:
    files = {
        STILL: source(tmp_path / "a.mp4", b""),
        MOVING: source(tmp_path / "b.mp4", b"nonsense" * 99),
    }
    problems = find_unusable_clips([annotated(name) for name in (STILL, MOVING, SHORT)], files)
    assert [(problem.clip, problem.stage, problem.kept) for problem in problems] == [
        (name, "video", False) for name in (STILL, MOVING, SHORT)
    ]
    assert problems[0].reason == "the file is empty" and problems[2].reason == "no mp4 of this name"
    assert problems[1].reason.startswith("cannot be opened (")


def clip_of(action: int, verb: int, nouns: tuple[int, ...], number: int) -> AnnotatedClip:
    name = parse_clip_name(f"OP01-R01-Tea-{number}-9-F000001-F000020")
    return AnnotatedClip(name, action, verb, nouns, ("train", "train", "test"), 0, 0)


CLIPS = [clip_of(1, 2, (3, 1), 0), clip_of(4, 1, (2,), 1), clip_of(1, 2, (3, 1), 2), clip_of(2, 3, (1,), 3)]
ANNOTATIONS = Annotations(["a1", "a2", "a3", "a4"], ["v1", "v2", "v3"], ["n1", "n2", "n3"], CLIPS)


def record(number: int, frames: int, gaze_frames: int) -> dict[str, Any]:
    """A row of clips.parquet."""
    labels = {"action": number, "verb": 1, "nouns": [2, 0], "split1": "train", "split2": "", "split3": "test"}
    place = {"stratified_fold": 3, "session_fold": 5, "frames": frames, "gaze_frames": gaze_frames}
    shard = {"shard": "frames/x.parquet", "row_group": 2 * number}
    return {"clip": f"clip{number}", "session": "s", "subject": "OP01", **labels, **place, **shard}


RECORDS = [record(2, 16, 0), record(0, 15, 0), record(1, 40, 2), record(3, 1, 0)]
PROBLEMS = [
    Problem("clip3", "length", "1 frames, its name says 19", True),
    Problem("clip2", "gaze", "no frame with usable gaze", True),
    Problem("clip9", "video", "no mp4 of this name", False),
]


def test_what_closes_a_data_set(tmp_path: Path) -> None:
    out = str(tmp_path)
    info = write_dataset(ANNOTATIONS, RECORDS, PROBLEMS, {"image_size": [64, 48]}, out, True)
    files = {name: (tmp_path / name).read_bytes() for name in ("clips.parquet", "problems.parquet")}
    ordered = sorted(PROBLEMS, key=lambda problem: problem.clip)
    rows = [{"clip": clip, "stage": stage, "reason": reason, "kept": kept} for clip, stage, reason, kept in ordered]
    assert info == {
        "schema_version": 2,
        "written_by": f"tune_ego {__version__}",
        "settings": {"image_size": [64, 48]},
        "actions": ["a1", "a2", "a3", "a4"],
        "verbs": ["v1", "v2", "v3"],
        "nouns": ["n1", "n2", "n3"],
        "verb_of_action": [1, 2, -1, 0],  # no clip shows a3
        "noun_of_action": [2, 0, -1, 1],  # its first noun
        "clips": 4,
        "frames": 72,
        "clips_left_out": 1,
        "clips_without_gaze": 3,
        "clips_shorter_than_a_window": 2,  # under 16 frames
        "clips_of_another_length": 1,
        "clips_placed_by_time": 0,
        "clips_turned": 0,
        "clips_kept_damaged": 0,
        "flow_fields_repeated": 4,  # the last one of each clip
        "problems": rows,
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in files.items()},
    }
    assert json.loads((tmp_path / "dataset.json").read_text()) == info
    assert pq.read_table(tmp_path / "clips.parquet").to_pylist() == [RECORDS[place] for place in (1, 2, 0, 3)]
    assert pq.read_table(tmp_path / "problems.parquet").to_pylist() == rows
    data = open_shards(out)
    assert (data.image_size, data.verbs_and_nouns()) == ((64, 48), ([1, 2, -1, 0], [2, 0, -1, 1]))


@pytest.mark.parametrize(("lost", "refused"), [(1, False), (2, True)])
def test_only_clips_left_out_count_towards_the_threshold(
    tmp_path: Path, lost: int, refused: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of 20 clips is 5 %."""
    annotations = Annotations(["a"], ["v"], ["n"], [clip_of(1, 1, (1,), place) for place in range(20)])
    records = [record(place, 20, 20) for place in range(20 - lost)]
    problems = [Problem(f"clip{place}", "gaze", "none", True) for place in range(9)]
    problems += [Problem(f"lost{place}", "video", "is gone", False) for place in range(lost)]
    if not refused:
        assert write_dataset(annotations, records, problems, {}, str(tmp_path), False)["clips_left_out"] == 1
        return
    with pytest.raises(UserError, match=rf"2 of 20 clips.*first lost0.*full list: {tmp_path}/problems\.parquet"):
        write_dataset(annotations, records, problems, {}, str(tmp_path), False)
    assert "Cannot be used (2)" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["problems.parquet"]
    assert len(pq.read_table(tmp_path / "problems.parquet")) == 11
    assert write_dataset(annotations, records, problems, {}, str(tmp_path), True)["clips_left_out"] == 2
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match="2 of 20 clips"):
        write_dataset(annotations, records, problems[1:], {}, str(tmp_path), False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_data_set_without_a_clip_is_refused_even_where_clips_may_be_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not one clip could be read; full list"):
        write_dataset(ANNOTATIONS, [], PROBLEMS[2:], {}, str(tmp_path), True)
    assert [path.name for path in tmp_path.iterdir()] == ["problems.parquet"]


def test_what_is_closed_already_is_not_written_again(tmp_path: Path) -> None:
    def times() -> dict[str, int]:
        return {path.name: path.stat().st_ino for path in tmp_path.iterdir()}

    write_dataset(ANNOTATIONS, RECORDS, PROBLEMS, {}, str(tmp_path), True)
    before = times()
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "x.parquet.0123.partial").touch()
    write_dataset(ANNOTATIONS, RECORDS, PROBLEMS, {}, str(tmp_path), True)
    assert not (tmp_path / "frames" / "x.parquet.0123.partial").exists()
    (tmp_path / "frames").rmdir()
    assert times() == before
    assert len(open_shards(str(tmp_path)).table) == 4
    for name in ("clips.parquet", "problems.parquet"):
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-9] + b"x" + content[-8:])
        write_dataset(ANNOTATIONS, RECORDS, PROBLEMS, {}, str(tmp_path), True)
        assert (tmp_path / name).read_bytes() == content
    write_dataset(ANNOTATIONS, RECORDS[1:], PROBLEMS, {}, str(tmp_path), True)
    assert len(open_shards(str(tmp_path)).table) == 3
    mark_unfinished(str(tmp_path))
    assert sorted(times()) == ["clips.parquet", "problems.parquet"]
    with pytest.raises(UserError, match="no finished data set"):
        open_shards(str(tmp_path))


def test_clips_most_of_which_are_not_as_long_as_named_are_refused() -> None:
    """More than half differ by over two frames and 5 %: then frames may not be those that the gaze belongs to."""
    names = [f"OP01-R01-Tea-0-9-F{100 * n:06d}-F{100 * n + 60:06d}" for n in range(4)]
    clips = [annotated(name) for name in names]
    assert describe_lengths(clips, dict(zip(names, [64, 64, 60, 63]))) == ""  # two of four; 3 frames are 5 % of 60
    words = describe_lengths(clips, dict(zip(names, [60, 64, 50, 64])))
    assert words.startswith(
        f"3 of 4 clips are not as long as their names say, first {names[1]}: 64 frames, its name says 60."
    )
    assert words.endswith("to continue all the same: --allow-missing")
    assert describe_lengths(clips, {names[0]: 60, names[1]: 90}) == ""  # clips that cannot be used do not count
    assert describe_lengths([], {}) == ""
