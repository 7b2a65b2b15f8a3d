"""Batches as rows of a table with a single binary column. No torch here.

With a column for each array, every array of a batch would cost Ray a fraction of a millisecond, on both sides.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

Batch = dict[str, np.ndarray]
_COLUMN = "batch"
_ALIGNED = 64  # bytes


def pack(batches: list[Batch]) -> pa.Table:
    """Return a table with a row for each batch.

    A row holds the length of a JSON header (int64), the header (name, dtype and shape of each array) and the arrays.
    Each array starts at a multiple of 64 bytes.
    """
    layouts = [_Layout(batch) for batch in batches]
    ends = np.cumsum([0, *(layout.size for layout in layouts)])
    data = np.empty(int(ends[-1]), np.uint8)
    for layout, batch, start, end in zip(layouts, batches, ends, ends[1:]):
        layout.fill(data[start:end], batch)
    buffers = [None, pa.py_buffer(ends.astype(np.int64)), pa.py_buffer(data)]
    return pa.table({_COLUMN: pa.Array.from_buffers(pa.large_binary(), len(batches), buffers)})


def unpack(table: pa.Table) -> Iterator[Batch]:
    """Yield the batches of a table made by `pack`. The arrays are read-only views, not copies."""
    for chunk in table[_COLUMN].chunks:
        _, offsets, data_buffer = chunk.buffers()
        ends = np.frombuffer(offsets, np.int64)[chunk.offset : chunk.offset + len(chunk) + 1].tolist()
        for start, end in pairwise(ends):  # not the chunk's scalars: their buffers are copies
            data = np.frombuffer(data_buffer, np.uint8)[start:end]
            length = int(data[:8].view(np.int64)[0])
            batch, place = {}, _aligned(8 + length)
            for name, dtype, shape in json.loads(data[8 : 8 + length].tobytes()):
                size = int(np.prod(shape)) * np.dtype(dtype).itemsize
                batch[name] = data[place : place + size].view(dtype).reshape(shape)
                place += _aligned(size)
            yield batch


class _Layout:
    """Positions of a batch's header and arrays in its row."""

    def __init__(self, batch: Batch) -> None:
        arrays: list[Any] = [(name, value.dtype.str, value.shape) for name, value in batch.items()]
        self.header = json.dumps(arrays).encode()
        self.first_array = _aligned(8 + len(self.header))
        self.size = self.first_array + sum(_aligned(value.nbytes) for value in batch.values())

    def fill(self, row: np.ndarray, batch: Batch) -> None:
        """Copy header and arrays into the row, uint8 [size]."""
        row[:8] = np.array([len(self.header)], np.int64).view(np.uint8)
        row[8 : 8 + len(self.header)] = np.frombuffer(self.header, np.uint8)
        place = self.first_array
        for value in batch.values():
            row[place : place + value.nbytes].view(value.dtype).reshape(value.shape)[...] = value
            place += _aligned(value.nbytes)


def _aligned(size: int) -> int:
    """Round a size up to a multiple of the alignment."""
    return -(-size // _ALIGNED) * _ALIGNED
