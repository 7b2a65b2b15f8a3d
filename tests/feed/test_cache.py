"""Copies of remote shards; `file://` stands for an object store here, whose test is in test_s3."""

from __future__ import annotations

import os
import random
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.fs as pafs
import pytest

from tests import handmade
from tune_ego.config import DataConfig
from tune_ego.dataset.shards import Clip
from tune_ego.errors import UserError
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.reader import WindowReader, close_shards
from tune_ego.feed.sampling import Window

REMOTE = [0, 4, 6]  # indices of clips in three shards


@pytest.fixture
def remote(handmade_shards: str, tmp_path: Path) -> list[Clip]:
    """The first clip of each of three shards, which lie on an object store."""
    (tmp_path / "store").mkdir()
    clips = []
    for number, index in enumerate(REMOTE):
        clip, path = handmade.CLIPS[index], tmp_path / "store" / f"{number}.parquet"
        path.write_bytes((Path(handmade_shards) / handmade.SHARDS[clip.shard]).read_bytes())
        os.utime(path, ns=(0, 10**18 + number))
        clips.append(Clip(clip.name, clip.action, clip.frames, f"file://{path}", clip.row_group))
    return clips


def read(clips: list[Clip], cache: ShardCache | None) -> np.ndarray:
    """Flow of the first frame of each clip."""
    close_shards()
    reader = WindowReader(clips, ("flow",), (48, 40), 32, cache)
    windows: list[Window | None] = [Window(index, 0, 0, 0, False) for index in range(len(clips))]
    return reader.read_batch(windows)["flow"][:, 0]


EXPECTED = np.stack([handmade.flow_image(index, 0)[:, :32, :32] for index in REMOTE])


def size(clip: Clip) -> int:
    return Path(clip.shard.removeprefix("file://")).stat().st_size


def spoil(clip: Clip, *, date: int) -> None:
    path = Path(clip.shard.removeprefix("file://"))
    path.write_bytes(b"x" * size(clip))
    os.utime(path, ns=(0, date))


def test_a_shard_is_read_from_its_copy_until_it_is_written_anew(remote: list[Clip], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10**9)
    assert np.array_equal(read(remote, cache), EXPECTED)
    assert len(list((tmp_path / "cache").iterdir())) == len(remote)
    spoil(remote[0], date=10**18)  # of the same size and date: only the copy can give these frames
    assert np.array_equal(read(remote, cache), EXPECTED)
    spoil(remote[0], date=2 * 10**18)
    with pytest.raises(UserError, match=r"0\.parquet: .*copy in .*cache"):
        read(remote, cache)


def test_the_cache_keeps_its_size_and_what_was_used_last(remote: list[Clip], tmp_path: Path) -> None:
    sizes = [size(clip) for clip in remote]
    cache = ShardCache(str(tmp_path / "cache"), sum(sizes) - 1)
    first, second = (cache.fetch(clip.shard) for clip in remote[:2])
    assert first is not None and second is not None
    os.utime(first, (1000, 1000))
    os.utime(second, (2000, 2000))
    assert cache.fetch(remote[0].shard) == first  # used again: now the second is the oldest
    third = cache.fetch(remote[2].shard)
    assert {str(path) for path in (tmp_path / "cache").iterdir()} == {first, third}
    assert cache.fetch(remote[1].shard) == second
    assert sum(path.stat().st_size for path in (tmp_path / "cache").iterdir()) <= cache.limit


