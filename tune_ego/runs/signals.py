"""Stop files and spot interruption notices: when a worker writes a checkpoint between validations, or stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.runs import ray_private
from tune_ego.training.trainer import Signal

_STOP_EVERY = 1.0
"""Seconds between two checks for the stop file."""


@contextmanager
def watch_signals(stop: str, rank: int) -> Iterator[Callable[[], Signal]]:
    """Yield a function that returns the current signal, from the stop file and Ray's preemption notices.

    Rank 0 alone reads them, the stop file in a thread of its own. `Trainer.step` passes the signal to all ranks.
    """
    ended, stop_requested = threading.Event(), threading.Event()

    def check_stop_file() -> None:
        while not ended.wait(_STOP_EVERY) and not stop_requested.is_set():
            try:
                if storage.exists(stop):
                    stop_requested.set()
            except (OSError, UserError):  # the object store did not answer: the next check may succeed
                continue

    last_notice = None

    def read_signal() -> Signal:
        nonlocal last_notice
        if rank != 0:
            return Signal.NONE
        if stop_requested.is_set():
            return Signal.STOP
        info = ray_private.preemption_info()
        if info is not None and info != last_notice:
            last_notice = info
            return Signal.SAVE
        return Signal.NONE

    thread = threading.Thread(target=check_stop_file, daemon=True)
    if rank == 0:
        thread.start()
    try:
        yield read_signal
    finally:
        ended.set()
