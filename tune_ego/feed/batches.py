"""Ray Data pipeline over a `FeedPlan`, and copies of its batches on the device.

B batch, T time, H, W, C channels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any, NamedTuple, NoReturn, TypeVar

import numpy as np
import torch
from torch import Tensor

from tune_ego.config import WINDOW_FRAMES
from tune_ego.feed.augmentation import crop_shape
from tune_ego.feed.feed_plan import FeedPlan, read_packed
from tune_ego.feed.pace import Pace
from tune_ego.feed.packing import Batch, unpack

MOST_TASKS = 2000
"""Upper bound on the reader tasks of a run: each task costs Ray some milliseconds."""
BATCHES_AHEAD = 16
"""Smallest number of batches that are read ahead of the trainer, where the worker's share of the store holds them."""
BLOCK_BYTES = 1 << 23
"""Target size of a block. Smaller batches share a block; the batches of a block are read by the same task."""
TASK_BYTES = 1 << 25
"""Target size of a task's output, which has at least two batches. Between the end of a task and the start of the next
task up to 0.2 s pass, so tasks must not be short. Batches are consumed in order, so much longer tasks would make other
readers wait."""


_COPIED_AHEAD = 2
"""Batches on the GPU that wait for the trainer."""
T = TypeVar("T")


class ClipBatch(NamedTuple):
    """Batch of a forward pass, on the device. Images are uint8; `model_input` scales them."""

    rgb_BTHWC: Tensor | None
    flow_BT2HW: Tensor | None
    gaze_BT2: Tensor
    """float32 x, y in [0, 1] of the crop, or outside [0, 1] where gaze is outside the crop; NaN where not valid."""
    gaze_valid_BT: Tensor
    """bool"""
    label_B: Tensor
    """int64 action classes, from 0."""
    clip_B: Tensor
    """int64 indices in the list of clips from which the batch was read."""
    present_B: Tensor
    """bool; False for the padding of the last validation batch."""

    def model_input(self) -> dict[str, Tensor]:
        """Return the model's input: stream -> [B, C, T, H, W] float32 in [-1, 1]."""
        return model_input(self.rgb_BTHWC, self.flow_BT2HW)


def model_input(rgb_BTHWC: Tensor | None, flow_BT2HW: Tensor | None) -> dict[str, Tensor]:
    """Return stream -> [B, C, T, H, W] float32 in [-1, 1], for each stream that is given; the images are uint8."""
    images: dict[str, Tensor] = {}
    if rgb_BTHWC is not None:
        images["rgb"] = rgb_BTHWC.permute(0, 4, 1, 2, 3)
    if flow_BT2HW is not None:
        images["flow"] = flow_BT2HW.permute(0, 2, 1, 3, 4)
    return {name: image.float() / 127.5 - 1 for name, image in images.items()}


def to_device(batch: Batch, device: torch.device) -> ClipBatch:
    """Copy a batch to the device.

    On a GPU this call returns before the copies have finished. For JPEG images (`data.decode: gpu`) it waits while the
    GPU decodes them.
    """
    return ClipBatch(
        rgb_BTHWC=_images_to_device(batch, "rgb", device),  # uint8 [B, T, H, W, 3]
        flow_BT2HW=_images_to_device(batch, "flow", device),  # uint8 [B, T, 2, H, W]
        gaze_BT2=_array_to_device(batch["gaze"], device),
        gaze_valid_BT=_array_to_device(batch["gaze_valid"], device),
        label_B=_array_to_device(batch["label"], device),
        clip_B=_array_to_device(batch["clip"], device),
        present_B=_array_to_device(batch["present"], device),
    )


def _images_to_device(batch: Batch, stream: str, device: torch.device) -> Tensor | None:
    """Copy the images of a stream to the device, and decode JPEG files there; None if the batch lacks the stream."""
    if f"{stream}_jpeg" in batch:
        from tune_ego.feed.decoding import decode_images  # torchvision takes a second to import

        return decode_images(batch, stream, device)
    return _array_to_device(batch[stream], device) if stream in batch else None


