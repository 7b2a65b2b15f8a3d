"""The commands `synthesize` and `prepare`. Imports are inside the functions so that `--help` prints at once."""

from __future__ import annotations

import enum
from typing import Annotated, Optional

import typer

from tune_ego.errors import UserError
from tune_ego.options import Address, Seed, parse_size


class FlowChoice(str, enum.Enum):
    dis = "dis"
    tvl1 = "tvl1"
    farneback = "farneback"
    raft = "raft"


def synthesize(
    out: Annotated[str, typer.Argument(help="Folder to write; must be empty or absent.")],
    verbs: Annotated[int, typer.Option(help="Number of motions; an action is a verb and a noun.")] = 3,
    nouns: Annotated[int, typer.Option(help="Number of objects.")] = 4,
    clips: Annotated[int, typer.Option(help="Number of clips.")] = 480,
    seconds: Annotated[float, typer.Option(help="Mean length of a clip.")] = 1.5,
    size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the videos, pixels.")] = "320x240",
    distractors: Annotated[int, typer.Option(min=0, help="Objects in each clip that are not acted on.")] = 1,
    imbalance: Annotated[
        float, typer.Option(metavar="RATIO", help="Clips of the largest class over those of the smallest one.")
    ] = 1.0,
    sessions: Annotated[
        bool, typer.Option("--sessions", help="Write the untrimmed session videos too, with idle time between clips.")
    ] = False,
    seed: Seed = 0,
) -> None:
    """Make a synthetic data set in the file layout of EGTEA Gaze+.

    Writes H.264 clips, split and index files, and gaze files in both BeGaze layouts. Takes about 10 ms a clip.
    """
    from tune_ego.dataset.synthetic import synthesize as run

    run(
        out,
        verbs=verbs,
        nouns=nouns,
        clips=clips,
        seconds=seconds,
        size=parse_size(size),
        distractors=distractors,
        imbalance=imbalance,
        sessions=sessions,
        seed=seed,
    )


def prepare(
    egtea: Annotated[str, typer.Argument(help="Folder or URI with cropped_clips/, action_annotation/ and gaze_data/.")],
    shards: Annotated[
        Optional[str], typer.Argument(help="Folder or URI for the shards; not needed with --check.")
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Read everything, write nothing, and list what is present, missing or unusual."),
    ] = False,
    image_size: Annotated[str, typer.Option(help="WIDTHxHEIGHT of the stored frames, pixels.")] = "320x240",
    flow: Annotated[
        FlowChoice,
        typer.Option(help="Optical flow. tvl1 is the published method; dis takes a fiftieth of its time on a CPU."),
    ] = FlowChoice.dis,
    flow_weights: Annotated[
        Optional[str], typer.Option("--flow-weights", help="State dict of torchvision's RAFT, for --flow raft.")
    ] = None,
    frame_offset: Annotated[
        int, typer.Option(help="Added to a clip's session frames to find its gaze; published code has 0 and -1.")
    ] = 0,
    keep_damaged: Annotated[
        bool, typer.Option("--keep-damaged", help="Keep clips whose decoder reports damage; by default left out.")
    ] = False,
    allow_missing: Annotated[
        bool,
        typer.Option(
            "--allow-missing",
            help="Continue although over 5 % of the clips cannot be used, or most are not as long as named.",
        ),
    ] = False,
    jobs: Annotated[
        Optional[int], typer.Option(min=1, help="Shards made at a time; by default one for each CPU.")
    ] = None,
    address: Address = None,
) -> None:
    """Turn EGTEA's clips and gaze into Parquet shards: JPEG frames, optical flow, gaze per frame, labels.

    Reads the EGTEA folder and writes SHARDS. If the command was killed, the same command continues. All of EGTEA takes
    about 20 GB and several hours on two CPU cores at 320 x 240 with DIS flow; --check estimates the hours.
    """
    from tune_ego.dataset.prepare import Settings

    settings = Settings(parse_size(image_size), flow.value, flow_weights, frame_offset, keep_damaged)
    if check:
        from tune_ego.dataset.check import check as run_check

        run_check(egtea, settings, shards, allow_missing=allow_missing)
    elif shards is None:
        raise UserError("prepare EGTEA SHARDS: give a folder or URI for the shards, or --check")
    else:
        from tune_ego.dataset.prepare import prepare as run

        run(egtea, shards, settings, allow_missing=allow_missing, jobs=jobs, address=address)
