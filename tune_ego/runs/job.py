"""The description of one run that travels from the driver to its workers. No torch here, nor Ray."""

from __future__ import annotations

from dataclasses import dataclass

from tune_ego.config import Config


@dataclass(frozen=True)
class Job:
    """One run, as it travels to its workers."""

    config: Config
    data: str
    """The shards."""
    run: str
    """The run's folder or URI."""
    gpus: float
    """GPUs of a worker."""
    stop: str
    """The file that asks the run to write a checkpoint and end."""
    final: bool
    """Write `final/model.pt` at the end."""
