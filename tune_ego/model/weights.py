"""Loading weights: published files and our own checkpoints into one stream."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.model.two_stream import Stream

_CLASSIFIER = ("logits.conv3d.weight", "logits.conv3d.bias")


class LoadedWeights(NamedTuple):
    """Parameter names, as in the model."""

    loaded: list[str]
    left_out: list[str]
    """In the file, not taken: a classifier of another number of classes, attention where the stream has none."""
    fresh: list[str]
    """In the stream, not in the file: they keep their initial values, or become copies of block 1 (`copy_init`)."""
    flow_method: str | None = None
    """The flow that a checkpoint of ours was trained on; other files do not say."""

    @property
    def modules_left_out(self) -> list[str]:
        return _modules(self.left_out)

    @property
    def fresh_modules(self) -> list[str]:
        return _modules(self.fresh)


def _modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def load_tensors(uri: str | Path) -> Any:
    """What `torch.save` wrote, tensors and plain containers only: a file that would run code is refused."""
    try:
        data = storage.read_bytes(uri)
    except OSError as error:
        raise UserError(f"{uri}: cannot be read ({error})") from error
    return unpack(data, str(uri))


def unpack(data: bytes, source: str) -> Any:
    """As `load_tensors`, of a file's content."""
    try:
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes happen to mean
        raise UserError(f"{source}: not weights that can be loaded ({' '.join(str(error).split())[:160]})") from error


def load_weights(stream: Stream, path: str | Path) -> LoadedWeights:
    """Load a file of weights into `stream`.

    Takes I3D Kinetics files, Lu's "-o" and "-a" files (each with or without DataParallel's `module.` prefix), and
    `model.pt` or a checkpoint of ours. A classifier of another number of classes is left out, and attention where the
    stream has none; attention starts fresh where the file has none, and whole blocks beyond the file's depth do. Any
    other difference is a `UserError` that names parameter and both shapes.
    """
    content = load_tensors(path)
    flow_method = content.get("flow_method") if isinstance(content, dict) else None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(
        isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items()
    ):
        raise UserError(f"{path}: not a state dict of tensors")
    found = {name.removeprefix("module."): value for name, value in content.items()}
    ours = f"{stream.modality}."
    if any(name.startswith(("rgb.", "flow.")) for name in found):
        found = {name.removeprefix(ours): value for name, value in found.items() if name.startswith(ours)}
        if not found:
            raise UserError(f"{path}: holds no {stream.modality} stream")
    return _load(stream, found, str(path))._replace(flow_method=flow_method)


def _load(stream: Stream, found: dict[str, Tensor], path: str) -> LoadedWeights:
    state = stream.state_dict()
    left_out = [name for name in found if name.startswith("attention_")] if not stream.attention_modules else []
    if _has_other_classes(found, state):
        left_out += _CLASSIFIER
    found = {name: value for name, value in found.items() if name not in left_out}
    there = set(_modules(found))
    may_be_absent = {"logits"} - there
    if not there & set(stream.attention_modules):
        may_be_absent |= set(stream.attention_modules)
    else:  # blocks beyond the file's depth
        may_be_absent |= set(stream.attention_modules[1:-1]) - there
    unknown = sorted(found.keys() - state.keys())
    absent = [name for name in state if name not in found and not name.endswith("num_batches_tracked")]
    fresh = [name for name in absent if name.partition(".")[0] in may_be_absent]
    if unknown or len(fresh) != len(absent):
        missing = sorted(set(absent) - set(fresh))
        raise UserError(f"{path}: not weights of this model: {_first('unknown', unknown)}{_first('absent', missing)}")
    for name, value in found.items():
        if value.shape != state[name].shape:
            shapes = f"{tuple(value.shape)} in the file, {tuple(state[name].shape)} in the {stream.modality} stream"
            other = " (weights of the other modality?)" if name == "Conv3d_1a_7x7.conv3d.weight" else ""
            raise UserError(f"{path}: {name} is {shapes}{other}")
    stream.load_state_dict(found, strict=False)
    stream.copy_blocks(_modules(fresh))
    return LoadedWeights(sorted(found), left_out, fresh)


def _has_other_classes(found: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Whether the file's classifier is a whole one of as many inputs, for another number of classes."""
    weight, bias = (found.get(name) for name in _CLASSIFIER)
    if weight is None or bias is None or bias.ndim != 1 or bias.shape == state[_CLASSIFIER[1]].shape:
        return False
    return weight.shape == (len(bias), *state[_CLASSIFIER[0]].shape[1:])


def _first(what: str, names: list[str]) -> str:
    return f"{len(names)} {what} (first {names[0]}) " if names else ""
