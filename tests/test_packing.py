"""Batches packed into rows and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tune_ego.feed.packing import pack, unpack


def test_batches_come_back_without_a_copy() -> None:
    random = np.random.default_rng(0)
    batches = [
        {
            "rgb": random.integers(0, 256, (2, size, 5, 3), np.uint8),
            "gaze": random.random((2, 7, 2)).astype(np.float32)[:, ::2],
            "present": np.array([True, False]),
            "empty": np.empty((0, 3), np.int64),
        }
        for size in (4, 9, 1)
    ]
    table = pa.concat_tables([pack(batches[:2]), pack(batches[2:])])
    for given, rows in ((batches, table), (batches[1:], table.slice(1))):
        found = list(unpack(rows))
        assert len(found) == len(given)
        for ours, theirs in zip(found, given):
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                np.testing.assert_array_equal(ours[name], value, strict=True)
    everything = np.frombuffer(table["batch"].chunks[0].buffers()[2], np.uint8)
    assert np.shares_memory(next(unpack(table))["rgb"], everything)
