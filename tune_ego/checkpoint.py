"""What a checkpoint holds, and reading it without Ray."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import torch

from tune_ego import __version__, storage
from tune_ego.config import Config, build_config
from tune_ego.errors import UserError
from tune_ego.experiment import CHECKPOINT_FILE
from tune_ego.model import TwoStream
from tune_ego.model.weights import load_tensors

FORMAT = 2


class Origin(NamedTuple):
    """The data set that a model was trained on."""

    actions: list[str]
    image_size: tuple[int, int]
    flow: str


def pack(
    config: Config, origin: Origin, iteration: int, best: dict[str, Any], **states: dict[str, Any]
) -> dict[str, Any]:
    """The content of a checkpoint: plain containers and tensors, so that `weights_only=True` loads it.

    Random states need no place in it: each iteration seeds its own from (seed, iteration, rank).
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


def read_checkpoint(uri: str) -> dict[str, Any]:
    """A checkpoint's content, from its file or the folder it is in."""
    if not storage.exists(uri):
        raise UserError(f"{uri}: there is no checkpoint here")
    if storage.exists(storage.join(uri, CHECKPOINT_FILE)):
        uri = storage.join(uri, CHECKPOINT_FILE)
    content = load_tensors(uri)
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
        shapes = [tuple(side[name].shape) if name in side else "absent" for side in (state, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{source}: a checkpoint of another model: {name} is {shapes[0]} there, {shapes[1]} in this one"
            )
    model.load_state_dict(state)
