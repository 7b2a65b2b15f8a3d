"""Event files of TensorBoard, written by the thread that logs.

tensorboardX's own writer has a thread that dies at the first error, for example on a full disk. Its `close` then waits
for that thread for ever.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.record_writer import masked_crc32c


class EventFile:
    """A file of summaries (`tensorboardX.summary`) in a local folder."""

    def __init__(self, folder: str) -> None:
        self._path = Path(folder) / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}"
        self._length = 0
        """Bytes of the whole records so far."""
        self._begin()

    def _begin(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._length = 0
        self._append([Event(wall_time=time.time(), file_version="brain.Event:2")])

    def append(self, summaries: Iterable[tuple[Any, int]]) -> None:
        """Write summaries, each with its step: all of them, or none where an `OSError` is raised.

        A file that was removed meanwhile begins anew.
        """
        if not self._path.exists() or self._path.stat().st_size < self._length:
            self._begin()
        self._append([Event(wall_time=time.time(), step=step, summary=summary) for summary, step in summaries])

    def _append(self, events: list[Event]) -> None:
        records = b"".join(_record(event.SerializeToString()) for event in events)
        with open(self._path, "ab") as file:
            file.truncate(self._length)  # what an earlier attempt has left
            file.write(records)
        self._length += len(records)


def _record(data: bytes) -> bytes:
    """Return a record of a TFRecord file: length, its checksum, the data, their checksum."""
    length = struct.pack("<Q", len(data))
    return b"".join((length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data))))
