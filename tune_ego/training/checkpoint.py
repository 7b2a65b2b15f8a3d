"""Content of a checkpoint, writing and reading it. No Ray here."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.config_io import build_config
from tune_ego.errors import UserError
from tune_ego.model import TwoStream
from tune_ego.model.weights import load_safely, load_tensors, unusable
from tune_ego.results.checkpoint_files import (
    CHECKPOINT_FILE,
    CHECKSUM_FILE,
    PACKAGE_CONFIG,
    PACKAGE_FILE,
    checkpoint_iterations,
    checkpoint_uri,
    checksum,
    is_final,
    read_last_whole_checkpoint,
    read_verified,
    remove_checkpoints,
    run_of,
)
from tune_ego.results.checkpoint_files import DamagedCheckpoint as DamagedCheckpoint

FORMAT = 3


class Origin(NamedTuple):
    """The data set that a model was trained on."""

    actions: list[str]
    image_size: tuple[int, int]
    flow: str


def check_same_origin(trained_on: Origin, data: Origin, config: Config, source: str, place: str) -> None:
    """Raise `UserError` unless data has the classes, image size and flow method that weights were trained on.

    Classes are compared with their order, which is the order of the model's scores.

    Args:
        trained_on: Data of the weights.
        data: Data at hand.
        config: Configuration of the weights.
        source: Name of the weights in errors.
        place: Name of the data in errors.
    """
    if len(trained_on.actions) != len(data.actions):
        raise UserError(
            f"{source}: trained on {len(trained_on.actions)} classes, not the {len(data.actions)} of {place}"
        )
    for number, (trained_class, data_class) in enumerate(zip(trained_on.actions, data.actions)):
        if trained_class != data_class:
            raise UserError(f"{source}: its class {number} is {trained_class!r}, that of {place} is {data_class!r}")
    if tuple(trained_on.image_size) != tuple(data.image_size):
        raise UserError(f"{source}: trained on {trained_on.image_size} images, {place} has {data.image_size}")
    if "flow" in config.stream_names and trained_on.flow != data.flow:
        raise UserError(f"{source}: trained on {trained_on.flow} flow, {place} has {data.flow}")


def checkpoint_content(
    config: Config, origin: Origin, iteration: int, best: dict[str, Any], **states: Any
) -> dict[str, Any]:
    """Return the content of a checkpoint: plain containers and tensors, so that `weights_only=True` loads it.

    It holds no random states: each iteration seeds its own from (seed, iteration, pass).
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


def snapshot(content: Any) -> Any:
    """Return a copy of a checkpoint's content on the CPU that later training steps do not change."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on busy CPUs, waiting for a thread pool at each of thousands of small copies is slow
    try:
        return _copy(content)
    finally:
        torch.set_num_threads(threads)


def _copy(content: Any) -> Any:
    if isinstance(content, Tensor):
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        return {key: _copy(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return type(content)(map(_copy, content))
    return content


def to_bytes(content: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def write_checkpoint(run: str, content: dict[str, Any], keep: Iterable[int] = ()) -> None:
    """Write a run's checkpoint, and remove all but the last two, the best one and those of the iterations `keep`."""
    iteration = content["iteration"]
    earlier = [saved for saved in checkpoint_iterations(run) if saved < iteration]
    data, checksum_uri = to_bytes(content), checkpoint_uri(run, iteration, CHECKSUM_FILE)
    storage.remove(checksum_uri)  # the checksum of a damaged checkpoint
    storage.write_bytes(checkpoint_uri(run, iteration), data)
    storage.write_json(checksum_uri, checksum(data))
    remove_checkpoints(run, keep={iteration, content["best"].get("iteration"), *earlier[-1:], *keep})


def mean_weights(run: str, iterations: list[int]) -> dict[str, Tensor]:
    """Return the mean of the weights in a run's checkpoints of these iterations, and the counters of the last one."""
    states = [read_checkpoint(checkpoint_uri(run, iteration))["model"] for iteration in iterations]
    last: dict[str, Tensor] = states[-1]
    return {
        name: torch.stack([state[name].double() for state in states]).mean(0).to(value.dtype)
        if value.is_floating_point()
        else value
        for name, value in last.items()
    }


def last_checkpoint(run: str) -> tuple[dict[str, Any], str] | None:
    """Return (content, URI) of a run's last whole checkpoint; None where there is none."""
    last = read_last_whole_checkpoint(run)
    if last is None:
        return None
    uri = checkpoint_uri(run, last[0])
    return _content(last[1], uri), uri


def read_checkpoint(uri: str) -> dict[str, Any]:
    """Read a checkpoint's content from its file or folder.

    Raises `UserError` for another file or format, `DamagedCheckpoint` where the checksum does not match.
    """
    if not storage.exists(uri):
        raise UserError(f"{uri}: there is no checkpoint here")
    if storage.exists(storage.join(uri, CHECKPOINT_FILE)):
        uri = storage.join(uri, CHECKPOINT_FILE)
    return _content(read_verified(uri), uri)


def _content(data: bytes, uri: str) -> dict[str, Any]:
    content = load_safely(data, uri)
    check_content(content, uri)
    return dict(content)


_KINDS: dict[str, type] = {
    "config": dict,
    "actions": list,
    "image_size": list,
    "flow_method": str,
    "iteration": int,
    "best": dict,
    "model": dict,
}
_MORE_KINDS: dict[str, type] = {"losses": list, "optimizers": dict}
"""Further keys that a resumed run needs."""
_OPTIMIZER_KINDS: dict[str, type] = {"optimizer": dict, "schedule": dict, "scaler": dict}
_NAMED = ("optimizer", "schedule")


