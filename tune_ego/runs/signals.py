"""Stop files and spot interruption notices: when a worker writes a checkpoint between validations, or stops."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.runs import ray_private
from tune_ego.training.trainer import Notice

_STOP_EVERY = 1.0
"""Seconds between two checks for the stop file."""


@contextmanager
def watched(stop: str, rank: int) -> Iterator[Callable[[], Notice]]:
    """What a worker should do after an iteration, from the file `stop` and from Ray's spot notices.

    Rank 0 looks for the file, in a thread of its own, and Ray tells every rank of a notice. What rank 0 heard all do:
    `Trainer.step` passes it on.
    """
    ended, asked = threading.Event(), threading.Event()

    def look() -> None:
        while not ended.wait(_STOP_EVERY) and not asked.is_set():
            try:
                if storage.exists(stop):
                    asked.set()
            except (OSError, UserError):  # of an object store: the next look may work
                continue

    heard = None

    def notice() -> Notice:
        nonlocal heard
        if rank != 0:
            return Notice.NONE
        if asked.is_set():
            return Notice.STOP
        info = ray_private.preemption_info()
        if info is not None and info != heard:
            heard = info
            return Notice.SAVE
        return Notice.NONE

    thread = threading.Thread(target=look, daemon=True)
    if rank == 0:
        thread.start()
    try:
        yield notice
    finally:
        ended.set()
