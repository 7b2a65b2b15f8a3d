"""Where the checkpoints and final weights of a run lie, which of them are whole, and which one a path means: no torch.

<run>/iteration-000100/checkpoint.{pt,json}, <run>/final/model.pt
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
"""Beside a checkpoint: its size and SHA-256. Written last: a checkpoint without it is not whole."""
MODEL_FILE = "final/model.pt"
_PREFIX = "iteration-"


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written."""


def checkpoint_name(iteration: int) -> str:
    return f"{_PREFIX}{iteration:06d}"


def is_checkpoint_name(name: str) -> bool:
    return name.startswith(_PREFIX) and name.removeprefix(_PREFIX).isdecimal()


def checkpoint_uri(run: str, iteration: int, file: str = CHECKPOINT_FILE) -> str:
    return storage.join(run, checkpoint_name(iteration), file)


def checkpoint_iterations(run: str) -> list[int]:
    """The iterations of a run's checkpoints that were written to their end, ascending."""
    files = (CHECKPOINT_FILE, CHECKSUM_FILE)
    return [n for n in _named_iterations(run) if all(storage.exists(checkpoint_uri(run, n, file)) for file in files)]


def _named_iterations(run: str) -> list[int]:
    names = filter(is_checkpoint_name, storage.list_names(run))
    return sorted(int(name.removeprefix(_PREFIX)) for name in names)


def remove_checkpoints(run: str, keep: Container[int] = ()) -> None:
    """Delete a run's checkpoints, broken ones too, but those of the iterations to keep."""
    for iteration in _named_iterations(run):
        if iteration not in keep:
            storage.remove(checkpoint_uri(run, iteration, CHECKSUM_FILE))  # first: half a checkpoint is none
            storage.remove_folder(storage.join(run, checkpoint_name(iteration)))


def checksum(data: bytes) -> dict[str, Any]:
    """What stands in a checkpoint's `CHECKSUM_FILE`."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_whole(uri: str) -> bytes:
    """A file's content; of a checkpoint that has a checksum beside it, `DamagedCheckpoint` where it is another."""
    uri = storage.absolute(uri)
    data = storage.read_bytes(uri)
    folder, _, name = uri.rpartition("/")
    beside = storage.join(folder, CHECKSUM_FILE)
    if name != CHECKPOINT_FILE or not storage.exists(beside):
        return data
    try:
        right = storage.read_json(beside) == checksum(data)
    except UserError:  # it is damaged itself
        right = False
    if not right:
        raise DamagedCheckpoint(f"{uri}: damaged, it is not what was written")
    return data


def read_last_whole(run: str) -> tuple[int, bytes] | None:
    """(iteration, content) of a run's last checkpoint whose checksum is right; each damaged one after it is named."""
    for iteration in reversed(checkpoint_iterations(run)):
        try:
            return iteration, read_whole(checkpoint_uri(run, iteration))
        except DamagedCheckpoint as error:
            say(f"{error}; going back to the one before")
    return None


def last_whole(run: str) -> int | None:
    """The iteration of a run's last checkpoint whose checksum is right; each damaged one after it is named."""
    found = read_last_whole(run)
    return found[0] if found else None


def find_checkpoint(uri: str) -> str:
    """The file meant by a file, a checkpoint's folder or a run's folder.

    A run that has ended means its final weights, another its last whole checkpoint. Raises `UserError` for another
    folder; what is not there stays as given.
    """
    uri = storage.absolute(uri)
    if storage.is_file(uri) or not storage.exists(uri):
        return uri
    for file in (storage.join(uri, MODEL_FILE), storage.join(uri, CHECKPOINT_FILE)):
        if storage.is_file(file):
            return file
    found = read_last_whole(uri)
    if found is None:
        raise UserError(f"{uri}: no whole checkpoint in this folder; give a run, of a search one below runs/")
    return checkpoint_uri(uri, found[0])


def run_of(uri: str) -> str:
    """The run's folder of a checkpoint's or final weights' file; of a file that lies elsewhere, its own folder."""
    folder = uri.rpartition("/")[0]
    above, _, name = folder.rpartition("/")
    return above if is_checkpoint_name(name) or is_final(uri) else folder


def is_final(uri: str) -> bool:
    """Whether a file is where a run's final weights lie."""
    return uri.endswith(f"/{MODEL_FILE}")