def store(folder: Path, number: int, size: int) -> str:
    """A file of so many bytes on an object store."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{number}.parquet"
    path.write_bytes(bytes([number]) * size)
    return f"file://{path}"


@pytest.mark.parametrize(
    ("limit", "kept"),
    [  # of copies of 100, 200 and 300 bytes, last opened in this order; then one of 250 bytes comes
        (850, [0, 1, 2, 3]),
        (849, [1, 2, 3]),
        (750, [1, 2, 3]),
        (749, [2, 3]),
        (550, [2, 3]),
        (549, [3]),
        (250, [3]),
        (249, [0, 1, 2]),  # it does not fit at all, and nothing makes room for it
    ],
)
def test_copies_opened_longest_ago_make_room(tmp_path: Path, limit: int, kept: list[int]) -> None:
    uris = [store(tmp_path / "store", number, size) for number, size in enumerate((100, 200, 300, 250))]
    cache = ShardCache(str(tmp_path / "cache"), 1000)
    for number, uri in enumerate(uris[:3]):
        copy = cache.fetch(uri)
        assert copy is not None
        os.utime(copy, (1000 + number, 1000 + number))
    added = ShardCache(cache.folder, limit).fetch(uris[3])
    assert (added is not None) == (3 in kept)
    contents = [path.read_bytes() for path in (tmp_path / "cache").iterdir()]
    assert sorted(content[0] for content in contents) == kept
    assert all(len(content) == (100, 200, 300, 250)[content[0]] for content in contents)


def test_room_is_kept_for_what_others_fetch_at_this_moment(tmp_path: Path) -> None:
    """A file left by a process that ended a day ago is removed instead."""
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "link.parquet").symlink_to(folder / "gone")  # another process was faster
    parts = {age: folder / f"x.parquet.{age}.part" for age in (86400 - 60, 86400 + 60)}
    for age, part in parts.items():
        part.write_bytes(b"p" * 100)
        os.utime(part, (time.time() - age,) * 2)
    first, second = (store(tmp_path / "store", number, 100) for number in range(2))
    cache = ShardCache(str(folder), 300)
    copy = cache.fetch(first)
    assert copy is not None and all(part.exists() for part in parts.values())
    assert cache.fetch(second) is not None
    assert {age: part.exists() for age, part in parts.items()} == {86340: True, 86460: False}
    assert Path(copy).exists()
    assert ShardCache(str(folder), 200).fetch(store(tmp_path / "store", 2, 100)) is not None
    assert len(list(folder.glob("*.parquet"))) == 2  # the link and the third: the first two have gone
    assert parts[86340].exists()


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_a_copy_whose_date_cannot_be_set_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[OSError]
) -> None:
    uri, cache = store(tmp_path / "store", 1, 100), ShardCache(str(tmp_path / "cache"), 1000)
    copy = cache.fetch(uri)

    def refuse(path: Path) -> None:
        raise error(str(path))

    monkeypatch.setattr(os, "utime", refuse)
    assert cache.fetch(uri) == copy is not None


class Source:
    """A file of an object store that gives `chunks`, one a call, and says it has `size` bytes."""

    def __init__(self, chunks: list[bytes], size: int, kind: pafs.FileType = pafs.FileType.File) -> None:
        self.chunks, self.size, self.kind = chunks, size, kind
        self.seen: list[list[str]] = []
        """Names in the cache's folder at each call."""
        self.folder = Path()

    def get_file_info(self, path: str) -> SimpleNamespace:
        return SimpleNamespace(type=self.kind, size=self.size, mtime_ns=7)

    def open_input_stream(self, path: str) -> Source:
        return self

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def read(self, size: int) -> bytes:
        self.seen.append([path.suffix for path in self.folder.iterdir()])
        if not self.chunks:
            return b""
        if self.chunks[0] == b"gone":
            raise OSError("the network is gone")
        return self.chunks.pop(0)


def fetch_from(source: Source, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str | None:
    source.folder = folder
    monkeypatch.setattr("tune_ego.feed.cache.storage.resolve", lambda uri: (source, "path"))
    return ShardCache(str(folder), 1000).fetch("s3://bucket/part.parquet")


def test_a_copy_has_its_name_once_it_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source([b"abc", b"defg"], 7)
    copy = fetch_from(source, tmp_path / "cache", monkeypatch)
    assert copy is not None and Path(copy).read_bytes() == b"abcdefg"
    assert source.seen == [[".part"]] * 3
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [Path(copy).name]
    assert Path(copy).suffix == ".parquet"


@pytest.mark.parametrize("chunks", [[b"abc"], [], [b"abc", b"defghi"]])
def test_a_copy_of_another_size_is_no_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunks: list[bytes]
) -> None:
    assert fetch_from(Source(chunks, 7), tmp_path / "cache", monkeypatch) is None
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_shard_that_cannot_be_read_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="the network is gone"):
        fetch_from(Source([b"abc", b"gone"], 7), tmp_path / "cache", monkeypatch)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_folder_is_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch_from(Source([b"abc"], 3, pafs.FileType.Directory), tmp_path / "cache", monkeypatch) is None
    assert not (tmp_path / "cache").exists()


def test_the_cache_is_that_of_the_configuration() -> None:
    assert ShardCache.from_config(DataConfig(cache_dir="/cache", cache_gb=1.5)) == ("/cache", 1_500_000_000)
    assert ShardCache.from_config(DataConfig()) is None


def test_a_cache_that_takes_nothing_is_done_without(remote: list[Clip], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (ShardCache(str(tmp_path / "file"), 10**9), ShardCache(str(tmp_path / "small"), 100)):
        assert cache.fetch(remote[0].shard) is None
        assert np.array_equal(read(remote, cache), EXPECTED)
    assert not (tmp_path / "small").exists()


def test_a_full_disk_leaves_no_half_copy(remote: list[Clip], tmp_path: Path) -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size(remote[0]) // 2, hard))
    try:
        assert ShardCache(str(tmp_path / "cache"), 10**9).fetch(remote[0].shard) is None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / "cache").iterdir())


def test_several_readers_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    """None fails, and what one reads is whole, whatever the others remove. They share nothing but the folder."""
    uris = [store(tmp_path / "store", number, 100_000) for number in range(6)]

    def fetch_often(seed: int) -> int:
        order, copies = random.Random(seed), 0
        for _ in range(150):
            uri = order.choice(uris)
            copy = ShardCache(str(tmp_path / "cache"), 300_000).fetch(uri)
            if copy is not None:
                with suppress(FileNotFoundError):  # another one has made room
                    assert Path(copy).read_bytes() == Path(uri.removeprefix("file://")).read_bytes()
                    copies += 1
        return copies

    with ThreadPoolExecutor(3) as pool:
        assert all(copies > 50 for copies in pool.map(fetch_often, range(3)))


def test_a_copy_that_vanishes_before_it_is_opened_is_done_without(
    remote: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardCache, "fetch", lambda *_: str(tmp_path / "gone.parquet"))
    assert np.array_equal(read(remote, ShardCache(str(tmp_path), 10**9)), EXPECTED)
