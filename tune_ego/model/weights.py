"""Loading weights: published files and our own checkpoints into one stream."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from tune_ego.errors import UserError
from tune_ego.model.backbones import FACTS, first_convolution
from tune_ego.model.two_stream import Stream
from tune_ego.results.checkpoint_files import is_final, read_last_whole_checkpoint, read_verified, run_of

_CLASSIFIER = ("logits.conv3d.weight", "logits.conv3d.bias")
_CONTAINERS = ("model", "state_dict", "model_state_dict")
"""Keys under which training code keeps the state dict."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""Prefixes of parameter names: of DataParallel, torch.compile and Lightning."""
_COUNTERS = {"n_averaged"}
"""Entries of state dicts that are no parameters: of torch's `AveragedModel`."""
_NUMPY: list[Any] = [
    np.ndarray,
    np.dtype,
    *{type(np.dtype(kind)) for kind in "?bBhHiIlLqQefdSU"},
    *(  # the functions that unpickle numbers and arrays; their module was renamed in numpy 2
        (value.__reduce__()[0], f"{module}.multiarray.{name}")
        for module in ("numpy.core", "numpy._core")
        for name, value in (("scalar", np.float64(0)), ("_reconstruct", np.zeros(1)))
    ),
]
"""Types of numbers, strings and arrays of numpy, which training code stores beside the weights. They run no code."""
_BLOCKS = {"attention_inc": "inception", "attention_self": "attention"}
"""Beginning of the module names of each `stam_block`."""
_ZIP = b"PK\x03\x04"
_BEFORE_ZIP = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19"
"""First bytes of files that torch before 1.6 wrote."""
_NAMES_SHOWN = 5


class LoadedWeights(NamedTuple):
    """Parameter names, as in the model."""

    loaded: list[str]
    left_out: list[str]
    """Parameters of the file that were not loaded: a classifier of other classes, torchvision's head, attention where
    the stream has none."""
    fresh: list[str]
    """Modules of the stream that the file lacks: they keep their initial values or copy block 1 (`copy_init`)."""
    flow_method: str | None = None
    """Flow method that a checkpoint of tune_ego was trained on; None for other files."""

    @property
    def modules_left_out(self) -> list[str]:
        return _modules(self.left_out)

    @property
    def fresh_modules(self) -> list[str]:
        return _modules(self.fresh)


def _modules(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))


def load_tensors(uri: str | Path) -> Any:
    """Read a file of `torch.save` with tensors, numpy values and plain containers, or a file of safetensors.

    A file that runs code is refused.

    Arrays of numbers become tensors, and numpy's scalars those of Python. Raises `UserError` where the file cannot be
    read or is damaged.
    """
    try:
        data = read_verified(str(uri))
    except OSError as error:
        raise UserError(f"{uri}: cannot be read ({error})") from error
    if not str(uri).endswith(".safetensors"):
        return load_safely(data, str(uri))
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise UserError(f"{uri}: cannot be read as weights ({error})") from error


def load_safely(data: bytes, source: str) -> Any:
    """Read a file's content as `load_tensors` reads a file."""
    fault = _archive_fault(data) if data.startswith(_ZIP) else ""
    if not fault:
        try:
            with torch.serialization.safe_globals(_NUMPY):
                return _without_numpy(torch.load(io.BytesIO(data), map_location="cpu", weights_only=True))
        except Exception as error:  # torch.load raises errors of many types for arbitrary bytes
            fault = _load_fault(data, str(error))
    raise UserError(f"{source}: {fault}")  # without torch's message, which explains how to load files that run code


def _without_numpy(value: Any) -> Any:
    """Replace numpy's values in containers, in place where possible."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return torch.from_numpy(np.array(value))  # a copy: what was read may be read-only, or of another byte order
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if isinstance(value, dict):
        for key in value:
            value[key] = _without_numpy(value[key])
    elif isinstance(value, list):
        value[:] = map(_without_numpy, value)
    elif type(value) is tuple:
        return tuple(map(_without_numpy, value))
    return value


def _archive_fault(data: bytes) -> str:
    """Return the damage of a zip archive, or "". Torch does not check the archive's checksums."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            if not any(name.endswith("/data.pkl") for name in archive.namelist()):
                return "not a torch file, but another zip archive"
            damaged = archive.testzip()
    except Exception:  # zipfile raises errors of many types for arbitrary bytes
        return "a truncated or damaged archive"
    return f"a damaged archive: {_shown(damaged)} is not what was written" if damaged else ""


