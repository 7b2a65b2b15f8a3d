"""Copies of remote shards; `file://` stands for an object store here, whose test is in test_s3."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tune_ego.dataset.shards import Clip, open_shards
from tune_ego.errors import UserError
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.windows import Window, WindowReader, close_shards


@pytest.fixture
def remote(shards: str, tmp_path: Path) -> list[Clip]:
    """The first clip of each of three shards, which lie on an object store."""
    (tmp_path / "store").mkdir()
    found: dict[str, Clip] = {}
    for clip in open_shards(shards).test(1):
        found.setdefault(clip.shard, clip)
    clips = []
    for number, (shard, clip) in enumerate(list(found.items())[:3]):
        path = tmp_path / "store" / f"{number}.parquet"
        path.write_bytes(Path(shard).read_bytes())
        os.utime(path, ns=(0, 10**18 + number))
        clips.append(replace(clip, shard=f"file://{path}"))
    return clips


def read(clips: list[Clip], cache: ShardCache | None) -> np.ndarray:
    close_shards()
    reader = WindowReader(clips, ("rgb",), (48, 36), 32, cache)
    windows: list[Window | None] = [Window(index, 0, 0, 0, False) for index in range(len(clips))]
    return reader.read_batch(windows)["rgb"]


def size(clip: Clip) -> int:
    return Path(clip.shard.removeprefix("file://")).stat().st_size


def spoil(clip: Clip, *, date: int) -> None:
    path = Path(clip.shard.removeprefix("file://"))
    path.write_bytes(b"x" * size(clip))
    os.utime(path, ns=(0, date))


def test_a_shard_is_read_from_its_copy_until_it_is_written_anew(remote: list[Clip], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10**9)
    expected = read(remote, None)
    assert np.array_equal(read(remote, cache), expected)
    assert len(list((tmp_path / "cache").iterdir())) == len(remote)
    spoil(remote[0], date=10**18)  # of the same size and date: only the copy can give these frames
    assert np.array_equal(read(remote, cache), expected)
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


def test_a_cache_that_takes_nothing_is_done_without(remote: list[Clip], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for cache in (ShardCache(str(tmp_path / "file"), 10**9), ShardCache(str(tmp_path / "small"), 100)):
        assert cache.fetch(remote[0].shard) is None
        assert np.array_equal(read(remote, cache), read(remote, None))
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


_FETCHER = """
import random, sys
from tune_ego.feed.cache import ShardCache
folder, limit, *uris = sys.argv[1:]
cache, got = ShardCache(folder, int(limit)), 0
for number in range(150):
    copy = cache.fetch(random.choice(uris))
    if copy is not None:
        try:
            content = open(copy, "rb").read()
        except FileNotFoundError:  # another one has made room
            continue
        assert len(set(content)) == 1 and len(content) == 1_000_000
        got += 1
print(got)
"""


def test_several_processes_share_a_cache_that_is_too_small(tmp_path: Path) -> None:
    """None fails, and what one reads is whole, whatever the others remove."""
    uris = []
    for number in range(6):
        path = tmp_path / f"{number}.parquet"
        path.write_bytes(bytes([number]) * 1_000_000)
        uris.append(f"file://{path}")
    command = [sys.executable, "-c", _FETCHER, str(tmp_path / "cache"), "3000000", *uris]
    fetchers = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=Path(__file__).parents[1]) for _ in range(3)]
    for fetcher in fetchers:
        output, _ = fetcher.communicate()
        assert fetcher.returncode == 0 and int(output) > 50


def test_a_copy_that_vanishes_before_it_is_opened_is_done_without(
    remote: list[Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ShardCache, "fetch", lambda *_: str(tmp_path / "gone.parquet"))
    assert np.array_equal(read(remote, ShardCache(str(tmp_path), 10**9)), read(remote, None))
