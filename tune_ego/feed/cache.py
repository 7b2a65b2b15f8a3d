"""Copies of remote shards on the machine's own disk: only the first read of a shard uses the network."""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs

from tune_ego import storage
from tune_ego.config import DataConfig

_PART = ".part"
_DAY = 86400  # seconds
_CHUNK = 1 << 22


class ShardCache(NamedTuple):
    """Folder with copies of shards, shared by several processes.

    The folder may exceed its limit by the shards that processes fetch at the same moment, and by removed copies that
    are still open.
    """

    folder: str
    limit: int
    """Largest size of all copies, bytes."""

    @classmethod
    def from_config(cls, data: DataConfig) -> ShardCache | None:
        """Return the cache of a configuration; None if it has no `cache_dir`."""
        return cls(data.cache_dir, int(data.cache_gb * 1e9)) if data.cache_dir is not None else None

    def fetch(self, uri: str) -> str | None:
        """Return the path of a shard's copy, and fetch the shard if there is no copy yet.

        Returns None where the folder cannot hold the copy. A shard that was written again has another size or
        modification time, and so another copy. Another process may remove a copy before it is opened.

        Raises:
            OSError: The shard cannot be read.
        """
        filesystem, path = storage.resolve(uri)
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File or info.size > self.limit:
            return None
        identity = f"{uri} {info.size} {info.mtime_ns}"
        copy = Path(self.folder) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.parquet"
        if copy.exists():
            with suppress(PermissionError, FileNotFoundError):  # another user's file; removed at this moment
                os.utime(copy)  # `_make_room` removes the copies used longest ago
            return str(copy)
        part = copy.with_name(f"{copy.name}.{uuid.uuid4().hex}{_PART}")
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            self._make_room(info.size)
            target = part.open("wb", buffering=0)
        except OSError:
            return None
        try:
            with target, filesystem.open_input_stream(path) as source:
                while chunk := source.read(_CHUNK):
                    try:
                        target.write(chunk)
                    except OSError:  # the disk is full
                        return None
            try:
                if part.stat().st_size != info.size:
                    return None
                part.replace(copy)
            except OSError:
                return None
        finally:
            part.unlink(missing_ok=True)
        return str(copy)

    def _make_room(self, size: int) -> None:
        """Remove copies, starting with the copies used longest ago, until `size` more bytes fit.

        An open copy stays readable. Unfinished copies count towards the limit. They are removed after a day, when they
        must be left over from a process that was killed.
        """
        copies = []
        for path in Path(self.folder).glob("*.parquet*"):
            try:
                status = path.stat()
            except FileNotFoundError:  # another process was faster
                continue
            if path.suffix == _PART and time.time() - status.st_mtime < _DAY:
                size += status.st_size
                continue
            copies.append((status.st_mtime, status.st_size, path))
        total = sum(copy_size for _, copy_size, _ in copies)
        for _, copy_size, path in sorted(copies):
            if total + size <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= copy_size