def _load_fault(data: bytes, error: str) -> str:
    match = re.search(r"GLOBAL ([\w.]+)", error)
    if match or "TorchScript" in error:
        return f"it holds code ({_shown(match[1]) if match else 'TorchScript'}), not only tensors: refused"
    if not data.startswith((_ZIP, _BEFORE_ZIP)):
        return "not a torch file"
    if "Weights only load failed" in error:
        return "it holds more than tensors and plain containers: refused"
    return "a truncated or damaged archive"


def _shown(name: str) -> str:
    """Return a name from a file in a form that can be printed: a file may hold any text."""
    text = name if name.isprintable() else ascii(name)
    return text if len(text) <= 100 else f"{text[:100]}..."


def load_weights(stream: Stream, path: str | Path) -> LoadedWeights:
    """Load a file of weights into `stream`.

    Accepts I3D Kinetics files, Lu's "-o" and "-a" files, and `model.pt` or a checkpoint of tune_ego; also inside the
    containers `_CONTAINERS` and with the prefixes `_PREFIXES` of other training code. A classifier of another number of
    classes is left out, and attention where the stream has none. Attention starts fresh where the file has none, and so
    do whole blocks beyond the file's depth. Any other difference is a `UserError` that names parameter and both shapes.
    """
    content = load_tensors(path)
    flow_method = content.get("flow_method") if isinstance(content, dict) else None
    tensors = _without_prefixes(_state_dict(content, str(path)), str(path))
    head: list[str] = []
    if stream.backbone != "i3d":
        tensors, head = _as_trunk(stream, tensors)
    ours = f"{stream.modality}."
    if any(name.startswith(("rgb.", "flow.")) for name in tensors):
        tensors = {name.removeprefix(ours): value for name, value in tensors.items() if name.startswith(ours)}
        if not tensors:
            raise UserError(f"{path}: holds no {stream.modality} stream")
        tensors = _without_prefixes(tensors, str(path))  # of each stream
    loaded = _load(stream, tensors, str(path))
    if stream.modality == "flow" and is_final(str(path)):  # no record of the flow method but in checkpoints
        last = read_last_whole_checkpoint(run_of(str(path)))
        flow_method = load_safely(last[1], str(path)).get("flow_method") if last else None
    return loaded._replace(flow_method=flow_method, left_out=[*loaded.left_out, *head])


def _state_dict(content: Any, path: str) -> dict[str, Tensor]:
    """Return the state dict of a file's content: parameter name -> tensor."""
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a state dict of tensors but a {type(content).__name__}")
    state = _find_state_dict(content)
    if state is None:
        keys = [_shown(str(key)) for key in content]
        more = ", ..." if len(keys) > _NAMES_SHOWN else ""
        raise UserError(
            f"{path}: not a state dict of tensors, at the top or under {', '.join(_CONTAINERS)}; "
            f"its keys: {', '.join(keys[:_NAMES_SHOWN]) or 'none'}{more}"
        )
    return state


def _find_state_dict(content: dict[Any, Any]) -> dict[str, Tensor] | None:
    """Return the first state dict in `_CONTAINERS`, at any depth, or the content itself if it is one."""
    for key in _CONTAINERS:
        if isinstance(inner := content.get(key), dict) and (state := _find_state_dict(inner)) is not None:
            return state
    is_state = bool(content) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in content.items())
    return content if is_state else None


def _without_prefixes(tensors: dict[str, Tensor], path: str) -> dict[str, Tensor]:
    """Return the tensors by their names without `_PREFIXES`, and without counters of training code."""
    result: dict[str, Tensor] = {}
    for name, value in tensors.items():
        plain = name
        while prefix := next((prefix for prefix in _PREFIXES if plain.startswith(prefix)), ""):
            plain = plain.removeprefix(prefix)
        if plain in result:
            raise UserError(f"{path}: holds {_shown(plain)} twice, once as {_shown(name)}; keep one of the two")
        if plain not in _COUNTERS:
            result[plain] = value
    return result


