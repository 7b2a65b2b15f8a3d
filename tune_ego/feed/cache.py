"""Copies of remote shards on a machine's own disk, so that only the first reading of each goes over the network."""

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
    """A folder that is to hold at most so many bytes of shards; several processes may use it at a time.

    What they fetch at the same moment, and what they hold open while others remove it, comes on top.
    """

    folder: str
    limit: int

    @classmethod
    def of(cls, data: DataConfig) -> ShardCache | None:
        return cls(data.cache_dir, int(data.cache_gb * 1e9)) if data.cache_dir is not None else None

    def fetch(self, uri: str) -> str | None:
        """The path of a copy of a shard, made where there is none; None where the folder cannot take it.

        A shard that was written anew has another size or date, and so another copy. Another process may remove a copy
        before it is opened. Raises `OSError` where the shard cannot be read.
        """
        filesystem, path = storage.resolve(uri)
        info = filesystem.get_file_info(path)
        if info.type != pafs.FileType.File or info.size > self.limit:
            return None
        identity = f"{uri} {info.size} {info.mtime_ns}"
        copy = Path(self.folder) / f"{hashlib.sha256(identity.encode()).hexdigest()[:24]}.parquet"
        if copy.exists():
            with suppress(PermissionError, FileNotFoundError):  # another user's; removed at this moment
                os.utime(copy)  # those opened longest ago go first
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
        """Remove copies, those opened longest ago first, until so many bytes more fit; what is open stays readable.

        Of what is being fetched only what is left of processes that ended a day ago is removed.
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
        total = sum(held for _, held, _ in copies)
        for _, held, path in sorted(copies):
            if total + size <= self.limit:
                return
            path.unlink(missing_ok=True)
            total -= held
