"""Files of a run's checkpoints and final weights: names, checksums, and the file that a path refers to. No torch.

<run>/iteration-000100/checkpoint.{pt,json}, <run>/final/model.pt

A checkpoint is whole if its content was written to the end and matches the checksum beside it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Container
from typing import Any

from tune_ego import storage
from tune_ego.console import say
from tune_ego.errors import UserError

CHECKPOINT_FILE = "checkpoint.pt"
CHECKSUM_FILE = "checkpoint.json"
"""Size and SHA-256 of the checkpoint beside it. Written last: a checkpoint without this file is not whole."""
MODEL_FILE = "final/model.pt"
"""Final weights, relative to the run's folder."""
PACKAGE_FILE, PACKAGE_CONFIG = "model.safetensors", "config.json"
"""Weights and configuration in a folder that `package` wrote."""
_PREFIX = "iteration-"


class DamagedCheckpoint(UserError):
    """A checkpoint whose content does not match its checksum."""


def checkpoint_name(iteration: int) -> str:
    """Return the name of a checkpoint's folder."""
    return f"{_PREFIX}{iteration:06d}"


def is_checkpoint_name(name: str) -> bool:
    """Return whether this is the name of a checkpoint's folder."""
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdecimal()


def checkpoint_uri(run: str, iteration: int, file: str = CHECKPOINT_FILE) -> str:
    """Return the path or URI of a checkpoint's file."""
    return storage.join(run, checkpoint_name(iteration), file)


def checkpoint_iterations(run: str) -> list[int]:
    """Return the iterations of a run's checkpoints that have both files, ascending. No checksum is verified."""
    files = (CHECKPOINT_FILE, CHECKSUM_FILE)
    return [n for n in _named_iterations(run) if all(storage.exists(checkpoint_uri(run, n, file)) for file in files)]


def _named_iterations(run: str) -> list[int]:
    """Return the iterations of all checkpoint folders of a run, complete or not, ascending."""
    names = filter(is_checkpoint_name, storage.list_names(run))
    return sorted(int(name.removeprefix(_PREFIX)) for name in names)


def remove_checkpoints(run: str, keep: Container[int] = ()) -> None:
    """Delete a run's checkpoints, incomplete ones too, except those of the iterations in `keep`."""
    for iteration in _named_iterations(run):
        if iteration not in keep:
            storage.remove(checkpoint_uri(run, iteration, CHECKSUM_FILE))  # first: half a checkpoint is none
            storage.remove_folder(storage.join(run, checkpoint_name(iteration)))


def checksum(data: bytes) -> dict[str, Any]:
    """Return the content of a checkpoint's `CHECKSUM_FILE`."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_verified(uri: str) -> bytes:
    """Read a file, and verify its checksum if it is a checkpoint with a checksum file beside it.

    Raises:
        DamagedCheckpoint: The content does not match the checksum, or the checksum file itself is damaged.
    """
    uri = storage.absolute(uri)
    data = storage.read_bytes(uri)
    folder, _, name = uri.rpartition("/")
    checksum_uri = storage.join(folder, CHECKSUM_FILE)
    if name != CHECKPOINT_FILE or not storage.exists(checksum_uri):
        return data
    try:
        right = storage.read_json(checksum_uri) == checksum(data)
    except UserError:  # the checksum file is damaged
        right = False
    if not right:
        raise DamagedCheckpoint(f"{uri}: damaged, its content does not match its checksum")
    return data


def read_last_whole_checkpoint(run: str) -> tuple[int, bytes] | None:
    """Return (iteration, content) of a run's last whole checkpoint, or None.

    Print a line for each later checkpoint that is damaged.
    """
    for iteration in reversed(checkpoint_iterations(run)):
        try:
            return iteration, read_verified(checkpoint_uri(run, iteration))
        except DamagedCheckpoint as error:
            say(f"{error}; using the checkpoint before it")
    return None


def last_whole_iteration(run: str) -> int | None:
    """Return the iteration of a run's last whole checkpoint, or None.

    Print a line for each later checkpoint that is damaged.
    """
    last = read_last_whole_checkpoint(run)
    return last[0] if last else None


def find_checkpoint(uri: str) -> str:
    """Return the file of weights that a path refers to.

    Args:
        uri: A file, or the folder of a package, a checkpoint or a run. A run's folder refers to its final weights, or
            to its last whole checkpoint if it has no final weights.

    Returns:
        The absolute path or URI of the file. A path that does not exist is returned as it is, made absolute.

    Raises:
        UserError: The folder is neither a package's, nor a checkpoint's, nor that of a run with a whole checkpoint.
    """
    uri = storage.absolute(uri)
    if storage.is_file(uri) or not storage.exists(uri):
        return uri
    for name in (PACKAGE_FILE, MODEL_FILE, CHECKPOINT_FILE):
        if storage.is_file(storage.join(uri, name)):
            return storage.join(uri, name)
    last = read_last_whole_checkpoint(uri)
    if last is None:
        raise UserError(f"{uri}: no whole checkpoint in this folder; give a run (in a search, a folder in runs/)")
    return checkpoint_uri(uri, last[0])


def run_of(uri: str) -> str:
    """Return the run's folder of a checkpoint file or final weights. For another file, return its own folder."""
    folder = uri.rpartition("/")[0]
    above, _, name = folder.rpartition("/")
    return above if is_checkpoint_name(name) or is_final(uri) else folder


def is_final(uri: str) -> bool:
    """Return whether a file has the place of a run's final weights."""
    return uri.endswith(f"/{MODEL_FILE}")
