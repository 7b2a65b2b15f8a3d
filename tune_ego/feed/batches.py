"""The Ray Data pipeline over a `FeedPlan`, and batches on the device.

B batch, T time, H, W, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tune_ego.config import WINDOW_FRAMES
from tune_ego.feed.feed_plan import FeedPlan, read_packed
from tune_ego.feed.pace import Pace
from tune_ego.feed.packing import Batch, unpack

TASKS = 2000
"""At most this many reader tasks in a run: each costs Ray some milliseconds."""
AHEAD = 16
"""At least so many batches are read ahead of the trainer, where half of Ray's object store holds them."""
BLOCK_BYTES = 1 << 23
"""Batches smaller than this are handed over several at a time, and those of a block are read by one task."""
TASK_BYTES = 1 << 25
"""A task reads about so much, and two batches at least: until its end has been seen, and the next one starts, up to
0.2 s pass. Tasks that are much longer have many readers wait, for their batches are taken in order."""


class ClipBatch(NamedTuple):
    """One forward pass; images are uint8 and are scaled on the device."""

    rgb_BTHWC: Tensor | None
    flow_BT2HW: Tensor | None
    gaze_BT2: Tensor
    """x, y in [0, 1] of the crop (or outside it), float32; NaN where not valid."""
    gaze_valid_BT: Tensor
    label_B: Tensor
    clip_B: Tensor
    """Index in the list of clips the batch was read from."""
    present_B: Tensor
    """False for the padding of the last validation batch."""

    def clips(self) -> dict[str, Tensor]:
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
    """What was read, on the device; on a GPU the copies wait for nobody and nobody waits for them.

    Only images that come as JPEG files (`data.decode`) are waited for, while the GPU decodes them.
    """

    def tensor(name: str) -> Tensor:
        if device.type != "cuda":
            return torch.tensor(batch[name])  # a copy: what comes from the object store is read-only
        value = batch[name]
        pinned = torch.empty(value.shape, dtype=torch.from_numpy(value[:0].copy()).dtype, pin_memory=True)
        np.copyto(pinned.numpy(), value)
        return pinned.to(device, non_blocking=True)

    def images(name: str) -> Tensor | None:
        if f"{name}_jpeg" in batch:
            from tune_ego.feed.decoding import decoded  # torchvision: a second to import

            return decoded(batch, name, device)
        return tensor(name) if name in batch else None

    return ClipBatch(
        images("rgb"),
        images("flow"),
        *(tensor(name) for name in ("gaze", "gaze_valid", "label", "clip", "present")),
    )


def blank_batch(count: int, side: int, streams: tuple[str, ...], device: torch.device) -> ClipBatch:
    """A batch of `count` black, still windows without gaze, laid out in memory as those that are read."""
    shapes = {"rgb": (side, side, 3), "flow": (2, side, side)}
    images = {
        name: torch.zeros(count, WINDOW_FRAMES, *shapes[name], dtype=torch.uint8, device=device) for name in streams
    }
    frames = torch.zeros(count, WINDOW_FRAMES, device=device)
    number = torch.zeros(count, dtype=torch.int64, device=device)
    gaze = frames[..., None].expand(-1, -1, 2)
    return ClipBatch(images.get("rgb"), images.get("flow"), gaze, frames > 0, number, number, number == 0)


def begun(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The same batches; the first one is read from now on, in a thread, and not only when it is asked for."""
    pool = ThreadPoolExecutor(1)
    first = pool.submit(next, batches)
    pool.shutdown(wait=False)

    def rest() -> Iterator[Batch]:
        try:
            yield first.result()
        except StopIteration:
            return
        yield from batches

    return rest()


def on_device(batches: Iterable[Batch], device: torch.device) -> Iterator[ClipBatch]:
    """The batches on the device. To a GPU they are copied beside what it computes: the loop is an iteration ahead."""
    if device.type != "cuda":
        yield from (to_device(batch, device) for batch in batches)
        return
    copies = torch.cuda.Stream(device)
    for batch in batches:
        with torch.cuda.stream(copies):
            moved, there = to_device(batch, device), torch.cuda.Event()
            there.record()
        yield _handed_over(moved, there)


def _handed_over(batch: ClipBatch, there: torch.cuda.Event) -> ClipBatch:
    """A batch for the stream that computes, once it is all there."""
    computing = torch.cuda.current_stream(batch.label_B.device)
    computing.wait_event(there)
    for tensor in batch:
        if tensor is not None:
            tensor.record_stream(computing)  # its memory is not for others before that stream is done with it
    return batch


def ray_batches(
    plan: FeedPlan, first_item: int, readers: int, batch_bytes: int, throttle: Callable[[Pace], type]
) -> Iterator[Batch]:
    """The plan's items from `first_item` on, read by Ray Data tasks: one pipeline until the end of the run.

    Ray keeps the order whatever the number of readers; `batch_bytes` bounds what is read ahead. `throttle` makes the
    callback class of Ray Data's executor (`runs.ray_private.throttling_callback`).
    """
    import ray.data

    count, pace = plan.items - first_item, Pace()
    readers = min(readers, count)
    items_a_block = max(1, BLOCK_BYTES // batch_bytes)
    items_a_task = max(min(max(2, TASK_BYTES // batch_bytes), count // readers), -(-count // TASKS))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    context.execution_options.resource_limits = ray.data.ExecutionResources.for_limits(
        object_store_memory=max(AHEAD, (readers + 1) * items_a_task) * batch_bytes
    )
    # Ray estimates a task's output from this; with its 128 MB the limit above would never admit a second task.
    context.target_max_block_size = items_a_block * batch_bytes
    context.custom_execution_callback_classes = [throttle(pace)]
    context.raise_original_map_exception = True
    context.memory_usage_poll_interval_s = None  # a thread for each task

    # Not `ray.data.range`: its tasks ask for a whole CPU each, which a cluster full of trials does not have.
    dataset = ray.data.from_items(list(range(first_item, plan.items)), override_num_blocks=-(-count // items_a_task))
    pool = ray.data.TaskPoolStrategy(size=readers)
    # Without CPUs: the worker reserved them, on this node. One that will be taken away starts no tasks: then on others.
    node = ray.get_runtime_context().get_node_id()
    here, elsewhere = {"ray.io/node-id": node}, [{"label_selector": {"ray.io/node-id": f"!{node}"}}]
    where: dict[str, Any] = {"num_cpus": 0, "label_selector": here, "fallback_strategy": elsewhere}
    read = partial(read_packed, plan=plan, items_a_block=items_a_block)
    dataset = dataset.map_batches(read, batch_size=None, batch_format="pyarrow", compute=pool, **where)
    blocks = iter(dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2))
    pace.asked()
    for block in blocks:
        pace.taken()
        yield from unpack(block)
        pace.asked()
