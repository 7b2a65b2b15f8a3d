"""Identity of processes, which tells whether the process of a record is still running."""

from __future__ import annotations

import os
import platform
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any


def this_process() -> dict[str, Any]:
    """Return the identity of this process: boot of its machine, namespace of its pid, pid and start time.

    A pid alone is not an identity: containers have pids of their own, and pids are used again.
    """
    return {"boot": _boot(), "pid_namespace": _pid_namespace(), "pid": os.getpid(), "started": _start_time(os.getpid())}


def is_running(process: Mapping[str, Any]) -> bool | None:
    """Return whether a process runs, given its identity.

    None: it cannot be seen from here. It is, or was, on another machine, in another container, or before a restart.
    """
    if (process.get("boot"), process.get("pid_namespace")) != (_boot(), _pid_namespace()):
        return None
    pid = process.get("pid")
    return isinstance(pid, int) and _start_time(pid) == process.get("started") is not None


def _boot() -> str:
    """Return an identity of this machine's current boot; elsewhere than on Linux the name of the machine."""
    file = Path("/proc/sys/kernel/random/boot_id")
    return file.read_text().strip() if file.exists() else platform.node()


def _pid_namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_time(pid: int) -> int | None:
    """Return the start of a process in clock ticks after the boot, 0 where that is not known; None if it is not there.

    A process that has ended and waits for its parent to collect it (a zombie) is not there.
    """
    try:
        with suppress(PermissionError):  # another user's process is there, too
            os.kill(pid, 0)
    except (OSError, OverflowError):
        return None
    try:
        fields = _stat(pid)
    except OSError:
        return None if Path("/proc/self/stat").exists() else 0
    return None if fields[0] in "ZX" else int(fields[19])


def processes_of_sessions(sessions: Collection[int]) -> list[int]:
    """Return the pids of the processes in sessions (`setsid`); on other systems than Linux those of their leaders."""
    if not Path("/proc/self/stat").exists():
        return list(sessions)
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if int(_stat(int(folder.name))[3]) in sessions:
                pids.append(int(folder.name))
    return pids


def _stat(pid: int) -> list[str]:
    """Return the fields of `/proc/PID/stat` from the state on (proc(5)): the name before it may hold spaces."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
