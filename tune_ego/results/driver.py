"""The driver of a search or run: the process that starts it, prints its progress and handles signals.

At most one process drives a folder at a time. `driver.json` in the folder names this process and is renewed while it
is alive. At the first SIGINT, SIGTERM or SIGHUP the driver writes the file `stop`; the runs then write a checkpoint
and end. Both are files because drivers and workers may be on different machines.
"""

from __future__ import annotations

import _thread
import math
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from tune_ego import storage
from tune_ego.console import say, say_once
from tune_ego.driver_signals import abort, end_interrupted, last_act, signals_handled
from tune_ego.errors import ClusterLost, FolderGone, FolderLost, Interrupted, StorageError, UserError
from tune_ego.processes import is_running, this_process

DRIVER_FILE = "driver.json"
STOP_FILE = "stop"
# Seconds.
_HEARTBEAT_EVERY = 15.0
_CONFIRM_AFTER = 30.0
"""Time without a heartbeat after which the driver reads its claim again before it writes anything else."""
_DEAD_AFTER = 60.0
"""Time without a new heartbeat after which a driver on another machine counts as dead."""
_CLAIM_SETTLES_AFTER = 0.5
"""Wait between claiming a folder and reading the claim back. If two processes claim at once, the last writer wins."""
_STOP_WRITTEN_WITHIN = 5.0
_CHECKPOINTS_WITHIN = 60.0
"""Time that the runs have for their checkpoints after the first signal. Then the driver ends without them."""


def stop_uri(root: str) -> str:
    """Return the path or URI of the stop file of a search or run."""
    return storage.join(root, STOP_FILE)


def is_alive(root: str) -> bool:
    """Return whether a process drives the search or run in this folder or at this URI, to show it.

    A driver on this machine is alive while its process is. For another machine's the time of its last heartbeat is
    compared with this machine's clock.
    """
    record = _record(root)
    if record is None:
        return False
    running = is_running(record)
    return time.time() - record["time"] < _DEAD_AFTER if running is None else running


def _record(root: str) -> dict[str, Any] | None:
    """Return the content of `driver.json`, None without one. A damaged one names no driver; a printed line says so."""
    uri = storage.join(root, DRIVER_FILE)
    try:
        record = storage.read_json(uri)
    except FileNotFoundError:
        return None
    except UserError:
        record = None
    if _is_whole(record):
        return dict(record)
    say_once(f"{uri}: damaged, and ignored")
    return None


def _is_whole(record: Any) -> bool:
    if not isinstance(record, dict) or not {"id", "time", "beat", *this_process()} <= record.keys():
        return False
    numbers = [record["time"], record["beat"], record["pid"]]
    return all(isinstance(number, (int, float)) and math.isfinite(number) for number in numbers)


class Interruption:
    """Handler of signals; true after the first one.

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
        self._writer = threading.Thread(target=self._write_stop, daemon=True)
        self._writer.start()
        self._timer = threading.Timer(_CHECKPOINTS_WITHIN, _thread.interrupt_main)
        self._timer.daemon = True
        self._timer.start()

    def _write_stop(self) -> None:
        """Write the stop file, unless it would stop the runs of another driver."""
        if not (self._root in _claims and is_taken_over(self._root, claim_id(self._root))):
            storage.write_text(stop_uri(self._root), "")

    def end(self) -> None:
        """Cancel the time limit of the checkpoints, and wait for the stop file, which would else appear later."""
        if self._event.is_set():
            self._timer.cancel()
            self._writer.join(_STOP_WRITTEN_WITHIN)


class _Claim:
    """Ownership of a folder: `driver.json` with a random id of this driver, written again at each heartbeat."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.lost = False
        """Whether this process no longer has the folder. Nothing is written to it then."""
        self.gone = False
        """Whether it is lost and has no record of a driver."""
        self.held = False
        """Whether this process drives the folder now."""
        self.closed = False
        """Whether the claim is being released, or was."""
        self._uri = storage.join(root, DRIVER_FILE)
        self.id = uuid.uuid4().hex
        self._record = {"id": self.id, "host": socket.gethostname(), **this_process(), "beat": 0}
        self._lock = threading.Lock()
        self._confirmed = time.monotonic()
        self._ended = threading.Event()
        self._beating = threading.Lock()

    def take(self) -> None:
        """Claim the folder. Raises `UserError` where another process drives it."""
        self.lost = True
        _wait_for_other_driver(self.root)
        self.lost = False
        self._write()
        time.sleep(_CLAIM_SETTLES_AFTER)
        winner = _record(self.root) or self._record
        if winner["id"] != self.id:
            self.lost = True
            raise _already_driven(self.root, winner)
        self.held = True
        _claims[self.root] = self

    def _write(self) -> None:
        self._record |= {"beat": self._record["beat"] + 1, "time": time.time()}
        storage.write_json(self._uri, self._record)

    def confirm(self, after: float) -> None:
        """Raise `FolderLost` if another driver has taken the folder over, `FolderGone` if it has no record of one.

        The file is read if this was last confirmed more than `after` seconds ago: a process that was suspended, or
        could not reach its storage, does not know.
        """
        with self._lock:
            if not self.lost and time.monotonic() - self._confirmed >= after:
                record = _record(self.root)
                self.lost = record is None or record["id"] != self.id
                self.gone = record is None
                self._confirmed = time.monotonic()
        if self.gone:
            raise FolderGone(
                f"{self._uri} is gone: the folder was removed or is not mounted any more, or another driver has taken "
                "it over and has ended. This driver writes nothing more"
            )
        if self.lost:
            raise FolderLost(f"{self.root}: another driver has taken this over; this one ends and writes nothing more")

    def keep(self) -> None:
        """Write heartbeats until `release`.

        Ends the main thread with `FolderLost` if the folder is lost, and with `StorageError` if it cannot be reached
        within `storage.patience`.
        """
        while not self._ended.wait(_HEARTBEAT_EVERY):
            failure: UserError | None = None
            with self._beating:
                try:
                    if not self._ended.is_set():
                        self.confirm(after=0.0)
                        self._write()
                except UserError as error:
                    failure = error
                except OSError as error:
                    failure = StorageError(f"{self._uri}: cannot be read ({storage.describe_error(error)})")
            if failure is not None and not self._ended.is_set():
                abort(failure, self._ended)
                return

    def release(self, *, hide_errors: bool) -> None:
        """End the heartbeats, and remove the files of the driver unless the folder is lost.

        `hide_errors`: an error is on its way, and a later one must not hide it.
        """
        self.closed, self.held = True, False
        self._ended.set()
        # A heartbeat that is being written would bring the file back after its removal.
        if self._beating.acquire(timeout=_STOP_WRITTEN_WITHIN):
            self._beating.release()
        _claims.pop(self.root, None)
        try:
            self.remove_files()
        except (OSError, UserError):
            if not hide_errors:
                raise

    def remove_files(self) -> None:
        """Remove the files of the driver unless the folder is lost, also where this is not known yet."""
        if not self.lost and not is_taken_over(self.root, self.id):
            for file in (DRIVER_FILE, STOP_FILE):
                storage.remove(storage.join(self.root, file))


