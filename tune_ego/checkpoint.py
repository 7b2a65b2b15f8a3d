"""What a checkpoint holds, writing and reading it: no Ray here."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from tune_ego import __version__, storage
from tune_ego.config import Config, build_config
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.experiment import (
    CHECKPOINT_FILE,
    CHECKSUM_FILE,
    checkpoint_iterations,
    checkpoint_uri,
    remove_checkpoints,
)
from tune_ego.model import TwoStream
from tune_ego.model.weights import unpack

FORMAT = 3


class Origin(NamedTuple):
    """The data set that a model was trained on."""

    actions: list[str]
    image_size: tuple[int, int]
    flow: str


def pack(config: Config, origin: Origin, iteration: int, best: dict[str, Any], **states: Any) -> dict[str, Any]:
    """The content of a checkpoint: plain containers and tensors, so that `weights_only=True` loads it.

    Random states need no place in it: each iteration seeds its own from (seed, iteration, pass).
    """
    return {
        "format": FORMAT,
        "version": __version__,
        "config": config.model_dump(mode="json"),
        "actions": origin.actions,
        "image_size": list(origin.image_size),
        "flow_method": origin.flow,
        "iteration": iteration,
        "best": best,
        **states,
    }


def to_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class DamagedCheckpoint(UserError):
    """A checkpoint that is not what was written."""


def write_checkpoint(run: str, content: dict[str, Any], keep: Iterable[int] = ()) -> None:
    """Write a run's checkpoint; of all, the last two, that of the best validation and the iterations `keep` stay."""
    iteration = content["iteration"]
    earlier = [saved for saved in checkpoint_iterations(run) if saved < iteration]
    data, checksum = to_bytes(content), checkpoint_uri(run, iteration, CHECKSUM_FILE)
    storage.remove(checksum)  # of one that was damaged
    storage.write_bytes(checkpoint_uri(run, iteration), data)
    storage.write_json(checksum, _checksum(data))
    remove_checkpoints(run, keep={iteration, content["best"].get("iteration"), *earlier[-1:], *keep})


def mean_weights(run: str, iterations: list[int]) -> dict[str, torch.Tensor]:
    """The mean of the weights in a run's checkpoints of these iterations; counters are the last one's."""
    states = [read_checkpoint(checkpoint_uri(run, iteration))["model"] for iteration in iterations]
    last: dict[str, torch.Tensor] = states[-1]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in last.items()
    }


def _checksum(data: bytes) -> dict[str, Any]:
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def last_whole(run: str) -> int | None:
    """The iteration of a run's last checkpoint whose checksum is right; each damaged one after it is named."""
    found = _last_whole(run)
    return found[0] if found else None


def last_checkpoint(run: str) -> tuple[dict[str, Any], str] | None:
    """(content, URI) of that checkpoint."""
    found = _last_whole(run)
    if found is None:
        return None
    uri = checkpoint_uri(run, found[0])
    return _content(found[1], uri), uri


def _last_whole(run: str) -> tuple[int, bytes] | None:
    for iteration in reversed(checkpoint_iterations(run)):
        try:
            return iteration, _read_whole(checkpoint_uri(run, iteration))
        except DamagedCheckpoint as error:
            say(f"{error}; going back to the one before")
    return None


def _read_whole(uri: str) -> bytes:
    data = storage.read_bytes(uri)
    checksum = storage.join(uri.rpartition("/")[0], CHECKSUM_FILE)
    try:
        right = not storage.exists(checksum) or storage.read_json(checksum) == _checksum(data)
    except UserError:  # it is damaged itself
        right = False
    if not right:
        raise DamagedCheckpoint(f"{uri}: damaged, it is not what was written")
    return data


def read_checkpoint(uri: str) -> dict[str, Any]:
    """A checkpoint's content, from its file or the folder it is in.

    Raises `UserError` where it is none, or of another format; `DamagedCheckpoint` where its checksum is another.
    """
    if not storage.exists(uri):
        raise UserError(f"{uri}: there is no checkpoint here")
    if storage.exists(storage.join(uri, CHECKPOINT_FILE)):
        uri = storage.join(uri, CHECKPOINT_FILE)
    return _content(_read_whole(uri), uri)


def _content(data: bytes, uri: str) -> dict[str, Any]:
    content = unpack(data, uri)
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise UserError(f"{uri}: not a checkpoint of tune_ego")
    if content["format"] != FORMAT:
        raise UserError(f"{uri}: a checkpoint of format {content['format']}; this tune_ego reads format {FORMAT}")
    return content


def rebuild(content: dict[str, Any], source: str) -> tuple[Config, Origin, TwoStream]:
    """Configuration, data set and model of a checkpoint, weights loaded."""
    config = build_config(content["config"], source)
    origin = Origin(content["actions"], tuple(content["image_size"]), content["flow_method"])
    model = TwoStream(config.stream_names, len(origin.actions), config.model)
    load_model_state(model, content["model"], source)
    return config, origin, model


def load_model_state(model: TwoStream, state: dict[str, Any], source: str) -> None:
    """Load strictly; the first difference is a `UserError` with both shapes."""
    ours = model.state_dict()
    for name in sorted(ours.keys() | state.keys()):
        shapes = [
            tuple(side[name].shape) if isinstance(side.get(name), torch.Tensor) else "absent" for side in (state, ours)
        ]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{source}: a checkpoint of another model: {name} is {shapes[0]} there, {shapes[1]} in this one"
            )
    model.load_state_dict(state)
