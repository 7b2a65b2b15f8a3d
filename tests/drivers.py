"""Records of drivers, as `driver.json` holds them, and the signals that they get."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tune_ego.processes import _start_time, this_process


def driver_record(pid: int | None = None, *, elsewhere: bool = False, **changes: Any) -> dict[str, Any]:
    """The record of a process of this machine, by default this one's parent, or of one on another machine."""
    pid = os.getppid() if pid is None else pid
    there = {"host": "elsewhere", "boot": "another"} if elsewhere else {"host": socket.gethostname()}
    process = {**this_process(), "pid": pid, "started": _start_time(pid)}
    return {"id": "x", **process, **there, "beat": 1, "time": time.time(), **changes}


def write_driver(root: Path, pid: int | None = None, *, elsewhere: bool = False, **changes: Any) -> None:
    (root / "driver.json").write_text(json.dumps(driver_record(pid, elsewhere=elsewhere, **changes)))


def ended_process() -> dict[str, Any]:
    """The identity of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    identity = {"pid": process.pid, "started": _start_time(process.pid)}
    process.communicate(b"\n")
    return identity


def reset_ignored_signals() -> None:
    """Heed Ctrl+C and SIGHUP: a shell's background process ignores the first, one of `nohup` the second.

    A child process would ignore them too.
    """
    for number, handler in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)