_claims: dict[str, _Claim] = {}
"""Folder or URI -> the claim of this process."""


def confirm(root: str) -> None:
    """Raise `FolderLost` if this process drove `root` and another driver has taken it over.

    For a process that does not drive `root` nothing is checked.
    """
    if root in _claims:
        _claims[root].confirm(_CONFIRM_AFTER)


def claim_id(root: str) -> str:
    """Return the id of this process's claim of a folder that it drives."""
    return _claims[root].id


def is_taken_over(root: str, claim: str) -> bool:
    """Return whether another driver than that of `claim` drives a folder now. For workers."""
    record = _record(root) if claim else None
    return record is not None and record["id"] != claim


def _wait_for_other_driver(root: str) -> None:
    """Raise `UserError` if another process drives a folder.

    A driver on another machine is alive if its heartbeat changes while this function watches it. Clocks of two machines
    are never compared.
    """
    other = _record(root)
    if other is None or (running := is_running(other)) is False:
        return
    if running:
        if {key: other[key] for key in this_process()} == this_process():  # of an earlier call
            return
        raise _already_driven(root, other)
    say(f"{root}: was driven from {other.get('host')}; watching for {_DEAD_AFTER:.0f} s whether that driver is alive")
    end = time.monotonic() + _DEAD_AFTER
    while time.monotonic() < end:
        time.sleep(min(1.0, _DEAD_AFTER / 10))
        now = _record(root)
        if now is None:
            return
        if (now["id"], now["beat"]) != (other["id"], other["beat"]):
            raise _already_driven(root, now)


def refuse_driven(root: str) -> None:
    """Raise `UserError` if another process of this machine drives a folder: a check before Ray starts."""
    other = _record(root)
    if other is not None and is_running(other) and {key: other[key] for key in this_process()} != this_process():
        raise _already_driven(root, other)


def _already_driven(root: str, record: dict[str, Any]) -> UserError:
    return UserError(
        f"{root}: process {record['pid']} on {record.get('host')} drives this search or run; end that process first"
    )


@contextmanager
def driving(root: str, resume_command: str) -> Iterator[Interruption]:
    """Make this process the driver of the search or run at `root` while the body runs.

    Args:
        root: The folder or URI.
        resume_command: The command that is printed if the body was interrupted, with exit code 130, or has failed.

    Raises:
        UserError: Another process drives this search or run.
        FolderLost: Another process has taken it over while this one was suspended or cut off.
    """
    claim, interruption, failed = _Claim(root), Interruption(root), True

    def handle(number: int, frame: FrameType | None) -> None:
        if claim.held:
            interruption.on_signal(number, frame)
        elif not claim.closed:
            raise KeyboardInterrupt

    def leave() -> None:
        print(_how_to_resume(resume_command), file=sys.stderr)
        claim.remove_files()

    with signals_handled(handle):
        try:
            claim.take()
            storage.remove(stop_uri(root))
            storage.remove_partial(root)
            threading.Thread(target=claim.keep, daemon=True).start()
            with last_act(leave), storage.patience(before_writing_again=lambda: claim.confirm(after=0.0)):
                yield interruption
            failed = False
        except (KeyboardInterrupt, Interrupted):
            if not claim.held:
                raise
            end_interrupted(resume_command)
        except (ClusterLost, FolderGone, StorageError, SystemError, OSError) as error:
            # Compiled code of Ray makes a `SystemError` of what `abort` raises in it.
            cause = error.__cause__ or error.__context__ if isinstance(error, SystemError) else error
            # Else there is nothing to resume, or it is a fault of another kind.
            if not claim.held or not isinstance(cause, (UserError, OSError)):
                raise
            if isinstance(cause, FolderLost) and not isinstance(cause, FolderGone):  # the other driver goes on
                raise cause from error
            text = str(cause) if isinstance(cause, UserError) else storage.describe_error(cause)
            raise UserError(f"{text}. {_how_to_resume(resume_command)}") from error
        finally:
            interruption.end()
            claim.release(hide_errors=failed)


def _how_to_resume(command: str) -> str:
    return f"To resume from the last checkpoint, run: {command}"
