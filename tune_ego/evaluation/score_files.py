"""Evaluation of class scores that another program wrote, such as the files that were published with Lu's models.

A file has a row for each test clip of an official split, in the order of EGTEA's split file, and a column for each
action class. N clips, K classes.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tune_ego import storage
from tune_ego.console import say
from tune_ego.dataset.annotations import action_parts, read_annotations, read_split
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import action_results, fusion_sweep
from tune_ego.training.metrics import fuse

ABSENT = "-"
"""Stands for the file of a stream that has none."""
_ROUNDING = 1e-2
"""Largest deviation of a row's sum from 1 that is due to rounded probabilities."""


def evaluate_scores(
    rgb: str,
    flow: str,
    egtea: str,
    split: int | None = None,
    out: str | None = None,
    fusion_weight: float | None = None,
) -> dict[str, Any]:
    """Evaluate files of scores; return what `evaluate` returns of a checkpoint, without attention.

    Args:
        rgb: File or URI of the RGB stream's scores, or `ABSENT`.
        flow: The same of the flow stream.
        egtea: EGTEA's folder or URI, of which the annotations are read.
        split: Official split, 1 to 3; by default 1.
        out: JSON file to write; by default none.
        fusion_weight: Share of RGB in the fused scores; by default one half.

    Raises:
        UserError: A file does not have a row for each test clip and a column for each class, or both are absent.
    """
    split = 1 if split is None else split
    annotations = read_annotations(egtea)
    lines = read_split(storage.join(egtea, "action_annotation", f"test_split{split}.txt"))
    shape = (len(lines), len(annotations.actions))
    files = {name: file for name, file in (("rgb", rgb), ("flow", flow)) if file != ABSENT}
    if not files:
        raise UserError(f"--scores {ABSENT} {ABSENT}: give the file of one stream at least")
    scores = {name: torch.from_numpy(read_scores(file, shape)) for name, file in files.items()}
    label_N = torch.tensor([line.action - 1 for line in lines])
    weight = 0.5 if fusion_weight is None else fusion_weight
    fused: dict[str, Any] = {}
    if len(scores) == 2:
        scores["fused"] = fuse(scores, weight)
        fused = {"fusion_weight": weight, "fusion_sweep": fusion_sweep(scores, label_N)}
    result = {
        "split": split,
        "clips": len(lines),
        "chance": 1 / len(annotations.actions),
        "scores": files,
        **action_results(scores, label_N, annotations.actions, action_parts(annotations)),
        **fused,
    }
    if out is not None:
        storage.write_json(out, result)
    return result


def read_scores(file: str | Path, shape: tuple[int, int]) -> np.ndarray:
    """Read a text file of scores, float64 [N, K] of shape `shape`: softmax scores, or logits, which are converted.

    Columns are separated by blanks or commas. Raises `UserError` for another shape or values that are no numbers.
    """
    try:
        text = storage.read_text(file)
        scores_NK = np.loadtxt(io.StringIO(text.replace(",", " ")), ndmin=2)
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not a text file of scores ({str(error).partition(';')[0]})") from error
    if scores_NK.shape != shape:
        rows, columns = scores_NK.shape
        raise UserError(
            f"{file}: has {rows} rows of {columns} scores; expected a row for each of the {shape[0]} test clips and a "
            f"column for each of the {shape[1]} classes"
        )
    if not np.isfinite(scores_NK).all():
        row = int(np.flatnonzero(~np.isfinite(scores_NK).all(axis=1))[0])
        raise UserError(f"{file}: row {row + 1} holds a score that is not finite")
    if scores_NK.min() >= 0 and np.abs(scores_NK.sum(axis=1) - 1).max() <= _ROUNDING:
        return scores_NK
    say(f"{file}: its rows are no probabilities; a softmax makes them so")
    return torch.from_numpy(scores_NK).softmax(dim=1).numpy()
