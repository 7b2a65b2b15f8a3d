"""`evaluate`: the dense test protocol of Lu, Liao, Li (ICCV Workshops 2019).

Windows at frames 0, 8, 16, ... and one that ends with the clip, centre crop, softmax scores averaged over a clip's
windows; the two streams are fused by the (weighted) mean of their scores. Attention is compared with gaze.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.console import progress
from tune_ego.dataset.annotations import ActionParts, split_actions
from tune_ego.dataset.shards import Clip, Shards, open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.gaze_scores import GazeScores
from tune_ego.feed.batches import batches_to_device
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window, centre_window, dense_starts
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.model import TwoStream
from tune_ego.model.two_stream import StreamOutput
from tune_ego.results import experiment
from tune_ego.results.checkpoint_files import find_checkpoint, run_of
from tune_ego.training.checkpoint import Origin, check_same_origin, load_trained
from tune_ego.training.hardware import autocast_dtype, memory_format
from tune_ego.training.metrics import (
    ClipScores,
    accuracies,
    class_recall,
    confusion,
    fuse,
    mean_class_accuracy,
    micro_accuracy,
)

_READ = 8
"""Windows that a thread reads at a time."""
_BATCH = {"cpu": _READ, "cuda": 4 * _READ}
"""Windows in a forward pass."""
_CHECK_EVERY = {"cpu": 1, "cuda": 32}
"""Batches between two checks for values that are not finite. On a GPU each check waits for the GPU."""
_MOST_READERS = 16
_SWEEP_STEPS = 20


class OpenedModel(NamedTuple):
    source: str
    """URI of its weights."""
    config: Config
    origin: Origin
    model: TwoStream
    shards: Shards
    iteration: int


def open_model(checkpoint: str, data: str) -> OpenedModel:
    """Load a checkpoint's model (a finished run's final weights) and open the shards to test it on.

    Raises `UserError` where checkpoint and shards do not belong together.
    """
    source = find_checkpoint(checkpoint)
    config, origin, model, iteration = load_trained(source)
    shards = open_shards(storage.absolute(data))
    here = Origin(shards.actions, shards.image_size, shards.info["settings"]["flow"])
    check_same_origin(origin, here, config, source, shards.root)
    return OpenedModel(source, config, origin, model, shards, iteration)


def evaluate(
    checkpoint: str, data: str, split: int | None = None, out: str | None = None, fusion_weight: float | None = None
) -> dict[str, Any]:
    """Test a checkpoint on the test clips of an official split; return the content of `evaluation.json` and write it.

    `checkpoint` is a run (the final weights of one that has ended, else its last whole checkpoint), a checkpoint's
    folder, or the file of a checkpoint or of final weights. `split` is 1 to 3, else the one it was trained on.
    `fusion_weight` is RGB's share of the fused scores, else the configuration's. Without `out` the file is written in
    the checkpoint's run. Raises `UserError` where checkpoint and shards do not belong together, and where the model's
    scores are not finite.
    """
    source, config, origin, model, shards, iteration = open_model(checkpoint, data)
    if fusion_weight is not None:
        _check_fusion_weight(fusion_weight, config, source)
    split = config.data.split if split is None else split
    clips = shards.test(split)
    scores, attention = score_clips(model, config, clips, shards)
    weight = config.fusion_weight if fusion_weight is None else fusion_weight
    scores_by_name = {name: scores_NK.cpu() for name, scores_NK in scores.reduce(weight).items()}
    label_N = torch.tensor([clip.label for clip in clips])
    result: dict[str, Any] = {
        "split": split,
        "trained_on_split": config.data.split,
        "clips": len(clips),
        "clips_trained_on": len({clip.name for clip in clips} & set(shards.clip_names("train", config.data.split))),
        "chance": 1 / len(origin.actions),
        "iteration": iteration,
        "checkpoint": source,
        **action_results(scores_by_name, label_N, shards.actions, shards.verbs_and_nouns()),
        "attention": attention,
    }
    if "fused" in result:
        result |= {"fusion_weight": weight, "fusion_sweep": fusion_sweep(scores_by_name, label_N)}
    storage.write_json(out or storage.join(run_of(source), experiment.EVALUATION_FILE), result)
    return result


def score_clips(
    model: TwoStream, config: Config, clips: list[Clip], shards: Shards
) -> tuple[ClipScores, dict[str, dict[str, Any] | None]]:
    """Return (class scores, agreement of each stream's attention with gaze) over all dense windows of the clips.

    Computes, and leaves the model, on the GPU where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        keep_freed_memory()
    # 16-bit arithmetic is slow on CPUs, and wrong in some of their kernels.
    dtype = autocast_dtype(config.train.precision, device) if device.type == "cuda" else None
    model.to(device).to(memory_format=memory_format(device, dtype)).eval()
    reader = WindowReader(clips, config.stream_names, shards.image_size, config.data.crop, form=config.data.window)
    scores = ClipScores(config.stream_names, len(clips), len(shards.actions), device)
    gaze = {name: GazeScores(device) for name in (*config.stream_names, "centre")} if config.model.stam_depth else {}
    non_finite = _NonFiniteOutputs(clips, device)
    with torch.inference_mode(), progress("clips", len(clips)) as advance:
        batches = _batches(reader, device, advance)
        for done, batch in enumerate(batches_to_device(batches, device), start=1):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = model(batch.model_input())
            non_finite.add(outputs, batch.clip_B)
            if done % _CHECK_EVERY[device.type] == 0:
                non_finite.check()
            scores.add(batch.clip_B, {name: output.logits_BK for name, output in outputs.items()}, batch.present_B)
            for name, output in outputs.items() if gaze else ():
                shape = output.attention_BTHW.shape
                gaze[name].add(output.attention_BTHW, batch.gaze_BT2, batch.gaze_valid_BT)
            if gaze:
                gaze["centre"].add_centre(shape, batch.gaze_BT2, batch.gaze_valid_BT, config.loss.gaze_sigma)
        non_finite.check()
    return scores, {name: score.result() for name, score in gaze.items()}


class _NonFiniteOutputs:
    """Record of the first clip with an output that is not finite, per kind of output, on the device."""

    def __init__(self, clips: list[Clip], device: torch.device) -> None:
        self._clips, self._none = clips, torch.tensor(len(clips), device=device)
        self._first: dict[tuple[str, str], Tensor] = {}

    def add(self, outputs: Mapping[str, StreamOutput], clip_B: Tensor) -> None:
        for name, output in outputs.items():
            for kind, values in (("scores", output.logits_BK), ("attention", output.attention_BTHW)):
                if values is not None:
                    finite_B = values.isfinite().flatten(1).all(dim=1)
                    first = torch.where(finite_B, self._none, clip_B).min()
                    self._first[name, kind] = torch.minimum(self._first.get((name, kind), self._none), first)

    def check(self) -> None:
        for (name, kind), first in self._first.items():
            if first < self._none:
                clip = self._clips[int(first)].name
                raise UserError(f"the {name} stream's {kind} are not finite, first in {clip}: its training diverged")


def action_results(
    scores: dict[str, Tensor], label_N: Tensor, actions: list[str], parts: ActionParts
) -> dict[str, Any]:
    """Return accuracies, per-class recall and the confusion matrix [true, predicted] of each entry of `scores` [N, K].

    `actions` are the K class names. Verb and noun are parts of the predicted action
    (`dataset.annotations.split_actions`).
    """
    true_verb_N, true_noun_N = split_actions(label_N.numpy(), parts)
    result: dict[str, Any] = {}
    for name, scores_NK in scores.items():
        verb_N, noun_N = split_actions(scores_NK.argmax(dim=1).numpy(), parts)
        counts = confusion(scores_NK, label_N)
        result[name] = {
            "micro_accuracy": micro_accuracy(counts),
            "mean_class_accuracy": mean_class_accuracy(counts),
            "verb_accuracy": float((verb_N == true_verb_N).mean()),
            "noun_accuracy": float((noun_N == true_noun_N).mean()),
            "recall": class_recall(counts),
            "confusion": counts.tolist(),
        }
    clips = torch.bincount(label_N, minlength=len(actions)).tolist()
    return {**result, "classes": [{"action": name, "clips": n} for name, n in zip(actions, clips)]}


def fusion_sweep(scores: dict[str, Tensor], label_N: Tensor) -> list[dict[str, float]]:
    """Return the accuracies of the fused scores [N, K] for RGB weights from 0 to 1."""
    weights = [step / _SWEEP_STEPS for step in range(_SWEEP_STEPS + 1)]
    results = accuracies({str(weight): fuse(scores, weight) for weight in weights}, label_N)
    return [{"rgb_weight": weight, **results[str(weight)]} for weight in weights]


def _check_fusion_weight(weight: float, config: Config, source: str) -> None:
    if not 0 <= weight <= 1:
        raise UserError(f"--fusion-weight {weight}: RGB's share goes from 0 to 1")
    if len(config.stream_names) < 2:
        raise UserError(f"--fusion-weight {weight}: {source} has the {config.streams} stream only")


def _batches(
    reader: WindowReader, device: torch.device, advance: Callable[[int], None]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every dense window of every clip in batches; threads read ahead.

    `advance` is called with the number of clips that are complete since its last call.
    """
    cv2.setNumThreads(1)
    windows: list[Window | None] = [
        centre_window(index, start, reader.image_size, reader.crop)
        for index, clip in enumerate(reader.clips)
        for start in dense_starts(clip.frames, reader.form.span)
    ]
    pieces = (windows[at : at + _READ] for at in range(0, len(windows), _READ))
    cores = torch.get_num_threads() if device.type == "cpu" else os.cpu_count() or 1
    threads, pieces_per_batch, done = min(cores, _MOST_READERS), _BATCH[device.type] // _READ, 0
    pool = ThreadPoolExecutor(threads)
    try:
        pending = [pool.submit(reader.read_batch, piece) for piece in islice(pieces, threads + 2 * pieces_per_batch)]
        while pending:
            parts = [piece.result() for piece in pending[:pieces_per_batch]]
            pending = [
                *pending[pieces_per_batch:],
                *(pool.submit(reader.read_batch, piece) for piece in islice(pieces, pieces_per_batch)),
            ]
            batch = (
                {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts[1:] else parts[0]
            )
            last = int(batch["clip"][-1]) + 1
            advance(last - done)
            done = last
            yield batch
    finally:
        pool.shutdown(cancel_futures=True)
