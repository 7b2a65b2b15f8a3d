"""The process that drives a search or a run: one at a time, and ended by a signal only after checkpoints.

`driver.json` in the folder says who drives it, and is renewed while that lives; `stop` asks its runs to write a
checkpoint and end. Both are files because drivers and workers may be on different machines.
"""

from __future__ import annotations

import _thread
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tune_ego import storage
from tune_ego.cluster import end_interrupted
from tune_ego.console import say
from tune_ego.errors import Interrupted, UserError

DRIVER_FILE = "driver.json"
STOP_FILE = "stop"
# Seconds.
_BEAT_EVERY = 15.0
_DEAD_AFTER = 60.0
_CLAIM_STANDS_AFTER = 0.5
"""Two that claimed a folder at the same moment both see who wrote last."""
_CHECKPOINTS_WITHIN = 60.0
"""After the first signal; then the driver ends without them."""


def stop_uri(root: str) -> str:
    return storage.join(root, STOP_FILE)


def is_alive(root: str) -> bool:
    """Whether a process drives the search or run in this folder or at this URI."""
    record = _record(root)
    if record is None or time.time() - record["beat"] > _DEAD_AFTER:
        return False
    return record["host"] != socket.gethostname() or _is_running(record["pid"])


def _record(root: str) -> dict[str, Any] | None:
    uri = storage.join(root, DRIVER_FILE)
    return storage.read_json(uri) if storage.exists(uri) else None


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


class Interruption:
    """What the first SIGINT or SIGTERM sets off: the runs write checkpoints and end. A second one ends at once."""

    def __init__(self, root: str) -> None:
        self._root = root
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def __reduce__(self) -> Any:
        """Ray pickles what holds this, and never reads it back."""
        return Interruption, (self._root,)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
        say("Interrupted: a checkpoint is written first; once more to end at once")
        # Not here: a handler should not wait for an object store.
        threading.Thread(target=storage.write_text, args=(stop_uri(self._root), ""), daemon=True).start()
        self._timer = threading.Timer(_CHECKPOINTS_WITHIN, _thread.interrupt_main)
        self._timer.daemon = True
        self._timer.start()

    def over(self) -> None:
        if self._event.is_set():
            self._timer.cancel()


@contextmanager
def driving(root: str, to_go_on: str) -> Iterator[Interruption]:
    """Drive the search or run at `root` in the body; raises `UserError` where another process does.

    Interrupted, the process ends with a line that says `to_go_on` and an exit code of its own.
    """
    other = _record(root) or {}
    ours = (other.get("host"), other.get("pid")) == (socket.gethostname(), os.getpid())  # of an earlier life
    if is_alive(root) and not ours:
        raise _driven_by(root, other)
    record = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    uri, ended = storage.join(root, DRIVER_FILE), threading.Event()

    def beat() -> None:
        storage.write_json(uri, {**record, "beat": time.time()})

    def keep_beating() -> None:
        while not ended.wait(_BEAT_EVERY):
            try:
                beat()
            except UserError as error:  # the next one may work
                say(str(error))

    beat()
    time.sleep(_CLAIM_STANDS_AFTER)
    if (winner := _record(root) or record)["id"] != record["id"]:
        raise _driven_by(root, winner)
    storage.remove(stop_uri(root))
    storage.remove_partial(root)
    interruption = Interruption(root)
    heart = threading.Thread(target=keep_beating, daemon=True)
    heart.start()
    try:
        with _handled(interruption):
            yield interruption
    except (KeyboardInterrupt, Interrupted):
        end_interrupted(to_go_on)
    finally:
        ended.set()
        heart.join()
        interruption.over()
        for file in (DRIVER_FILE, STOP_FILE):
            storage.remove(storage.join(root, file))


def _driven_by(root: str, record: dict[str, Any]) -> UserError:
    return UserError(
        f"{root}: process {record.get('pid')} on {record.get('host')} drives it; end that one first (one that died on "
        f"another machine is forgotten after {_DEAD_AFTER:.0f} seconds)"
    )


@contextmanager
def _handled(interruption: Interruption) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interruption.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
