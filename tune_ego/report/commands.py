"""The commands that show: `report` and `visualize`. What they need is imported inside them, as in `cli`."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from tune_ego.errors import UserError


def report(
    experiment: Annotated[str, typer.Argument(help="STORAGE/NAME of a search.")],
    other: Annotated[Optional[str], typer.Argument(help="Another search, to compare the two.")] = None,
    out: Annotated[
        str, typer.Option("--out", help="Page to write, or URI, ending in .html; its numbers go beside it as .json.")
    ] = "report.html",
    evaluation: Annotated[
        Optional[str],
        typer.Option(
            "--evaluation",
            help="An evaluation.json or its run; else that of the run beside the search that has its best values.",
        ),
    ] = None,
    checkpoint: Annotated[
        Optional[str],
        typer.Option("--checkpoint", help="Whose attention is drawn: a run, or checkpoint; else what was evaluated."),
    ] = None,
    data: Annotated[
        Optional[str], typer.Option("--data", help="Shards: draws attention maps, best and worst test clips.")
    ] = None,
) -> None:
    """Write what an experiment found as one HTML page that needs no network, or compare two.

    Reads the experiment's files, running or not, and evaluation.json. Writes a page of a few MB at most and its numbers
    as JSON. Takes seconds; with --data also a forward pass of one window of up to 200 test clips.
    """
    from tune_ego.report.write import write_comparison, write_report

    if other is None:
        write_report(experiment, out, evaluation, checkpoint, data)
    elif evaluation or checkpoint or data:
        raise UserError("report A B compares searches: --evaluation, --checkpoint and --data belong to a report of one")
    else:
        write_comparison((experiment, other), out)


def visualize(
    checkpoint: Annotated[str, typer.Argument(help="A run (its last checkpoint), a checkpoint's folder or its file.")],
    clip: Annotated[str, typer.Argument(help="Name of a clip in the shards.")],
    data: Annotated[str, typer.Option("--data", help="Folder or URI of the shards that `prepare` wrote.")],
    out: Annotated[
        Optional[str], typer.Option("--out", help="Path of the files without their endings; else CLIP here.")
    ] = None,
) -> None:
    """Draw what a model sees in one clip: attention, gaze, and the class scores of each window.

    Reads a checkpoint and shards. Writes OUT.mp4 (H.264) and OUT.png, a strip of 8 frames. Costs a forward
    pass of every 8th frame's window: seconds.
    """
    from tune_ego.evaluation.visualize import visualize as run

    run(checkpoint, clip, data, out or clip)
