"""How often Ray Data's executor looks at its tasks. No torch here: it travels to the readers with their settings."""

from __future__ import annotations

import time
from typing import Any

_SHORTEST, _LONGEST = 0.01, 0.25  # seconds


class Pace:
    """How fast batches are taken."""

    def __init__(self) -> None:
        self.interval = 0.0
        """Seconds between the last two."""
        self._last = time.monotonic()

    def note(self) -> None:
        now = time.monotonic()
        self.interval, self._last = now - self._last, now

    def pause(self, waiting: int) -> float:
        """Seconds in which half of so many batches that wait will be taken, within bounds."""
        return min(max(_SHORTEST, self.interval * waiting / 2), _LONGEST)


def pausing(pace: Pace) -> type:
    """A callback that makes Ray Data's executor sleep between its steps, while it has batches that nobody has taken.

    It is a thread of the training process, whose steps take a millisecond each and follow each other without a pause:
    it slowed training on two cores to a third.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Pausing(ExecutionCallback):  # type: ignore[misc]
        def on_execution_step(self, executor: Any) -> None:
            _, last = executor._output_node
            time.sleep(pace.pause(len(last.output_queue)))

    return Pausing
