"""`evaluate`: the dense test protocol of Lu, Liao, Li (ICCV Workshops 2019).

Windows at frames 0, 8, 16, ... and one that ends with the clip, centre crop, softmax scores averaged over a clip's
windows; the two streams are fused by the mean of their scores.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import cv2
import numpy as np
import torch

from tune_ego import experiment, storage
from tune_ego.checkpoint import FILE_NAME, Origin, read_checkpoint, rebuild
from tune_ego.console import clip_progress, percent, print_table
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.errors import UserError
from tune_ego.feed.batches import to_device
from tune_ego.feed.windows import Window, WindowReader, centre_window, dense_starts
from tune_ego.metrics import ClipScores, accuracies
from tune_ego.train import autocast_dtype

_BATCH = 8
"""Windows in a forward pass."""


def find_checkpoint(uri: str) -> str:
    """The checkpoint meant by a file, a checkpoint's folder or a run's folder (its last one)."""
    uri = storage.absolute(uri)
    inside = [] if storage.is_file(uri) else experiment.checkpoints(uri)
    return inside[-1] if inside else uri


def _run_of(checkpoint: str) -> str:
    """The run's folder of a checkpoint's folder or file."""
    return checkpoint.removesuffix(f"/{FILE_NAME}").rpartition("/")[0]


def evaluate(checkpoint: str, data: str, split: int, out: str | None = None) -> dict[str, Any]:
    """Test a checkpoint on the test clips of an official split; returns and writes what `evaluation.json` holds.

    Without `out` the file is written beside the checkpoint's run. Raises `UserError` where checkpoint and shards
    do not belong together.
    """
    source = find_checkpoint(checkpoint)
    content = read_checkpoint(source)
    config, origin, model = rebuild(content, source)
    shards = open_shards(storage.absolute(data))
    _check_same_kind(origin, shards, source)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).eval()
    clips = shards.test(split)
    reader = WindowReader(clips, config.stream_names, shards.image_size, config.data.crop)
    scores = ClipScores(config.stream_names, len(clips), len(origin.actions), device)
    dtype = autocast_dtype(config.train.precision, device)
    with torch.inference_mode(), clip_progress(len(clips)) as advance:
        done = 0
        for batch in _batches(reader):
            moved = to_device(batch, device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = model(moved.clips())
            scores.add(moved.clip_B, {name: output.logits_BK for name, output in outputs.items()}, moved.present_B)
            advance(int(batch["clip"].max()) + 1 - done)
            done = int(batch["clip"].max()) + 1
    labels = torch.tensor([clip.label for clip in clips], device=device)
    result: dict[str, Any] = {
        "split": split,
        "clips": len(clips),
        "chance": 1 / len(origin.actions),
        "iteration": content["iteration"],
        "checkpoint": source,
        **accuracies(scores.reduce(), labels),
    }
    storage.write_json(out or storage.join(_run_of(source), "evaluation.json"), result)
    show(result)
    return result


def _check_same_kind(origin: Origin, shards: Shards, source: str) -> None:
    if origin.actions != shards.actions:
        raise UserError(
            f"{source}: trained on {len(origin.actions)} classes, not the {len(shards.actions)} of {shards.root}"
        )
    if origin.image_size != shards.image_size:
        raise UserError(f"{source}: trained on {origin.image_size} images, {shards.root} has {shards.image_size}")
    flow = shards.info["settings"]["flow"]
    if origin.flow != flow:
        raise UserError(f"{source}: trained on {origin.flow} flow, {shards.root} has {flow}")


def _batches(reader: WindowReader) -> Iterator[dict[str, np.ndarray]]:
    """Every dense window of every clip, read by threads a few batches ahead."""
    cv2.setNumThreads(1)
    windows = [
        centre_window(index, start, reader.image_size, reader.crop)
        for index, clip in enumerate(reader.clips)
        for start in dense_starts(clip.frames)
    ]
    pieces: Iterator[list[Window | None]] = (list(windows[at : at + _BATCH]) for at in range(0, len(windows), _BATCH))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pending = [pool.submit(reader.read_batch, piece) for piece in islice(pieces, 4)]
        while pending:
            yield pending.pop(0).result()
            pending += [pool.submit(reader.read_batch, piece) for piece in islice(pieces, 1)]


def show(result: dict[str, Any]) -> None:
    rows = [
        [name, percent(result[name]["micro_accuracy"]), percent(result[name]["mean_class_accuracy"])]
        for name in ("rgb", "flow", "fused")
        if name in result
    ]
    rows.append(["chance", percent(result["chance"]), percent(result["chance"])])
    title = f"Test of split {result['split']}: {result['clips']} clips, iteration {result['iteration']}"
    print_table(title, ["", "micro accuracy", "mean class accuracy"], rows)