def _as_trunk(stream: Stream, tensors: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return (a state dict of torchvision's model by the stream's names, names of its head, which is left out).

    A state dict with names of the stream is returned unchanged.

    For flow, the filters of the first convolution are the mean over red, green and blue.
    """
    own = stream.state_dict()
    head = tuple(f"{name}." for name in FACTS[stream.backbone].head)
    if any(name in own or name.startswith(("rgb.", "flow.")) for name in tensors):
        return tensors, []
    trunk = {f"trunk.{name}": value for name, value in tensors.items() if not name.startswith(head)}
    first = f"trunk.{first_convolution(stream.get_submodule('trunk'))}.weight"
    weight, inputs = trunk.get(first), own[first].shape[1]
    if weight is not None and weight.dim() == 5 and weight.shape[1] == 3 and inputs != 3:
        trunk[first] = weight.mean(dim=1, keepdim=True).expand(-1, inputs, -1, -1, -1)
    return trunk, [name for name in tensors if name.startswith(head)]


def _load(stream: Stream, tensors: dict[str, Tensor], path: str) -> LoadedWeights:
    state = stream.state_dict()
    for name, value in tensors.items():
        if fault := unusable(value):
            raise UserError(f"{path}: {_shown(name)} is {fault}")
    left_out = [name for name in tensors if name.startswith("attention_")] if not stream.attention_modules else []
    if _has_other_classes(tensors, state):
        left_out += _CLASSIFIER
    tensors = {name: value for name, value in tensors.items() if name not in left_out}
    may_be_absent = _may_be_absent(stream, set(_modules(tensors)))
    unknown = sorted(tensors.keys() - state.keys())
    absent = [name for name in state if name not in tensors and not name.endswith("num_batches_tracked")]
    fresh = [name for name in absent if name.partition(".")[0] in may_be_absent]
    if unknown or len(fresh) != len(absent):
        missing = sorted(set(absent) - set(fresh))
        differences = [_first("unknown", unknown), _first("absent", missing), _other_blocks(stream, unknown)]
        raise UserError(f"{path}: not weights of this model: {', '.join(filter(None, differences))}")
    for name, value in tensors.items():
        _check_fits(name, value, state[name], stream.modality, path)
    stream.load_state_dict(tensors, strict=False)
    stream.copy_blocks(_modules(fresh))
    return LoadedWeights(sorted(tensors), left_out, fresh)


def _may_be_absent(stream: Stream, there: set[str]) -> set[str]:
    """Return modules that may start fresh if a file holds those of `there`: classifier, attention or its blocks."""
    absent = {"logits"} - there
    if not there & set(stream.attention_modules):
        return absent | set(stream.attention_modules)
    blocks = stream.attention_modules[:-1]
    last = max((place for place, name in enumerate(blocks) if name in there), default=0)
    return absent | set(blocks[last + 1 :])


def unusable(value: Tensor) -> str:
    """Return the reason why a tensor cannot be a parameter or buffer of a model, or ""."""
    if value.is_nested or value.layout != torch.strided:
        return "a nested tensor" if value.is_nested else f"of layout {_plain(value.layout)}, not dense"
    if value.is_meta:
        return "a tensor without values (on the meta device)"
    if value.is_complex() or value.is_quantized:
        return f"of type {_plain(value.dtype)}, not of real numbers"
    return ""


def _plain(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _check_fits(name: str, value: Tensor, ours: Tensor, modality: str, path: str) -> None:
    if value.shape != ours.shape:
        shapes = f"{tuple(value.shape)} in the file, {tuple(ours.shape)} in the {modality} stream"
        first = name == "Conv3d_1a_7x7.conv3d.weight" and value.shape[:1] == ours.shape[:1]
        other = first and value.shape[2:] == ours.shape[2:]
        raise UserError(f"{path}: {name} is {shapes}{' (weights of the other modality?)' if other else ''}")
    if ours.is_floating_point() and not value.is_floating_point():
        raise UserError(f"{path}: {name} is of type {_plain(value.dtype)}, not floating point")
    if not value.to(ours.dtype).isfinite().all():
        raise UserError(f"{path}: {name} holds values that are not finite")


def _has_other_classes(tensors: dict[str, Tensor], state: dict[str, Tensor]) -> bool:
    """Return whether the file has a whole classifier of as many inputs and another number of classes."""
    weight, bias = (tensors.get(name) for name in _CLASSIFIER)
    if weight is None or bias is None or bias.ndim != 1 or bias.shape == state[_CLASSIFIER[1]].shape:
        return False
    return weight.shape == (len(bias), *state[_CLASSIFIER[0]].shape[1:])


def _first(kind: str, names: list[str]) -> str:
    return f"{len(names)} {kind} (first {_shown(names[0])})" if names else ""


def _other_blocks(stream: Stream, unknown: list[str]) -> str:
    """Return the remedy for a file whose attention module has other blocks than the stream's."""
    for start, block in _BLOCKS.items():
        has = any(name.startswith(start) for name in stream.attention_modules)
        if not has and any(name.startswith(start) for name in unknown):
            return f"its attention has model.stam_block: {block}"
    return ""
