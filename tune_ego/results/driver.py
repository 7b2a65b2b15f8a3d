"""The driver of a search or run: the process that starts it, prints its progress and handles signals.

At most one process drives a folder at a time. `driver.json` in the folder names this process and is renewed while it
is alive. At the first SIGINT or SIGTERM the driver writes the file `stop`; the runs then write a checkpoint and end.
Both are files because drivers and workers may be on different machines.
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
_HEARTBEAT_EVERY = 15.0
_DEAD_AFTER = 60.0
"""Age of the last heartbeat from which on a driver counts as dead."""
_CLAIM_SETTLES_AFTER = 0.5
"""Wait between claiming a folder and reading the claim back. If two processes claim at once, the last writer wins."""
_CHECKPOINTS_WITHIN = 60.0
"""Time that the runs have for their checkpoints after the first signal. Then the driver ends without them."""


def stop_uri(root: str) -> str:
    """Return the path or URI of the stop file of a search or run."""
    return storage.join(root, STOP_FILE)


def is_alive(root: str) -> bool:
    """Return whether a process drives the search or run in this folder or at this URI."""
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
    except PermissionError:  # another user's process
        return True
    return True


class Interruption:
    """Handler of SIGINT and SIGTERM; true after the first signal.

    At the first signal the runs write checkpoints, within 60 s, and end. A second signal ends the driver at once.
    """

    def __init__(self, root: str) -> None:
        self._root = root
        self._event = threading.Event()

    def __bool__(self) -> bool:
        return self._event.is_set()

    def __reduce__(self) -> Any:
        """Pickle without event and timer: Ray pickles the searcher, which refers to this object, but never loads it."""
        return Interruption, (self._root,)

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self._event.set()
        say(f"Interrupted: writing checkpoints, {_CHECKPOINTS_WITHIN:.0f} s at most; interrupt again to end at once")
        # In a thread: a signal handler should not wait for an object store.
        threading.Thread(target=storage.write_text, args=(stop_uri(self._root), ""), daemon=True).start()
        self._timer = threading.Timer(_CHECKPOINTS_WITHIN, _thread.interrupt_main)
        self._timer.daemon = True
        self._timer.start()

    def cancel_timer(self) -> None:
        """Cancel the time limit of the checkpoints, if it is running."""
        if self._event.is_set():
            self._timer.cancel()


@contextmanager
def driving(root: str, resume_command: str) -> Iterator[Interruption]:
    """Make this process the driver of the search or run at `root` while the body runs.

    Args:
        root: The folder or URI.
        resume_command: The command that is printed if the body was interrupted. The process then ends with exit
            code 130.

    Raises:
        UserError: Another process drives this search or run.
    """
    other = _record(root) or {}
    ours = (other.get("host"), other.get("pid")) == (socket.gethostname(), os.getpid())  # of an earlier call
    if is_alive(root) and not ours:
        raise _already_driven(root, other)
    record = {"id": uuid.uuid4().hex, "host": socket.gethostname(), "pid": os.getpid()}
    uri, ended = storage.join(root, DRIVER_FILE), threading.Event()

    def write_heartbeat() -> None:
        storage.write_json(uri, {**record, "beat": time.time()})

    def keep_writing() -> None:
        while not ended.wait(_HEARTBEAT_EVERY):
            try:
                write_heartbeat()
            except UserError as error:  # the next write may succeed
                say(str(error))

    write_heartbeat()
    time.sleep(_CLAIM_SETTLES_AFTER)
    if (winner := _record(root) or record)["id"] != record["id"]:
        raise _already_driven(root, winner)
    storage.remove(stop_uri(root))
    storage.remove_partial(root)
    interruption = Interruption(root)
    heartbeat = threading.Thread(target=keep_writing, daemon=True)
    heartbeat.start()
    try:
        with _signals_handled(interruption):
            yield interruption
    except (KeyboardInterrupt, Interrupted):
        end_interrupted(resume_command)
    finally:
        ended.set()
        heartbeat.join()
        interruption.cancel_timer()
        for file in (DRIVER_FILE, STOP_FILE):
            storage.remove(storage.join(root, file))


def _already_driven(root: str, record: dict[str, Any]) -> UserError:
    return UserError(
        f"{root}: process {record.get('pid')} on {record.get('host')} drives this search or run; end that process "
        f"first (if it died on another machine, wait {_DEAD_AFTER:.0f} seconds)"
    )


@contextmanager
def _signals_handled(interruption: Interruption) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, interruption.on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
