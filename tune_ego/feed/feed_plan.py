"""Sequence of batches that a worker reads during a run, from the first iteration to the last. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from tune_ego.config import AugmentConfig, Config, DataConfig
from tune_ego.dataset.shards import open_shards
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.packing import pack
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window, centre_window, spread_starts, training_window
from tune_ego.freed_memory import keep_freed_memory


@dataclass(frozen=True)
class FeedPlan:
    """Sequence of items that one worker reads during a run. An item is the batch of a forward pass.

    An iteration is divided into `passes`, forward passes of all workers. Worker r of n takes the passes r, r + n, ...,
    its training items. Validation items follow after every `validate_every`-th iteration and after the last. Items are
    numbered from the start of the run, so a resumed run continues at the number of an item.
    """

    root: str
    """Path or URI of the shards."""
    data: DataConfig
    augment: AugmentConfig
    streams: tuple[str, ...]
    seed: int
    iterations: int
    micro_batch: int
    passes: int
    validate_every: int
    validation_windows: int
    workers: int = 1
    rank: int = 0
    encoded: bool = False
    """Whether batches hold JPEG files, which the trainer decodes, instead of images."""

    @classmethod
    def from_config(cls, root: str, config: Config, workers: int, rank: int, *, encoded: bool = False) -> FeedPlan:
        """Return the plan of worker `rank` of `workers` in a run with this configuration."""
        return cls(
            root=root,
            data=config.data,
            augment=config.augment,
            streams=config.stream_names,
            seed=config.seed,
            iterations=config.train.iterations,
            micro_batch=config.micro_batch,
            passes=config.passes,
            validate_every=config.train.validate_every,
            validation_windows=config.train.validation_windows,
            workers=workers,
            rank=rank,
            encoded=encoded,
        )

    @property
    def own_passes(self) -> range:
        """Passes of an iteration that this worker computes."""
        return worker_passes(self.passes, self.rank, self.workers)

    def validates_after(self, iterations: int) -> bool:
        """Return whether a validation follows after this number of iterations."""
        return iterations % self.validate_every == 0 or iterations == self.iterations

    @property
    def validation_iterations(self) -> list[int]:
        """Numbers of iterations after which a validation follows, ascending."""
        return [iterations for iterations in range(1, self.iterations + 1) if self.validates_after(iterations)]

    @property
    def validation_items(self) -> int:
        """Number of items of a validation; the same for every worker."""
        return -(-len(_sources(self).validation_windows) // (self.workers * self.micro_batch))

    def first_item(self, iterations: int) -> int:
        """Return the item that follows after `iterations` and their validations."""
        return iterations * len(self.own_passes) + iterations // self.validate_every * self.validation_items

    @property
    def item_count(self) -> int:
        """Number of items of the run."""
        extra = 0 if self.iterations % self.validate_every == 0 else self.validation_items
        return self.first_item(self.iterations) + extra

    def windows(self, item: int) -> tuple[bool, list[Window | None]]:
        """Return (whether it is a training item, the windows of this worker's batch) of an item; None is padding."""
        passes = self.own_passes
        # A cycle is `validate_every` iterations and their validation; the last cycle may have fewer iterations.
        items_per_cycle = self.validate_every * len(passes) + self.validation_items
        cycle, place = divmod(item, items_per_cycle)
        training_items = min(self.validate_every, self.iterations - cycle * self.validate_every) * len(passes)
        sources = _sources(self)
        if place < training_items:
            iteration, turn = divmod(place, len(passes))
            iteration += cycle * self.validate_every
            first = (iteration * self.passes + passes[turn]) * self.micro_batch
            samples = range(first, first + self.micro_batch)
            form = (sources.image_size, self.data.crop, self.data.sampling, self.augment, self.data.window)
            return True, [training_window(sources.train.clips, self.seed, n, *form) for n in samples]
        # Workers take the batches of a validation in turn.
        first = ((place - training_items) * self.workers + self.rank) * self.micro_batch
        windows = sources.validation_windows[first : first + self.micro_batch]
        return False, [*windows, *[None] * (self.micro_batch - len(windows))]

    @property
    def validation_labels(self) -> list[int]:
        """Label of each validation clip."""
        return [clip.label for clip in _sources(self).validation.clips]

    @property
    def training_labels(self) -> list[int]:
        """Label of each training clip."""
        return [clip.label for clip in _sources(self).train.clips]

    def read(self, item: int) -> dict[str, np.ndarray]:
        """Read the batch of an item (`WindowReader.read_batch`, or `read_encoded` if the plan is `encoded`)."""
        training, windows = self.windows(item)
        sources = _sources(self)
        reader = sources.train if training else sources.validation
        read = reader.read_encoded if self.encoded else reader.read_batch
        if not any(windows):  # padding alone: read any window instead, and mark it as absent
            batch = read([sources.validation_windows[0]] * self.micro_batch)
            return {**batch, "present": np.zeros(self.micro_batch, bool)}
        return read(windows)


def worker_passes(passes: int, rank: int, workers: int) -> range:
    """Return the passes of an iteration that worker `rank` of `workers` computes: rank, rank + workers, ..."""
    return range(rank, passes, workers)


class _Sources(NamedTuple):
    """Readers and windows that belong to a plan."""

    train: WindowReader
    validation: WindowReader
    validation_windows: list[Window]
    image_size: tuple[int, int]
    """(width, height), pixels."""


@lru_cache(maxsize=4)
def _sources(plan: FeedPlan) -> _Sources:
    """Open the readers of a plan. The cache keeps them from one item of a reader process to the next."""
    shards = open_shards(plan.root)
    size = shards.image_size
    train, validation = (
        WindowReader(clips, plan.streams, size, plan.data.crop, ShardCache.from_config(plan.data), plan.data.window)
        for clips in (shards.train(plan.data), shards.validation(plan.data))
    )
    windows = [
        centre_window(index, start, size, plan.data.crop)
        for index, clip in enumerate(validation.clips)
        for start in spread_starts(clip.frames, plan.validation_windows, plan.data.window.span)
    ]
    return _Sources(train, validation, windows, size)


def read_packed(rows: pa.Table, plan: FeedPlan, items_per_block: int) -> Iterator[pa.Table]:
    """Read the batches of the column `item`, and yield them packed, `items_per_block` in a table."""
    keep_freed_memory()
    items = rows["item"].to_pylist()
    for first in range(0, len(items), items_per_block):
        yield pack([plan.read(item) for item in items[first : first + items_per_block]])


def read_items(plan: FeedPlan, items: Any) -> Any:
    """Return a generator that reads the batches of a range of items in this process."""
    cv2.setNumThreads(1)
    return (plan.read(int(item)) for item in items)
