"""Read, write and change configurations (`tune_ego.config`)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import ValidationError

from tune_ego.config import LU_MAP_SIDE, Config
from tune_ego.config_optimizers import ConfigNode
from tune_ego.console import say_once
from tune_ego.errors import UserError
from tune_ego.yaml_files import read_yaml


def load_config(path: str | Path) -> Config:
    """Read a configuration from a YAML file (`config.yaml` of a run, or the file that `export` wrote).

    Raises `UserError` that names the file, the key and what is allowed.
    """
    tree = read_yaml(path)
    tree.pop("provenance", None)  # the origin of an exported configuration: information for people only
    return build_config(tree, str(path))


def dump_config(config: Config) -> str:
    """Return every key of the configuration as YAML that `load_config` reads."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def build_config(tree: Mapping[str, Any], source: str) -> Config:
    """Validate a nested mapping. Raises `UserError` that begins with `source`."""
    tree = dict(tree)
    loss = tree.get("loss")
    sigma = loss.get("gaze_sigma") if isinstance(loss, dict) else None
    if isinstance(sigma, (int, float)) and not isinstance(sigma, bool) and 1 <= sigma < math.inf:
        if sigma >= LU_MAP_SIDE:
            raise UserError(
                f"{source}: loss.gaze_sigma {sigma:g}: a fraction of the map's side is below 1, and a number of cells "
                f"of a {LU_MAP_SIDE} x {LU_MAP_SIDE} map, as in version 0.1, below {LU_MAP_SIDE}"
            )
        tree["loss"] = {**loss, "gaze_sigma": sigma / LU_MAP_SIDE}  # type: ignore[dict-item]
        say_once(
            f"{source}: loss.gaze_sigma of 1 or more is in cells of a {LU_MAP_SIDE} x {LU_MAP_SIDE} map, as in version "
            f"0.1: it is divided by {LU_MAP_SIDE}"
        )
    for part in ("optimizer", "schedule"):  # settings without a name belong to the default optimizer or schedule
        if isinstance(tree.get(part), dict):
            tree[part] = {"name": _default_name(part), **tree[part]}
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{source}: {_describe_invalid(error)}") from error


def override(tree: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of a nested mapping with dotted keys set.

    A change of `optimizer.name` or `schedule.name` resets that part: settings of SGD are not settings of Ranger.
    """
    result: dict[str, Any] = {key: dict(value) if isinstance(value, dict) else value for key, value in tree.items()}
    names_first = sorted(changes, key=lambda key: not key.endswith(".name"))  # a change of name clears its part
    for key in names_first:
        part, _, leaf = key.rpartition(".")
        if not part:
            result[leaf] = changes[key]
            continue
        node = result.setdefault(part, {})
        if not isinstance(node, dict):
            raise UserError(f"{part}: expected keys and values, found {node!r}")
        if leaf == "name" and node.get("name", _default_name(part)) != changes[key]:
            node.clear()
        node[leaf] = changes[key]
    return result


def override_config(config: Config, changes: Mapping[str, Any], source: str) -> Config:
    """Return a configuration with dotted keys changed. Raises `UserError` that begins with `source`."""
    for key in changes:
        check_key(key, source)
    return build_config(override(config.model_dump(), changes), source)


def flatten(config: Config) -> dict[str, Any]:
    """Return dotted key -> value of the whole configuration."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def different_keys(first: Config, second: Config) -> list[str]:
    """Return the dotted keys in which two configurations differ."""
    one, two = flatten(first), flatten(second)
    return [key for key in one | two if one.get(key) != two.get(key)]


def _default_name(part: str) -> str | None:
    default = Config.model_fields[part].default if part in Config.model_fields else None
    return getattr(default, "name", None)


def config_keys() -> list[str]:
    """Return every dotted key that a configuration can have."""
    keys: dict[str, None] = {}
    for name, field in Config.model_fields.items():
        for node in _nodes(field.annotation):
            keys.update({f"{name}.{leaf}": None for leaf in node.model_fields})
        if not _nodes(field.annotation):
            keys[name] = None
    return list(keys)


def check_key(key: str, source: str) -> None:
    """Raise `UserError`, which begins with `source`, where a configuration has no such dotted key."""
    keys = config_keys()
    if key not in keys:
        part = str(key).rpartition(".")[0]
        near = [name for name in keys if name.rpartition(".")[0] == part] or keys
        raise UserError(f"{source}: unknown key {key!r}; allowed: {', '.join(near)}")


def _nodes(annotation: Any) -> list[type[ConfigNode]]:
    if isinstance(annotation, type) and issubclass(annotation, ConfigNode):
        return [annotation]
    if get_origin(annotation) is None:
        return []
    return [node for argument in get_args(annotation) for node in _nodes(argument)]


def _describe_invalid(error: ValidationError) -> str:
    """Return the first complaint of pydantic as `key: message, found value`."""
    first = error.errors()[0]
    place = [str(part) for part in first["loc"]]
    if len(place) > 2 and place[0] in ("optimizer", "schedule"):
        del place[1]  # pydantic puts the chosen variant's name between
    key = ".".join(place)
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        part = key.rpartition(".")[0]
        allowed = [name for name in config_keys() if name.rpartition(".")[0] == part]
        if key in allowed:
            return f"key {key!r} does not belong to the {part} that {part}.name chooses{more}"
        return f"unknown key {key!r}; allowed: {', '.join(allowed)}{more}"
    message = first["msg"].removeprefix("Value error, ")
    if not key:
        return message + more
    return f"{key}: {message}, found {first['input']!r}{more}"
