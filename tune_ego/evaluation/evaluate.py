"""`evaluate`: the dense test protocol of Lu, Liao, Li (ICCV Workshops 2019).

Windows at frames 0, 8, 16, ... and one that ends with the clip, centre crop, softmax scores averaged over a clip's
windows; the two streams are fused by the (weighted) mean of their scores. Attention is compared with gaze.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from tune_ego.feed.sampling import View, Window, dense_starts, views
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
    checkpoint: str,
    data: str,
    split: int | None = None,
    out: str | None = None,
    fusion_weight: float | None = None,
    *,
    crops: int = 1,
    flips: bool = False,
) -> dict[str, Any]:
    """Test a checkpoint on the test clips of an official split; return the content of `evaluation.json` and write it.

    Args:
        checkpoint: A run (the final weights of one that has ended, else its last whole checkpoint), a checkpoint's
            folder, or the file of a checkpoint or of final weights.
        data: Folder or URI of the shards.
        split: 1 to 3; None: the one that it was trained on.
        out: File for the result; None: `evaluation.json` in the checkpoint's run.
        fusion_weight: RGB's share of the fused scores; None: the configuration's.
        crops: 1: the centre crop; 3: centre, left end and right end. Scores are averaged over them.
        flips: Average over the mirrored form of each crop, too.

    Raises:
        UserError: Checkpoint and shards do not belong together, the model's scores are not finite, or a value is out of
            range.
    """
    if crops not in (1, 3):
        raise UserError(f"--crops {crops}: 1 or 3")
    source, config, origin, model, shards, iteration = open_model(checkpoint, data)
    if fusion_weight is not None:
        _check_fusion_weight(fusion_weight, config, source)
    split = config.data.split if split is None else split
    clips = shards.test(split)
    chosen = views(shards.image_size, config.data.crop, crops, flips=flips)
    scores, attention = score_clips(model, config, clips, shards, chosen)
    weight = config.fusion_weight if fusion_weight is None else fusion_weight
    scores_by_name = {name: scores_NK.cpu() for name, scores_NK in scores.reduce(weight).items()}
    label_N = torch.tensor([clip.label for clip in clips])
    result: dict[str, Any] = {
        "split": split,
        "trained_on_split": config.data.split,
        "clips": len(clips),
        "clips_trained_on": len({clip.name for clip in clips} & set(shards.clip_names("train", config.data.split))),
        "crops": crops,
        "flips": flips,
        "chance": 1 / len(origin.actions),
        "iteration": iteration,
        "checkpoint": source,
        **action_results(
            scores_by_name, label_N, shards.actions, shards.verbs_and_nouns(), training_clips(shards, split)
        ),
        "attention": attention,
    }
    if "fused" in result:
        result |= {"fusion_weight": weight, "fusion_sweep": fusion_sweep(scores_by_name, label_N)}
    storage.write_json(out or storage.join(run_of(source), experiment.EVALUATION_FILE), result)
    return result


def training_clips(shards: Shards, split: int) -> list[int]:
    """Return the number of training clips of each class in an official split, validation clips included."""
    rows = shards.table.select(["action", f"split{split}"]).to_pylist()
    labels = [row["action"] for row in rows if row[f"split{split}"] == "train"]
    return np.bincount(labels, minlength=len(shards.actions)).tolist()


def score_clips(
    model: TwoStream, config: Config, clips: list[Clip], shards: Shards, chosen: list[View] | None = None
) -> tuple[ClipScores, dict[str, dict[str, Any] | None]]:
    """Return (class scores, agreement of each stream's attention with gaze) over all dense windows of the clips.

    Each window is scored in each of the `chosen` crops, by default the centre crop. The attention is that of the first.

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
    chosen, seen = chosen or views(shards.image_size, config.data.crop), 0
    with torch.inference_mode(), progress("clips", len(clips)) as advance:
        batches = _batches(reader, chosen, device, advance)
        for done, batch in enumerate(batches_to_device(batches, device), start=1):
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                outputs = model(batch.model_input())
            non_finite.add(outputs, batch.clip_B)
            if done % _CHECK_EVERY[device.type] == 0:
                non_finite.check()
            scores.add(batch.clip_B, {name: output.logits_BK for name, output in outputs.items()}, batch.present_B)
            first = slice(-seen % len(chosen), None, len(chosen))  # a slice needs no wait for the GPU, a mask does
            seen += len(batch.clip_B)
            points = (batch.gaze_BT2[first], batch.gaze_valid_BT[first])
            if not gaze or not len(points[0]):
                continue
            for name, output in outputs.items():
                map_BTHW = output.attention_BTHW[first]
                gaze[name].add(map_BTHW, *points)
            gaze["centre"].add_centre(map_BTHW.shape, *points, config.loss.gaze_sigma)
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
    scores: dict[str, Tensor],
    label_N: Tensor,
    actions: list[str],
    parts: ActionParts,
    training: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Return accuracies, per-class recall and the confusion matrix [true, predicted] of each entry of `scores` [N, K].

    Args:
        scores: Stream or `fused` -> class scores.
        label_N: True classes.
        actions: The K class names.
        parts: Verb and noun of each action; those of a prediction are of the predicted action
            (`dataset.annotations.split_actions`).
        training: Number of training clips of each class, for the mean recalls by frequency; None: they are left out.
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
        if training is not None:
            result[name]["by_frequency"] = recall_by_frequency(class_recall(counts), training)
    clips = torch.bincount(label_N, minlength=len(actions)).tolist()
    classes = [{"action": name, "clips": n} for name, n in zip(actions, clips)]
    if training is not None:
        classes = [{**one, "training_clips": count} for one, count in zip(classes, training)]
    return {**result, "classes": classes}


def recall_by_frequency(recalls: Sequence[float | None], training: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Return the mean recall of `many`, `medium` and `few`: thirds of the classes by their number of training clips.

    Classes without test clips, whose recall is None, are left out. Of equally frequent classes the first counts as the
    more frequent one.
    """
    tested = [label for label, recall in enumerate(recalls) if recall is not None]
    ordered = sorted(tested, key=lambda label: -training[label])
    result = {}
    for name, part in zip(("many", "medium", "few"), np.array_split(np.array(ordered, int), 3)):
        values = [recall for label in part if (recall := recalls[label]) is not None]
        counts = [training[label] for label in part]
        if values:
            mean = float(np.mean(values))
            result[name] = {"classes": len(values), "training_clips": [min(counts), max(counts)], "recall": mean}
    return result


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
    reader: WindowReader, chosen: list[View], device: torch.device, advance: Callable[[int], None]
) -> Iterator[dict[str, np.ndarray]]:
    """Yield every dense window of every clip, in each of the chosen crops, in batches; threads read ahead.

    `advance` is called with the number of clips that are complete since its last call.
    """
    cv2.setNumThreads(1)
    windows: list[Window | None] = [
        Window(index, start, *view)
        for index, clip in enumerate(reader.clips)
        for start in dense_starts(clip.frames, reader.form.span)
        for view in chosen
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
