"""`prepare` over an output that is there already: what is readable is of one run, and what changed is made anew."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.dataset.test_check_inspect import cut_in_the_middle
from tests.dataset.test_write_task import MOVING, SESSION, SHORT, STILL, write_folder
from tune_ego.dataset.annotations import find_clips, find_gaze, read_annotations
from tune_ego.dataset.prepare import Settings, plan_shards, prepare
from tune_ego.dataset.shards import Clip, open_shards, read_clip
from tune_ego.dataset.sources import file_identities, find_unusable_clips
from tune_ego.errors import UserError
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window

SETTINGS = Settings((48, 36))


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "small")


@pytest.fixture
def folder(egtea: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(egtea, tmp_path / "egtea"))


def test_a_rerun_that_is_killed_leaves_nothing_readable(
    folder: Path, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clip that was left out comes back: the rows of those behind it in its shard move."""
    out = tmp_path / "out"
    tasks = plan_shards(read_annotations(folder), find_clips(folder), find_gaze(folder))
    task = max(tasks, key=lambda task: len(task.clips))
    names = [clip.name.name for clip in task.clips]
    assert len(names) > 1
    lost = Path(find_clips(folder)[names[0]].uri)
    content = lost.read_bytes()
    lost.write_bytes(b"")
    prepare(str(folder), str(out), SETTINGS)
    old = {name: (out / name).read_bytes() for name in ("dataset.json", "clips.parquet")}
    assert not set(names[:1]) & set(open_shards(str(out)).table["clip"].to_pylist())
    lost.write_bytes(content)
    made.clear()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("tune_ego.dataset.closing.write_dataset", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(str(folder), str(out), SETTINGS)
    assert made == [task.shard]
    with pytest.raises(UserError, match="no finished data set"):
        open_shards(str(out))
    # And were the old files there, no reader would take another clip's rows for the right ones.
    for name, former in old.items():
        (out / name).write_bytes(former)
    data = open_shards(str(out))
    rows = {row["clip"]: row for row in data.table.to_pylist()}
    for name in names[1:]:
        row = rows[name]
        with pytest.raises(UserError, match=rf"{row['shard']}: the rows of {name} are not where"):
            read_clip(data, row)
        clip = Clip(name, row["action"], row["frames"], f"{out}/{row['shard']}", row["row_group"])
        with pytest.raises(UserError, match=rf"{row['shard']}: {name} should be there, but row group"):
            WindowReader([clip], ("rgb",), data.image_size, 32).read_batch([Window(0, 0, 0, 0, False)])
    prepare(str(folder), str(out), SETTINGS)
    data = open_shards(str(out))
    for row in data.table.to_pylist():
        assert set(read_clip(data, row)["clip"].to_pylist()) == {row["clip"]}


@pytest.mark.parametrize("name", ["clips.parquet", "problems.parquet"])
@pytest.mark.parametrize("damage", ["lost", "one bit"])
def test_a_lost_or_damaged_closing_file_is_written_again(
    egtea: Path, shards: str, tmp_path: Path, made: list[str], name: str, damage: str
) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    content = bytearray((out / name).read_bytes())
    if damage == "lost":
        (out / name).unlink()
    else:
        content[len(content) // 3] ^= 4
        (out / name).write_bytes(content)
    if name == "clips.parquet":
        with pytest.raises(UserError, match=r"clips\.parquet: (cannot be read|damaged).*run prepare again"):
            open_shards(str(out))
    prepare(str(egtea), str(out), SETTINGS)
    assert (out / name).read_bytes() == (Path(shards) / name).read_bytes()
    assert made == []


def test_no_bit_of_clips_parquet_can_turn_unnoticed(shards: str, tmp_path: Path) -> None:
    root = tmp_path / "out"
    root.mkdir()
    shutil.copy(Path(shards) / "dataset.json", root)
    content = (Path(shards) / "clips.parquet").read_bytes()
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = bytearray(content)
        damaged[random.integers(len(content))] ^= 1 << int(random.integers(8))
        (root / "clips.parquet").write_bytes(damaged)
        with pytest.raises(UserError, match=r"clips\.parquet"):
            open_shards(str(root))
    damaged = bytearray(content)
    damaged[200] ^= 1
    (root / "clips.parquet").write_bytes(damaged)
    with pytest.raises(OSError, match="CRC checksum"):  # other tools see it too, in the pages
        pq.read_table(root / "clips.parquet", page_checksum_verification=True)


def test_a_source_replaced_by_one_of_its_size_is_noticed(small: Path, tmp_path: Path, made: list[str]) -> None:
    """A video's shard is made anew, and all shards of a session whose gaze file changed."""
    out = tmp_path / "out"
    prepare(str(small), str(out), SETTINGS)
    video_file = small / "cropped_clips" / f"{STILL}.mp4"
    content = video_file.read_bytes()
    made.clear()
    video_file.write_bytes(content.replace(b"x264 - core", b"X264 - core"))
    assert content != video_file.read_bytes()
    prepare(str(small), str(out), SETTINGS)
    assert len(made) == 1
    gaze = small / "gaze_data" / f"{SESSION}.txt"
    gaze.write_bytes(gaze.read_bytes().replace(b"\t12\tFixation", b"\t12\t-       "))
    made.clear()
    prepare(str(small), str(out), SETTINGS)
    assert len(made) == 3
    rows = {row["clip"]: row["gaze_frames"] for row in open_shards(str(out)).table.to_pylist()}
    assert rows == {STILL: 19, MOVING: 9, SHORT: 3}  # frame 12 is of the first clip, which goes from 10 to 29


def test_over_the_threshold_in_decoding_all_are_named(
    folder: Path, tmp_path: Path, made: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    broken = sorted(find_clips(folder))[:4]
    for name in broken:
        cut_in_the_middle(Path(find_clips(folder)[name].uri))
    for _ in range(2):  # the second run has nothing to make, and says the same
        with pytest.raises(UserError, match=rf"4 of 40 clips cannot be used.*{out}/problems\.parquet"):
            prepare(str(folder), str(out), SETTINGS)
        printed = capsys.readouterr().out
        assert all(name in printed for name in broken)
        assert pq.read_table(out / "problems.parquet")["clip"].to_pylist() == broken
        with pytest.raises(UserError, match="no finished data set"):
            open_shards(str(out))
    assert prepare(str(folder), str(out), SETTINGS, allow_missing=True)["clips_left_out"] == 4
    with pytest.raises(UserError, match="4 of 40"):
        prepare(str(folder), str(out), SETTINGS)
    assert len(open_shards(str(out)).table) == 36  # what was finished stays


def test_what_a_killed_first_write_left_is_no_foreign_file(small: Path, tmp_path: Path, made: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "prepare.json.0123abcd.partial").write_text("{")
    assert prepare(str(small), str(tmp_path / "out"), SETTINGS)["clips"] == 3
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_shards_of_another_schema_version_are_not_gone_on_with(egtea: Path, shards: str, tmp_path: Path) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    (out / "dataset.json").unlink()
    claim = json.loads((out / "prepare.json").read_text())
    (out / "prepare.json").write_text(json.dumps({**claim, "schema_version": 1}))
    with pytest.raises(UserError, match=r"other settings \(schema_version: 1 there, 2 now\)"):
        prepare(str(egtea), str(out), SETTINGS)


def test_an_opened_data_set_is_not_remembered_over_a_new_one(small: Path, tmp_path: Path, made: list[str]) -> None:
    lost = small / "cropped_clips" / f"{STILL}.mp4"
    content = lost.read_bytes()
    lost.write_bytes(b"")
    prepare(str(small), str(tmp_path / "out"), SETTINGS, allow_missing=True)
    assert len(open_shards(str(tmp_path / "out")).table) == 2
    lost.write_bytes(content)
    prepare(str(small), str(tmp_path / "out"), SETTINGS)
    assert len(open_shards(str(tmp_path / "out")).table) == 3


def test_only_clips_of_unfinished_shards_are_opened(
    egtea: Path, shards: str, tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = Path(shutil.copytree(shards, tmp_path / "out"))
    opened: list[str] = []
    monkeypatch.setattr("tune_ego.dataset.video.check_opens", opened.append)
    prepare(str(egtea), str(out), SETTINGS)
    assert opened == []
    tasks = plan_shards(read_annotations(egtea), find_clips(egtea), find_gaze(egtea))
    (out / tasks[0].shard).unlink()
    prepare(str(egtea), str(out), SETTINGS)
    assert sorted(opened) == sorted(uri for uri in tasks[0].videos if uri is not None)


def test_on_an_object_store_nothing_is_fetched_before_the_job(egtea: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips = read_annotations(egtea).clips
    files = find_clips(egtea)
    remote = {name: file._replace(uri=f"s3://bucket/{name}.mp4") for name, file in files.items()}
    first, second = sorted(remote)[:2]
    remote[first] = remote[first]._replace(bytes=0)
    remote.pop(second)

    def fetch(*_: object) -> bytes:
        raise AssertionError

    monkeypatch.setattr("tune_ego.storage.read_bytes", fetch)
    assert [(problem.clip, problem.reason) for problem in find_unusable_clips(clips, remote)] == [
        (first, "the file is empty"),
        (second, "no mp4 of this name"),
    ]
    found = file_identities(list(remote.values()))
    later = file_identities([file._replace(modified_ns=file.modified_ns + 1) for file in remote.values()])
    assert found.keys() == later.keys() and not set(found.values()) & set(later.values())


def test_the_path_of_flow_weights_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert Settings(flow="raft", flow_weights="raft.pt").absolute().flow_weights == str(tmp_path / "raft.pt")
    assert Settings().absolute() == Settings()
    seen: list[str | None] = []
    monkeypatch.setattr(Settings, "check", lambda self: seen.append(self.flow_weights))
    with pytest.raises(UserError, match="annotations are not here"):
        prepare("egtea", "out", Settings(flow="raft", flow_weights="raft.pt"))
    assert seen == [str(tmp_path / "raft.pt")]
