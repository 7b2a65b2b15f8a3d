"""YAML files, read by the core schema of YAML 1.2.2 (section 10.3), and errors that name the mistake."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from tune_ego import storage
from tune_ego.errors import UserError

_MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000
"""Most values in a file. An alias counts each time it is used: a short file can expand to billions of values."""


class _Loader(yaml.SafeLoader):
    """Loader of YAML 1.2: `off` and `no` are words, `1e-3` is a number, `017` is 17. A key given twice is an error.

    Merge keys (`<<`), which YAML 1.2 does not have, are read as in YAML 1.1.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} given twice", node.start_mark)
            seen.add((key.tag, key.value if isinstance(key, yaml.ScalarNode) else id(key)))
        return node

    def construct_integer(self, node: yaml.ScalarNode) -> int:
        text = str(self.construct_scalar(node))
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"|~|null|Null|NULL", ["", "~", "n", "N"]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ("float", r"[-+]?(?:\.inf|\.Inf|\.INF)|\.nan|\.NaN|\.NAN", list("-+.")),
    ("merge", r"<<", ["<"]),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_integer)


def parse_yaml(text: str, source: str) -> Any:
    """Parse YAML text. Raises `UserError` that begins with `source`, also for values that are too many or too deep."""
    if len(text) > _MOST_CHARACTERS:
        raise UserError(f"{source}: longer than {_MOST_CHARACTERS:,} characters")
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count_values(node, {}) > _MOST_VALUES:
            raise UserError(
                f"{source}: more than {_MOST_VALUES:,} values, those of aliases (*name) counted at each use"
            )
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise UserError(f"{source}: not valid YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise UserError(f"{source}: nested too deeply") from error
    except ValueError as error:  # an integer of more digits than Python reads
        if isinstance(error, UserError):
            raise
        raise UserError(f"{source}: not valid YAML: {error}") from error


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return the number of values of a node and the nodes below it; `counts` caches the numbers by node id."""
    key = id(node)
    if key not in counts:
        counts[key] = _MOST_VALUES + 1  # a node that contains itself has no end
        below = node.value if isinstance(node, yaml.CollectionNode) else []
        nodes = [part for pair in below for part in pair] if isinstance(node, yaml.MappingNode) else below
        counts[key] = 1 + sum(_count_values(part, counts) for part in nodes)
    return counts[key]


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises `UserError` for an absent or unreadable file."""
    try:
        text = storage.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value
