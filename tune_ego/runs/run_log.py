"""Log of a training process, in its run's folder: what it prints and logs, and the traceback of an error."""

from __future__ import annotations

import logging
import platform
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TextIO

from tune_ego import __version__, storage
from tune_ego.errors import UserError
from tune_ego.results import experiment

_MOST_BYTES = 1 << 16
"""Size of a log; older lines are dropped."""
_WRITE_EVERY = 10.0
"""Seconds between two writes of a log that has changed."""


class RunLog:
    """Last lines of a process, written to `uri` while `recording`. A failing write does not end the run."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._lock = threading.Lock()
        self._text = ""
        self._changed = False

    def add(self, text: str) -> None:
        """Append text, and drop the oldest lines beyond the size of a log."""
        with self._lock:
            self._text, self._changed = _last_lines(self._text + text), True

    def flush(self) -> None:
        """Write the log if it has changed."""
        with self._lock:
            text, changed, self._changed = self._text, self._changed, False
        if changed:
            try:
                storage.write_bytes(self.uri, text.encode(errors="replace"))  # a path may hold any bytes
            except (OSError, UserError):  # the next write may succeed
                self._changed = True

    def read(self) -> None:
        """Start with the log of an earlier process."""
        try:
            if storage.exists(self.uri):
                self._text = _last_lines(storage.read_bytes(self.uri).decode(errors="replace"))
        except (OSError, UserError):
            return


def _last_lines(text: str) -> str:
    data = text.encode(errors="replace")
    if len(data) <= _MOST_BYTES:
        return text
    return data[-_MOST_BYTES:].partition(b"\n")[2].decode(errors="replace")


class _Copy:
    """Stream that writes to another stream and to a log."""

    def __init__(self, stream: TextIO, log: RunLog) -> None:
        self._stream, self._log = stream, log

    def write(self, text: str) -> int:
        self._log.add(text)
        return self._stream.write(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)


class _Handler(logging.Handler):
    def __init__(self, log: RunLog) -> None:
        super().__init__(logging.WARNING)
        self._log = log
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self._log.add(self.format(record) + "\n")


def log_uri(run: str, rank: int = 0) -> str:
    """Return the log of worker `rank` of a run."""
    return storage.join(run, experiment.LOG_FILE if rank == 0 else f"log-{rank}.txt")


@contextmanager
def recording(run: str, rank: int) -> Iterator[None]:
    """Record the output, warnings and errors of this process in the run's log while the body runs.

    An exception of the body is logged with its traceback and raised again.
    """
    log = RunLog(log_uri(run, rank))
    log.read()
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    log.add(f"--- {now}: worker {rank} starts on {platform.node()}, tune_ego {__version__}\n")
    ended = threading.Event()

    def write() -> None:
        while not ended.wait(_WRITE_EVERY):
            log.flush()

    streams = sys.stdout, sys.stderr
    handler = _Handler(log)
    thread = threading.Thread(target=write, daemon=True)
    sys.stdout, sys.stderr = _Copy(streams[0], log), _Copy(streams[1], log)
    logging.getLogger().addHandler(handler)
    log.flush()
    thread.start()
    try:
        yield
    except BaseException:
        log.add(traceback.format_exc())
        raise
    finally:
        sys.stdout, sys.stderr = streams
        logging.getLogger().removeHandler(handler)
        ended.set()
        thread.join()
        log.flush()


def last_log_lines(run: str, count: int) -> list[str]:
    """Return the last lines of a run's log (of worker 0); an empty list without one."""
    uri = log_uri(run)
    if not storage.exists(uri):
        return []
    return storage.read_bytes(uri).decode(errors="replace").splitlines()[-count:]