def _array_to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array to the device, on a GPU asynchronously."""
    if device.type != "cuda":
        return torch.tensor(array)  # a copy: arrays from the object store are read-only
    dtype = torch.from_numpy(array[:0].copy()).dtype
    pinned = torch.empty(
        array.shape, dtype=dtype, pin_memory=True
    )  # CUDA copies asynchronously from pinned memory only
    np.copyto(pinned.numpy(), array)
    return pinned.to(device, non_blocking=True)


def blank_batch(
    count: int, side: int, streams: tuple[str, ...], device: torch.device, frames: int = WINDOW_FRAMES
) -> ClipBatch:
    """Return a batch of black windows without motion and gaze, with the memory layout of a batch that was read.

    Args:
        count: Number of windows, B.
        side: Height and width of the images, pixels.
        streams: `rgb`, `flow` or both.
        device: Device of all tensors.
        frames: Frames of a window, T.
    """
    images = {
        name: torch.zeros(count, frames, *crop_shape(name, side), dtype=torch.uint8, device=device) for name in streams
    }
    zero_BT = torch.zeros(count, frames, device=device)
    zero_B = torch.zeros(count, dtype=torch.int64, device=device)
    return ClipBatch(
        rgb_BTHWC=images.get("rgb"),
        flow_BT2HW=images.get("flow"),
        gaze_BT2=zero_BT[..., None].expand(-1, -1, 2),
        gaze_valid_BT=zero_BT > 0,
        label_B=zero_B,
        clip_B=zero_B,
        present_B=zero_B == 0,
    )


def prefetch_first(batches: Iterator[Batch]) -> Iterator[Batch]:
    """Start reading the first batch at once, in a thread, and return an iterator over all batches."""
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, batches)
    pool.shutdown(wait=False)

    def iterate() -> Iterator[Batch]:
        try:
            yield first.result()
        except StopIteration:
            return
        yield from batches

    return iterate()


def batches_to_device(batches: Iterable[Batch], device: torch.device) -> Iterator[ClipBatch]:
    """Copy batches to the device, one after another.

    On a GPU the copies, and the decoding of JPEG images, run in a thread and on a CUDA stream of their own, in parallel
    with the computation. Up to `_COPIED_AHEAD` batches are on the device before they are needed.
    """
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copy_stream = torch.cuda.Stream(device)

    def copy(batch: Batch) -> tuple[ClipBatch, torch.cuda.Event]:
        with torch.cuda.stream(copy_stream):
            device_batch = to_device(batch, device)
            copied = torch.cuda.Event()
            copied.record()
        return device_batch, copied

    for device_batch, copied in made_ahead(map(copy, batches), _COPIED_AHEAD):
        yield _wait_for_copies(device_batch, copied)


def made_ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """Yield items that a thread makes, up to `count` of them before they are needed. Its exceptions are raised here."""
    made: SimpleQueue[Callable[[], T]] = SimpleQueue()
    free, closed = threading.Semaphore(count), threading.Event()

    def make() -> None:
        source = iter(items)
        while free.acquire() and not closed.is_set():
            try:
                item = next(source)
            except BaseException as error:
                made.put(partial(_raise, error))
                return
            made.put(partial(_identity, item))

    threading.Thread(target=make, daemon=True).start()
    try:
        while True:
            try:
                item = made.get()()
            except StopIteration:
                return
            free.release()
            yield item
    finally:
        closed.set()
        free.release()


def _raise(error: BaseException) -> NoReturn:
    raise error


def _identity(item: T) -> T:
    return item


def _wait_for_copies(batch: ClipBatch, copied: torch.cuda.Event) -> ClipBatch:
    """Make the current CUDA stream wait for the copies of a batch. The CPU does not wait."""
    compute_stream = torch.cuda.current_stream(batch.label_B.device)
    compute_stream.wait_event(copied)
    for tensor in batch:
        if tensor is not None:
            tensor.record_stream(compute_stream)  # its memory is not reused before this stream has finished with it
    return batch


def ray_batches(
    plan: FeedPlan,
    first_item: int,
    readers: int,
    batch_bytes: int,
    throttle: Callable[[Callable[[int], float]], type],
    ahead_bytes: int = 0,
) -> Iterator[Batch]:
    """Yield the batches of a plan in the order of its items, read by Ray Data tasks in a single pipeline.

    The order does not depend on the number of readers.

    Args:
        plan: Items of the run.
        first_item: First item to read; later than 0 where a run resumes.
        readers: Most reader tasks at a time.
        batch_bytes: Size of a batch, from which the amount of data that is read ahead is computed.
        throttle: Constructor of the callback class of Ray Data's executor (`ray_private.throttling_callback`).
        ahead_bytes: Most bytes to read ahead; 0: no limit (`_read_ahead`).
    """
    import ray.data  # late: seconds to import

    count, pace = plan.item_count - first_item, Pace()
    readers = min(readers, count)
    items_per_block = max(1, BLOCK_BYTES // batch_bytes)
    items_per_task, ahead = _read_ahead(count, readers, batch_bytes, ahead_bytes)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=ahead * batch_bytes
    )
    # Ray estimates a task's output from this size. With the default of 128 MB, the limit above would never admit a
    # second task.
    context.target_max_block_size = items_per_block * batch_bytes
    context.custom_execution_callback_classes = [throttle(pace.pause)]
    context.raise_original_map_exception = True
    context.memory_usage_poll_interval_s = None  # polling would start a thread for each task

    # Not `ray.data.range`: each of its tasks requires a whole CPU, and a cluster full of trials has no free CPU.
    items = list(range(first_item, plan.item_count))
    dataset = ray.data.from_items(items, override_num_blocks=-(-count // items_per_task))
    pool = ray.data.TaskPoolStrategy(size=readers)
    read = partial(read_packed, plan=plan, items_per_block=items_per_block)
    dataset = dataset.map_batches(read, batch_size=None, batch_format="pyarrow", compute=pool, **_reader_resources())
    blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    pace.request_block()
    for block in blocks:
        pace.block_received()
        yield from unpack(block)
        pace.request_block()


def _read_ahead(count: int, readers: int, batch_bytes: int, ahead_bytes: int) -> tuple[int, int]:
    """Return (items of a reader task, batches to read ahead).

    The store has to hold a task's output for each reader and one that is being consumed. Within `ahead_bytes` (0: no
    limit) tasks are smaller, down to one item.
    """
    items = max(min(max(2, TASK_BYTES // batch_bytes), count // readers), -(-count // MOST_TASKS))
    if ahead_bytes and max(BATCHES_AHEAD, (readers + 1) * items) * batch_bytes > ahead_bytes:
        items = max(1, min(items, ahead_bytes // batch_bytes // (readers + 1)))
        return items, max((readers + 1) * items, min(BATCHES_AHEAD, ahead_bytes // batch_bytes))
    return items, max(BATCHES_AHEAD, (readers + 1) * items)


def _reader_resources() -> dict[str, Any]:
    """Return the resources of a reader task: no CPU, on this node if possible.

    The training worker has reserved the readers' CPUs on its own node. A node that will be preempted starts no tasks;
    then the readers run on other nodes.
    """
    import ray  # late: seconds to import

    node = ray.get_runtime_context().get_node_id()
    other_nodes = [{"label_selector": {"ray.io/node-id": f"!{node}"}}]
    return {"num_cpus": 0, "label_selector": {"ray.io/node-id": node}, "fallback_strategy": other_nodes}
