"""Batches on the device, and images that are decoded there."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torchvision.io import decode_jpeg

from tests import handmade
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.feed.batches import (
    ClipBatch,
    _read_ahead,
    batches_to_device,
    blank_batch,
    made_ahead,
    prefetch_first,
    to_device,
)
from tune_ego.feed.decoding import decode_images
from tune_ego.feed.packing import Batch
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window

CPU = torch.device("cpu")


def number_batch(first: int = 0) -> Batch:
    """A batch of two clips of three frames of 2 x 2 pixels; every value is another one."""
    batch: Batch = {
        "rgb": np.arange(first, first + 72, dtype=np.uint8).reshape(2, 3, 2, 2, 3),
        "flow": np.arange(first + 100, first + 148, dtype=np.uint8).reshape(2, 3, 2, 2, 2),
        "gaze": np.arange(12, dtype=np.float32).reshape(2, 3, 2) / 16,
        "gaze_valid": np.array([[True, False, True], [False, False, True]]),
        "label": np.array([7, 3]),
        "clip": np.array([20, 11]),
        "present": np.array([True, False]),
    }
    for value in batch.values():
        value.flags.writeable = False  # as what comes from Ray's object store
    return batch


def test_a_batch_goes_to_the_device_field_by_field() -> None:
    source = number_batch()
    batch = to_device(source, CPU)
    fields = {"rgb_BTHWC": "rgb", "flow_BT2HW": "flow", "gaze_BT2": "gaze", "gaze_valid_BT": "gaze_valid"}
    fields |= {"label_B": "label", "clip_B": "clip", "present_B": "present"}
    for field, name in fields.items():
        np.testing.assert_array_equal(getattr(batch, field).numpy(), source[name], strict=True, err_msg=name)
    batch.label_B[0] = 5
    assert source["label"].tolist() == [7, 3]


@pytest.mark.parametrize("stream", ["rgb", "flow"])
def test_a_stream_that_was_not_read_is_none(stream: str) -> None:
    other = "flow" if stream == "rgb" else "rgb"
    batch = to_device({name: value for name, value in number_batch().items() if name != other}, CPU)
    assert (batch.rgb_BTHWC is None, batch.flow_BT2HW is None) == (stream != "rgb", stream != "flow")
    assert list(batch.model_input()) == [stream]


def test_the_model_s_input_has_channels_first_and_lies_between_minus_one_and_one() -> None:
    clips = to_device(number_batch(), CPU).model_input()
    assert list(clips) == ["rgb", "flow"]
    rgb, flow = clips["rgb"], clips["flow"]
    assert rgb.shape == (2, 3, 3, 2, 2) and flow.shape == (2, 2, 3, 2, 2)
    assert rgb.dtype == flow.dtype == torch.float32
    # Row-major numbers of [B, T, H, W, C] = [2, 3, 2, 2, 3] and [B, T, C, H, W] = [2, 3, 2, 2, 2].
    for b, c, t, h, w in [(0, 0, 0, 0, 0), (1, 2, 0, 1, 0), (0, 1, 2, 0, 1), (1, 0, 1, 1, 1)]:
        assert rgb[b, c, t, h, w].item() == pytest.approx((36 * b + 12 * t + 6 * h + 3 * w + c) / 127.5 - 1, abs=1e-6)
        if c < 2:
            level = 100 + 24 * b + 8 * t + 4 * c + 2 * h + w
            assert flow[b, c, t, h, w].item() == pytest.approx(level / 127.5 - 1, abs=1e-6)


def test_black_is_minus_one_and_white_is_one() -> None:
    levels = torch.tensor([0, 51, 255], dtype=torch.uint8).expand(1, 1, 1, 1, 3)
    batch = to_device(number_batch(), CPU)._replace(rgb_BTHWC=levels, flow_BT2HW=None)
    assert batch.model_input()["rgb"].flatten().tolist() == pytest.approx([-1.0, -0.6, 1.0], abs=1e-6)


@pytest.mark.parametrize("streams", [("rgb", "flow"), ("rgb",), ("flow",)])
def test_a_blank_batch_is_like_one_that_was_read(streams: tuple[str, ...]) -> None:
    blank = blank_batch(3, 32, streams, CPU)
    shapes = {"rgb": (3, 16, 32, 32, 3), "flow": (3, 16, 2, 32, 32)}
    for name, images in (("rgb", blank.rgb_BTHWC), ("flow", blank.flow_BT2HW)):
        if name not in streams:
            assert images is None
            continue
        assert images is not None
        assert images.shape == shapes[name] and images.dtype == torch.uint8 and images.is_contiguous()
        assert not images.any()
    assert blank.gaze_BT2.shape == (3, 16, 2) and blank.gaze_BT2.dtype == torch.float32 and not blank.gaze_BT2.any()
    assert blank.gaze_valid_BT.shape == (3, 16) and blank.gaze_valid_BT.dtype == torch.bool
    assert not blank.gaze_valid_BT.any()
    for numbers in (blank.label_B, blank.clip_B):
        assert numbers.tolist() == [0, 0, 0] and numbers.dtype == torch.int64
    assert blank.present_B.tolist() == [True, True, True]


def test_batches_are_moved_in_their_order() -> None:
    batches = list(batches_to_device((number_batch(first) for first in (0, 5, 9)), CPU))
    assert all(isinstance(batch, ClipBatch) for batch in batches)
    assert [batch.rgb_BTHWC[0, 0, 0, 0, 0].item() for batch in batches if batch.rgb_BTHWC is not None] == [0, 5, 9]


def feed(count: int, wanted: threading.Event) -> Iterator[Batch]:
    for number in range(count):
        wanted.set()
        yield {"item": np.array(number)}
    if count == 2:
        raise UserError("spoilt")


def test_the_first_batch_is_read_before_it_is_needed() -> None:
    wanted = threading.Event()
    batches = prefetch_first(feed(3, wanted))
    assert wanted.wait(10)
    assert [int(batch["item"]) for batch in batches] == [0, 1, 2]


def test_a_feed_without_batches_ends() -> None:
    assert list(prefetch_first(feed(0, threading.Event()))) == []


def test_the_error_of_a_feed_comes_behind_its_batches() -> None:
    batches = prefetch_first(feed(2, threading.Event()))
    assert [int(next(batches)["item"]) for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="spoilt"):
        next(batches)


WINDOWS = [Window(4, 8, 3, 5, False), None, Window(2, 19, 0, 1, True), Window(1, 0, 8, 16, True)]
FRAMES = {0: range(8, 24), 2: range(19, 35), 3: [0, 1, 2, 3, *[4] * 12]}


def encoded(root: str, windows: list[Window | None] = WINDOWS, streams: tuple[str, ...] = ("rgb", "flow")) -> Batch:
    shards = open_shards(root)
    clips = [shards.clip(row) for row in shards.table.to_pylist()]
    return WindowReader(clips, streams, (48, 40), 32).read_encoded(windows)


def test_the_device_crops_and_mirrors_what_it_decodes(handmade_shards: str) -> None:
    batch = to_device(encoded(handmade_shards), CPU)
    rgb, flow = batch.rgb_BTHWC, batch.flow_BT2HW
    assert rgb is not None and flow is not None
    assert rgb.shape == (4, 16, 32, 32, 3) and flow.shape == (4, 16, 2, 32, 32)
    assert rgb.dtype == flow.dtype == torch.uint8
    assert not rgb[1].any() and not flow[1].any()
    for place, frames in FRAMES.items():
        window = WINDOWS[place]
        assert window is not None
        rows, columns = slice(window.top, window.top + 32), slice(window.left, window.left + 32)
        for t, frame in enumerate(frames):
            image = handmade.rgb_image(window.clip, frame)[rows, columns].astype(int)
            x, y = handmade.flow_image(window.clip, frame)[:, rows, columns]
            if window.flip:
                image, x, y = image[:, ::-1], 255 - x[:, ::-1], y[:, ::-1]
            assert np.abs(rgb[place, t].numpy() - image).max() <= handmade.RGB_TOLERANCE
            np.testing.assert_array_equal(flow[place, t].numpy(), np.stack([x, y]))
    assert batch.label_B.tolist() == [1, 0, 2, 1] and batch.present_B.tolist() == [True, False, True, True]


def test_padding_alone_needs_no_decoder(handmade_shards: str) -> None:
    batch = encoded(handmade_shards, [None, None])
    rgb, flow = (decode_images(batch, name, CPU) for name in ("rgb", "flow"))
    assert rgb.shape == (2, 16, 32, 32, 3) and flow.shape == (2, 16, 2, 32, 32)
    assert rgb.dtype == flow.dtype == torch.uint8 and not rgb.any() and not flow.any()


def test_an_image_that_the_device_cannot_decode_is_a_users_error(handmade_shards: str) -> None:
    batch = encoded(handmade_shards, streams=("flow",))
    batch["flow_jpeg"] = np.zeros_like(batch["flow_jpeg"])
    with pytest.raises(UserError, match=r"an image cannot be decoded .*`data.decode: cpu` names the clip"):
        to_device(batch, CPU)


def test_what_a_gpu_cannot_do_is_no_fault_of_the_images(handmade_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, the CPU has the last word: there is a GPU in name only here."""
    whole, spoilt = encoded(handmade_shards), encoded(handmade_shards)
    spoilt["rgb_jpeg"] = np.zeros_like(spoilt["rgb_jpeg"])
    waits: list[str] = []

    def no_memory(files: list[torch.Tensor], mode: object, device: torch.device) -> object:
        if device.type == "cuda":
            assert waits  # for what the device still computes in the memory that nvJPEG writes to
            raise RuntimeError("CUDA error: out of memory")
        return decode_jpeg(files, mode=mode, device=device)

    monkeypatch.setattr("tune_ego.feed.decoding.decode_jpeg", no_memory)
    stream = SimpleNamespace(synchronize=lambda: waits.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    with pytest.raises(RuntimeError, match="out of memory"):
        decode_images(whole, "rgb", torch.device("cuda"))
    with pytest.raises(UserError, match="an image cannot be decoded"):
        decode_images(spoilt, "rgb", torch.device("cuda"))


@pytest.mark.parametrize(
    ("readers", "batch_bytes", "ahead_bytes", "expected"),
    [
        (1, 1 << 22, 0, (8, 16)),  # 32 MiB a task; two tasks' outputs are 16 batches
        (2, 1 << 20, 0, (32, 96)),
        (1, 1 << 22, 1 << 26, (8, 16)),  # 64 MiB hold them just
        (1, 1 << 22, 1 << 25, (4, 8)),
        (3, 1 << 22, 1 << 25, (2, 8)),
        (1, 1 << 22, 1, (1, 2)),  # one that is read and one that is consumed, whatever the limit
    ],
)
def test_batches_are_read_ahead_within_the_worker_s_share(
    readers: int, batch_bytes: int, ahead_bytes: int, expected: tuple[int, int]
) -> None:
    assert _read_ahead(1000, readers, batch_bytes, ahead_bytes) == expected
    items, ahead = expected
    assert not ahead_bytes > 1 or ahead * batch_bytes <= ahead_bytes
    assert ahead >= (readers + 1) * items


def test_few_items_are_made_before_they_are_needed() -> None:
    """As for batches on a GPU: at most two wait, they keep their order, and nothing is made after the end."""
    made: list[int] = []

    def source() -> Iterator[int]:
        for number in range(100):
            made.append(number)
            yield number

    items = made_ahead(source(), 2)
    for expected in range(10):
        assert next(items) == expected
        time.sleep(0.02)
        assert len(made) == expected + 3
    items.close()  # type: ignore[attr-defined]
    time.sleep(0.05)
    assert len(made) == 12
    assert list(made_ahead(range(7), 3)) == list(range(7))


def test_an_error_of_what_is_made_ahead_comes_behind_what_was_made() -> None:
    def source() -> Iterator[int]:
        yield 1
        yield 2
        raise ValueError("broken")

    items = made_ahead(source(), 5)
    assert [next(items), next(items)] == [1, 2]
    with pytest.raises(ValueError, match="broken"):
        next(items)
