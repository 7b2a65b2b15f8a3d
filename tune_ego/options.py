"""Options that several commands share, and the values that they are parsed to."""

from __future__ import annotations

from typing import Annotated, Any, Optional

import typer

from tune_ego.errors import UserError

Address = Annotated[
    Optional[str],
    typer.Option("--address", help="Ray cluster to join, e.g. auto; default: RAY_ADDRESS, else one is started here."),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of all random numbers.")]
Data = Annotated[str, typer.Option("--data", help="Folder or URI of the shards that `prepare` wrote.")]
Storage = Annotated[str, typer.Option("--storage", help="Folder or URI under which results go.")]
Name = Annotated[str, typer.Option("--name", help="Name of the result below --storage.")]
Set = Annotated[
    Optional[list[str]], typer.Option("--set", metavar="KEY=VALUE", help="Override a configuration key; repeatable.")
]
Track = Annotated[
    list[str],
    typer.Option("--track", metavar="TRACKER", help="tensorboard, mlflow or wandb; mlflow? is optional; repeatable."),
]
NodeType = Annotated[
    Optional[list[str]],
    typer.Option("--node-type", help="Nodes that the cluster may start, e.g. CPU=16,GPU=1,max=8; repeatable."),
]
Crops = Annotated[int, typer.Option(help="Crops of each window: 1 (centre) or 3 (left, centre, right).")]
Flips = Annotated[bool, typer.Option("--flips", help="Score each crop mirrored as well.")]


def parse_changes(pairs: list[str] | None) -> dict[str, Any]:
    """Return key -> value of `--set` options. Raises `UserError` for one that is not KEY=VALUE."""
    from tune_ego.yaml_files import parse_yaml

    changes = {}
    for pair in pairs or []:
        key, separator, value = pair.partition("=")
        if not separator:
            raise UserError(f"--set {pair}: write KEY=VALUE")
        changes[key] = parse_yaml(value, f"--set {key}")
    return changes


def parse_size(text: str) -> tuple[int, int]:
    """Return (width, height) of a text such as `320x240`. Raises `UserError`."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UserError(f"{text!r} is not a size; write WIDTHxHEIGHT, e.g. 320x240")
    return int(width), int(height)
