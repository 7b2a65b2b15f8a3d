"""Pauses of Ray Data's executor between two steps. No torch: the class travels to the readers with their settings."""

from __future__ import annotations

import time

_SHORTEST, _LONGEST = 0.01, 0.25
"""Bounds of a pause, seconds."""
_WAITING_SHARE = 0.05
"""Share of the time between two blocks. A trainer that spent more than this share on waiting is limited by the feed."""


class Pace:
    """Rate at which the trainer consumes blocks, and whether the trainer waits for blocks."""

    def __init__(self) -> None:
        self._interval = 0.0
        self._waiting = True
        self._requested_at = self._received_at = time.monotonic()

    def request_block(self) -> None:
        """Record that the trainer needs a block."""
        self._requested_at, self._waiting = time.monotonic(), True

    def block_received(self) -> None:
        """Record that the trainer has received the block."""
        now = time.monotonic()
        self._interval, self._received_at = now - self._received_at, now
        self._waiting = now - self._requested_at > _WAITING_SHARE * self._interval

    def pause(self, ready: int) -> float:
        """Return the length of the executor's next pause, seconds.

        In this time the trainer consumes half of the `ready` blocks and of one block in transit, within bounds. `ready`
        may be 0 while the trainer does not wait: some blocks have left the executor and not yet reached the trainer.
        """
        if self._waiting:
            return _SHORTEST
        return min(max(_SHORTEST, self._interval * (ready + 1) / 2), _LONGEST)
