"""Stop files and spot interruption notices: when a worker writes a checkpoint between validations, or stops."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tune_ego import ray_private, storage
from tune_ego.errors import UserError
from tune_ego.results.driver import is_taken_over
from tune_ego.runs.job import Job
from tune_ego.training.trainer import Signal

_STOP_EVERY = 1.0
"""Seconds between two checks for the stop file."""
_DRIVER_EVERY = 10
"""Number of those checks between two readings of the driver's claim."""


@contextmanager
def watch_signals(job: Job, rank: int) -> Iterator[Callable[[], Signal]]:
    """Yield a function that returns the current signal, from the stop file and Ray's preemption notices.

    Rank 0 alone reads them, the stop file in a thread of its own. `Trainer.step` passes the signal to all ranks. If
    another driver has claimed the folder, the process exits at once and writes nothing: that driver restarts the run.
    """
    ended, stop_requested = threading.Event(), threading.Event()

    def check_files() -> None:
        for count in itertools.count(1):
            if ended.wait(_STOP_EVERY):
                return
            try:
                if storage.exists(job.stop):
                    stop_requested.set()
                if count % _DRIVER_EVERY == 0 and is_taken_over(job.root, job.claim):
                    os._exit(1)
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

    thread = threading.Thread(target=check_files, daemon=True)
    if rank == 0:
        thread.start()
    try:
        yield read_signal
    finally:
        ended.set()
