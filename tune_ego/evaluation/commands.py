"""The command `evaluate`. Imports are inside the function so that `--help` prints at once."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from tune_ego.errors import UserError
from tune_ego.options import Crops, Flips

_Checkpoint = Annotated[
    Optional[str],
    typer.Argument(
        help="A run (its final weights, or its last checkpoint), a checkpoint's folder or file, or a search: all its "
        "finished trials."
    ),
]
_Data = Annotated[
    str, typer.Option("--data", help="Folder or URI of the shards; with --scores, of EGTEA with its annotations.")
]
_Scores = Annotated[
    Optional[tuple[str, str]],
    typer.Option(
        "--scores",
        metavar="RGB FLOW",
        help="Instead of a checkpoint: text files with a row of class scores for each test clip of the split, in the "
        "order of EGTEA's split file; - for a stream without one.",
    ),
]
_Split = Annotated[
    Optional[int],
    typer.Option(min=1, max=3, help="Official split whose test clips are used; by default the split of the training."),
]
_Out = Annotated[
    Optional[str], typer.Option("--out", help="JSON file to write; by default evaluation.json in the run.")
]
_FusionWeight = Annotated[
    Optional[float],
    typer.Option(min=0, max=1, help="Weight of RGB in the fused scores; by default that of the configuration."),
]
_Sweep = Annotated[bool, typer.Option("--fusion-sweep", help="Print the accuracy for RGB weights from 0 to 1.")]
_Compare = Annotated[bool, typer.Option("--compare", help="Print the published results beside these.")]


def evaluate(
    data: _Data,
    checkpoint: _Checkpoint = None,
    scores: _Scores = None,
    split: _Split = None,
    out: _Out = None,
    fusion_weight: _FusionWeight = None,
    fusion_sweep: _Sweep = False,
    compare: _Compare = False,
    crops: Crops = 1,
    flips: Flips = False,
) -> None:
    """Test a checkpoint: dense windows, centre crop, scores averaged over a clip's windows and fused over the streams.

    Of a search all finished trials are tested that are not yet: run it again to continue.
    Reads a checkpoint and shards, or with --scores the scores that another program wrote. Prints accuracies of action,
    verb and noun, the weakest classes, and the agreement of attention with gaze. Writes these, recalls and confusion
    matrices to evaluation.json. Costs a forward pass for every 8th frame, and for each crop.
    """
    if (checkpoint is None) == (scores is None):
        raise UserError("evaluate needs a checkpoint or search, or --scores RGB FLOW")
    from tune_ego.evaluation.evaluate import evaluate as evaluate_checkpoint
    from tune_ego.evaluation.score_files import evaluate_scores
    from tune_ego.evaluation.tables import show
    from tune_ego.evaluation.trials import evaluate_trials, is_search

    if checkpoint is not None and is_search(checkpoint):
        if out is not None or fusion_sweep or compare:
            raise UserError("--out, --fusion-sweep and --compare are for one checkpoint, not for a search")
        evaluate_trials(checkpoint, data, split, fusion_weight, crops=crops, flips=flips)
        return
    if checkpoint is not None:
        result = evaluate_checkpoint(checkpoint, data, split, out, fusion_weight, crops=crops, flips=flips)
    elif scores is not None:
        if crops != 1 or flips:
            raise UserError("--crops and --flips are for a checkpoint, not for --scores")
        result = evaluate_scores(*scores, data, split, out, fusion_weight)
    show(result, sweep=fusion_sweep, compare=compare)
