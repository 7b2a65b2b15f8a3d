"""Batches packed into rows and back."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from tune_ego.feed.packing import Batch, pack, unpack


def varied_batches() -> list[Batch]:
    random = np.random.default_rng(0)
    return [
        {
            "rgb": random.integers(0, 256, (2, size, 5, 3), np.uint8),
            "gaze": random.random((2, 7, 2)).astype(np.float32)[:, ::2],
            "present": np.array([True, False]),
            "empty": np.empty((0, 3), np.int64),
            "last": np.array([size, -size]),
        }
        for size in (4, 9, 1)
    ]


def test_batches_come_back_without_a_copy() -> None:
    batches = varied_batches()
    table = pa.concat_tables([pack(batches[:2]), pack(batches[2:])])
    for given, rows in ((batches, table), (batches[1:], table.slice(1)), (batches[1:2], table.slice(1, 1))):
        unpacked = list(unpack(rows))
        assert len(unpacked) == len(given)
        for batch, original in zip(unpacked, given):
            assert list(batch) == list(original)
            for name, value in original.items():
                np.testing.assert_array_equal(batch[name], value, strict=True)
    everything = np.frombuffer(table["batch"].chunks[0].buffers()[2], np.uint8)
    assert np.shares_memory(next(unpack(table))["rgb"], everything)


def test_a_row_is_laid_out_in_steps_of_64_bytes() -> None:
    """The length of the JSON, the JSON, and each array at a multiple of 64 bytes; every row is such a multiple."""
    about = b'[["a", "|u1", [3]], ["b", "<i8", [1, 2]]]'
    assert len(about) == 41  # 8 + 41 bytes are less than 64
    table = pack([{"a": np.array([n, n + 1, n + 2], np.uint8), "b": np.array([[n, -1]])} for n in (1, 5)])
    assert table.schema == pa.schema([("batch", pa.large_binary())])
    rows = table["batch"].to_pylist()
    assert [len(row) for row in rows] == [192, 192]
    for row, number in zip(rows, (1, 5)):
        assert row[:8] == (41).to_bytes(8, "little")
        assert row[8:49] == about
        assert row[64:67] == bytes([number, number + 1, number + 2])
        assert row[128:144] == number.to_bytes(8, "little") + b"\xff" * 8


def test_an_array_of_64_bytes_takes_no_more() -> None:
    name = "x" * 37  # with the rest of the JSON, and its length, 64 bytes
    row = pack([{name: np.arange(64, dtype=np.uint8)}])["batch"][0].as_py()
    assert row[8:64] == f'[["{name}", "|u1", [64]]]'.encode()
    assert row[64:] == bytes(range(64))


def test_every_array_is_aligned() -> None:
    table = pack(varied_batches())
    start = np.frombuffer(table["batch"].chunks[0].buffers()[2], np.uint8).ctypes.data
    for batch in unpack(table):
        assert all((value.ctypes.data - start) % 64 == 0 for value in batch.values() if value.size)
