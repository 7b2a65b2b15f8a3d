"""The commands `report` and `visualize`. Imports are inside the functions so that `--help` prints at once."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

from tune_ego.errors import UserError


def report(
    search: Annotated[str, typer.Argument(help="STORAGE/NAME of a search.")],
    other: Annotated[Optional[str], typer.Argument(help="STORAGE/NAME of a second search, to compare.")] = None,
    out: Annotated[
        str,
        typer.Option("--out", help="File or URI of the page, ending in .html; its numbers go to the same name, .json."),
    ] = "report.html",
    evaluation: Annotated[
        Optional[str],
        typer.Option(
            "--evaluation",
            help="An evaluation.json or its run; default: the evaluated run of the best configuration in STORAGE.",
        ),
    ] = None,
    checkpoint: Annotated[
        Optional[str],
        typer.Option("--checkpoint", help="Run or checkpoint whose attention is drawn; default: the evaluated one."),
    ] = None,
    data: Annotated[
        Optional[str],
        typer.Option("--data", help="Folder or URI of the shards, to draw attention on the best and worst test clips."),
    ] = None,
    reference: Annotated[
        Optional[str],
        typer.Option(
            "--reference",
            metavar="CONFIGURATION",
            help="Configuration that the others are compared with over their repeats; default: the best one.",
        ),
    ] = None,
) -> None:
    """Write the results of a search, or a comparison of two, as one HTML page that needs no network.

    Reads the files of a search, running or not, and evaluation.json. Writes a page of a few MB at most, and its numbers
    as JSON. Takes seconds; --data adds a forward pass of one window of up to 200 test clips.
    """
    from tune_ego.report.write import write_comparison, write_report

    if other is None:
        write_report(search, out, evaluation, checkpoint, data, reference)
    elif evaluation or checkpoint or data or reference:
        raise UserError(
            "report A B compares two searches: --evaluation, --checkpoint, --data and --reference are for a report of "
            "one"
        )
    else:
        write_comparison((search, other), out)


def visualize(
    checkpoint: Annotated[str, typer.Argument(help="A run (its last checkpoint), a checkpoint's folder or its file.")],
    clip: Annotated[str, typer.Argument(help="Name of a clip in the shards.")],
    data: Annotated[str, typer.Option("--data", help="Folder or URI of the shards that `prepare` wrote.")],
    out: Annotated[
        Optional[str],
        typer.Option("--out", help="Path of the two files without .mp4 and .png; default: CLIP in this folder."),
    ] = None,
) -> None:
    """Draw a model's attention on one clip, with the gaze and the class scores of each window.

    Reads a checkpoint and shards. Writes OUT.mp4 (H.264) and OUT.png, a strip of 8 frames. Takes seconds: a forward
    pass of the window at every 8th frame.
    """
    from tune_ego.evaluation.visualize import visualize as run

    run(checkpoint, clip, data, out or clip)