def check_content(content: Any, source: str, resumed: Config | None = None) -> None:
    """Raise `UserError` where a checkpoint lacks a key that `checkpoint_content` writes, or a value has another type.

    `resumed` is the configuration of a run that resumes from the checkpoint. It must have the optimizer and schedule
    whose states the checkpoint holds.
    """
    if not isinstance(content, dict) or "format" not in content or "model" not in content:
        raise UserError(f"{source}: not a checkpoint of tune_ego")
    if content["format"] != FORMAT:
        raise UserError(f"{source}: a checkpoint of format {content['format']}; this tune_ego reads format {FORMAT}")
    _check_kinds(content, _KINDS | (_MORE_KINDS if resumed else {}), "", source)
    _check_origin(content["actions"], content["image_size"], source)
    if resumed is None:
        return
    if not all(isinstance(losses, Tensor) for losses in content["losses"]):
        raise UserError(f"{source}: a damaged checkpoint: its losses are not tensors")
    for modality in resumed.stream_names:
        _check_kinds(content["optimizers"], {modality: dict}, "optimizers.", source)
        _check_kinds(content["optimizers"][modality], _OPTIMIZER_KINDS, f"optimizers.{modality}.", source)
    saved = build_config(content["config"], source)
    for part in _NAMED:
        theirs, ours = getattr(saved, part).name, getattr(resumed, part).name
        if theirs != ours:
            raise UserError(f"{source}: a checkpoint of a run with {part}.name: {theirs}, not {ours}")


def _check_origin(actions: list[Any], sizes: list[Any], source: str) -> None:
    if not all(isinstance(name, str) for name in actions) or not actions:
        raise UserError(f"{source}: a damaged checkpoint: its actions are not names")
    if len(sizes) != 2 or not all(isinstance(size, int) and size > 0 for size in sizes):
        raise UserError(f"{source}: a damaged checkpoint: its image_size is {sizes}, not width and height")


def _check_kinds(content: dict[str, Any], kinds: Mapping[str, type], above: str, source: str) -> None:
    for key, kind in kinds.items():
        if key not in content:
            raise UserError(f"{source}: a damaged checkpoint: it has no {above}{key}")
        if not isinstance(content[key], kind):
            actual = type(content[key]).__name__
            raise UserError(f"{source}: a damaged checkpoint: its {above}{key} is a {actual}, not a {kind.__name__}")


def rebuild(content: dict[str, Any], source: str) -> tuple[Config, Origin, TwoStream]:
    """Return configuration, data set and model of a checkpoint, with its weights."""
    config = build_config(content["config"], source)
    origin = Origin(content["actions"], tuple(content["image_size"]), content["flow_method"])
    model = TwoStream(config.stream_names, len(origin.actions), config.model)
    load_model_state(model, content["model"], source)
    return config, origin, model


def load_model_state(model: TwoStream, state: Any, source: str) -> None:
    """Load a state dict strictly. Raises `UserError` that names the first difference and both shapes."""
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"{source}: holds no state dict of a model")
    ours = model.state_dict()
    for name in sorted(ours.keys() | state.keys()):
        value, fault = state.get(name), ""
        if isinstance(value, Tensor) and (fault := unusable(value)):
            raise UserError(f"{source}: {name} is {fault}")
        shapes = [tuple(side[name].shape) if isinstance(side.get(name), Tensor) else "absent" for side in (state, ours)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{source}: a checkpoint of another model: {name} is {shapes[0]} in the checkpoint, "
                f"{shapes[1]} in this model"
            )
    model.load_state_dict(state)


def load_trained(source: str) -> tuple[Config, Origin, TwoStream, int]:
    """Return (configuration, data set, model, iteration) of the file of a checkpoint, a package or final weights.

    Final weights are a state dict alone: the configuration comes from the last whole checkpoint of their run. Raises
    `UserError` where there is none.
    """
    if source.endswith(f"/{PACKAGE_FILE}"):
        return _load_package(source)
    if not (is_final(source) and storage.is_file(source)):
        content = read_checkpoint(source)
        return *rebuild(content, source), content["iteration"]
    last = last_checkpoint(run_of(source))
    if last is None:
        raise UserError(f"{source}: its run has no whole checkpoint, so the configuration of these weights is unknown")
    config, origin, model = rebuild(*last)
    load_model_state(model, load_tensors(source), source)  # possibly the mean of several checkpoints
    return config, origin, model, config.train.iterations


_PACKAGE_KINDS: dict[str, type] = {
    "config": dict,
    "classes": list,
    "image_size": list,
    "flow_method": str,
    "iteration": int,
}


def _load_package(source: str) -> tuple[Config, Origin, TwoStream, int]:
    """Return what `load_trained` does, of the weights in a folder that `package` wrote."""
    uri = storage.join(source.rpartition("/")[0], PACKAGE_CONFIG)
    if not storage.exists(uri):
        raise UserError(f"{source}: its {PACKAGE_CONFIG} is missing; a package is a whole folder")
    facts = storage.read_json(uri)
    if not isinstance(facts, dict):
        raise UserError(f"{uri}: not the configuration of a package")
    _check_kinds(facts, _PACKAGE_KINDS, "", uri)
    _check_origin(facts["classes"], facts["image_size"], uri)
    config, origin, model = rebuild({**facts, "actions": facts["classes"], "model": load_tensors(source)}, source)
    return config, origin, model, facts["iteration"]
