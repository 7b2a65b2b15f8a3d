"""How often Ray Data's executor looks at its tasks. No torch here: it travels to the readers with their settings."""

from __future__ import annotations

import time

_SHORTEST, _LONGEST = 0.01, 0.25  # seconds
_WAITS = 0.05
"""A trainer whose last block took more of the time between two is waiting for the feed."""


class Pace:
    """How fast the trainer takes blocks, and whether it waits for them."""

    def __init__(self) -> None:
        self._interval = 0.0
        self._waits = True
        self._asked = self._taken = time.monotonic()

    def asked(self) -> None:
        """The trainer wants a block."""
        self._asked, self._waits = time.monotonic(), True

    def taken(self) -> None:
        """It has it."""
        now = time.monotonic()
        self._interval, self._taken = now - self._taken, now
        self._waits = now - self._asked > _WAITS * self._interval

    def pause(self, ready: int) -> float:
        """Seconds in which half of the blocks that are `ready`, and of one on its way, will be taken; within bounds.

        None of them may be ready while the trainer has enough: some are beyond the executor, on their way to it.
        """
        if self._waits:
            return _SHORTEST
        return min(max(_SHORTEST, self._interval * (ready + 1) / 2), _LONGEST)
