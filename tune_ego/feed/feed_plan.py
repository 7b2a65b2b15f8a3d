"""What a worker reads during a run, from its first iteration to its last: a sequence of items. No torch here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import cv2
import numpy as np
import pyarrow as pa

from tune_ego.config import Config, DataConfig
from tune_ego.dataset.shards import open_shards
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.packing import pack
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window, centre_window, spread_starts, training_window
from tune_ego.freed_memory import keep_freed_memory


@dataclass(frozen=True)
class FeedPlan:
    """What one worker reads during a run: a sequence of items, each one forward pass of training or validation.

    An iteration is cut into `passes`, and worker r of n takes those numbered r, r + n, ...: they are its training
    items. After every `validate_every`-th iteration and after the last come the validation items. Items are numbered
    from the run's start, so a resumed run begins at an item.
    """

    root: str
    data: DataConfig
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
    """Images are read as JPEG files, which the trainer decodes."""

    @classmethod
    def of(cls, root: str, config: Config, workers: int, rank: int, *, encoded: bool = False) -> FeedPlan:
        train = config.train
        return cls(
            *(root, config.data, config.stream_names, config.seed, train.iterations, config.micro_batch),
            *(config.passes, train.validate_every, train.validation_windows, workers, rank, encoded),
        )

    @property
    def own_passes(self) -> range:
        """The passes of an iteration that this worker takes."""
        return range(self.rank, self.passes, self.workers)

    def validates_after(self, iterations: int) -> bool:
        """Whether a validation follows when `iterations` are done."""
        return iterations % self.validate_every == 0 or iterations == self.iterations

    @property
    def validations(self) -> list[int]:
        """The iterations after which a validation follows."""
        return [done for done in range(1, self.iterations + 1) if self.validates_after(done)]

    @property
    def validation_items(self) -> int:
        """Items of one validation; the same for every worker."""
        return -(-len(_sources(self).validation_windows) // (self.workers * self.micro_batch))

    def first_item(self, iterations: int) -> int:
        """The item that follows when `iterations` are done and validated."""
        return iterations * len(self.own_passes) + iterations // self.validate_every * self.validation_items

    @property
    def items(self) -> int:
        extra = 0 if self.iterations % self.validate_every == 0 else self.validation_items
        return self.first_item(self.iterations) + extra

    def windows(self, item: int) -> tuple[bool, list[Window | None]]:
        """(is it training, this worker's windows) of an item."""
        passes = self.own_passes
        cycle = self.validate_every * len(passes) + self.validation_items
        rounds, place = divmod(item, cycle)
        training_items = min(self.validate_every, self.iterations - rounds * self.validate_every) * len(passes)
        sources = _sources(self)
        if place < training_items:
            iteration, turn = divmod(place, len(passes))
            iteration += rounds * self.validate_every
            first = (iteration * self.passes + passes[turn]) * self.micro_batch
            samples = range(first, first + self.micro_batch)
            size = sources.image_size
            return True, [training_window(sources.train.clips, self.seed, n, size, self.data.crop) for n in samples]
        first = ((place - training_items) * self.workers + self.rank) * self.micro_batch
        chosen = sources.validation_windows[first : first + self.micro_batch]
        return False, [*chosen, *[None] * (self.micro_batch - len(chosen))]

    @property
    def validation_labels(self) -> list[int]:
        return [clip.label for clip in _sources(self).validation.clips]

    def read(self, item: int) -> dict[str, np.ndarray]:
        """A batch, as `WindowReader.read_batch` gives it, or `read_encoded`."""
        training, windows = self.windows(item)
        sources = _sources(self)
        reader = sources.train if training else sources.validation
        read = reader.read_encoded if self.encoded else reader.read_batch
        if not any(windows):  # another worker's clips only: read one, and count it out
            batch = read([sources.validation_windows[0]] * self.micro_batch)
            return {**batch, "present": np.zeros(self.micro_batch, bool)}
        return read(windows)


class _Sources(NamedTuple):
    train: WindowReader
    validation: WindowReader
    validation_windows: list[Window]
    image_size: tuple[int, int]


@lru_cache(maxsize=4)
def _sources(plan: FeedPlan) -> _Sources:
    shards = open_shards(plan.root)
    size = shards.image_size
    train, validation = (
        WindowReader(clips, plan.streams, size, plan.data.crop, ShardCache.of(plan.data))
        for clips in (shards.train(plan.data), shards.validation(plan.data))
    )
    windows = [
        centre_window(index, start, size, plan.data.crop)
        for index, clip in enumerate(validation.clips)
        for start in spread_starts(clip.frames, plan.validation_windows)
    ]
    return _Sources(train, validation, windows, size)


def read_packed(rows: pa.Table, plan: FeedPlan, items_a_block: int) -> Iterator[pa.Table]:
    """What a reader does: the batches of the column `item`, packed, so many to a table."""
    keep_freed_memory()
    items = rows["item"].to_pylist()
    for first in range(0, len(items), items_a_block):
        yield pack([plan.read(item) for item in items[first : first + items_a_block]])


def read_items(plan: FeedPlan, items: Any) -> Any:
    """The batches of a range of items, one after another, in this process."""
    cv2.setNumThreads(1)
    return (plan.read(int(item)) for item in items)
