"""Processes and folders of a Ray cluster that this process starts: none is left behind."""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tune_ego import ray_private
from tune_ego.driver_signals import EndedInterrupted, last_act
from tune_ego.processes import is_running, processes_of_sessions, this_process

_MARK = "tune_ego.json"
"""File in the folder of a session that was started here. It names the process."""
_KEPT_FAILURES = 3


def ray_folder() -> Path:
    """Return the folder in which Ray keeps a folder for each of its sessions on this machine."""
    return Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", "ray")


@contextmanager
def own_cluster() -> Iterator[None]:
    """Clean up after a cluster that `ray.init` starts in the body, and that `ray.shutdown` ends there.

    Its processes have sessions of their own, and none outlives the body. The folder of its logs, which Ray never
    deletes, is deleted, unless the body fails: then this folder and those of two failures before it are kept.
    """
    _remove_old_folders()  # of processes that were killed
    folders = _Folders()
    with ray_private.own_sessions(folders.mark) as processes:
        _started.append(processes)
        interrupted = threading.Event()

        def clean() -> None:
            _kill(processes)
            if interrupted.is_set():
                folders.remove()

        # If Ray's start was interrupted, its processes end when this process ends, before this is called: exit
        # handlers are called in reverse order.
        atexit.register(clean)
        try:
            with last_act(clean):
                yield
        except BaseException as error:
            if isinstance(error, (EndedInterrupted, KeyboardInterrupt)):
                interrupted.set()
            clean()
            raise
        else:
            clean()
            folders.remove()
        finally:
            _started.remove(processes)
            _remove_old_folders(folders.own())


_started: list[list[subprocess.Popen[bytes]]] = []
"""Processes of Ray that `own_cluster` has started, for each of its bodies that runs."""


def ended_processes() -> list[str]:
    """Return the names of processes of Ray that were started here and have ended, e.g. `raylet`."""
    ended = [process for process in itertools.chain.from_iterable(_started) if process.poll() is not None]
    commands = [process.args if isinstance(process.args, list) else [process.args] for process in ended]
    return [Path(os.fsdecode(command[0])).name for command in commands if command]  # type: ignore[arg-type]


def _kill(processes: list[subprocess.Popen[bytes]]) -> None:
    """Kill what is left of Ray's processes: agents and workers end by themselves only after half a minute."""
    for pid in processes_of_sessions([process.pid for process in processes]):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    processes.clear()


class _Folders:
    """Folders of the sessions that this process starts. Their names end in its pid."""

    def __init__(self) -> None:
        self._pattern = f"session_*_{os.getpid()}"
        self._before = self._all()  # of another process with this pid, in a container that shares the folder

    def _all(self) -> set[Path]:
        return set(ray_folder().glob(self._pattern))

    def mark(self) -> None:
        """Name this process in each folder, so that a later process finds it if this one is killed."""
        for folder in self.own():
            (folder / _MARK).write_text(json.dumps(this_process()))

    def own(self) -> set[Path]:
        """Return the folders."""
        return self._all() - self._before

    def remove(self) -> None:
        """Delete the folders."""
        for folder in self.own():
            _remove(folder)


def _remove_old_folders(ended: set[Path] = frozenset()) -> None:  # type: ignore[assignment]
    """Delete the folders of sessions that were started here and are over, except the latest ones.

    `ended` are folders of this process whose sessions are over.
    """
    over = []
    for mark in ray_folder().glob(f"session_2*/{_MARK}"):
        try:
            if mark.parent in ended or is_running(json.loads(mark.read_text())) is False:
                over.append(mark.parent)
        except (OSError, ValueError, AttributeError):  # it has just been deleted, or is damaged
            continue
    for folder in sorted(over, key=lambda folder: folder.name)[:-_KEPT_FAILURES]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Delete the folder of a session. Ray's last processes may still be writing to it."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
        time.sleep(0.2)
    latest = folder.parent / "session_latest"
    if latest.is_symlink() and not latest.exists():
        latest.unlink(missing_ok=True)
