"""The package's rooms: what may import what, and who may touch what Ray keeps private."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tune_ego import __version__

PACKAGE = Path(__file__).parents[1] / "tune_ego"
PRIVATE = re.compile(r"\bray\.(\w+\.)*(_[a-z]\w*|v2)\b")
"""A module of Ray that begins with an underscore, and Ray Train's implementation."""


def names_private_module(text: str) -> bool:
    """Whether a file names a private module of Ray, in an import of any form or elsewhere."""
    tree = ast.parse(text)
    full: dict[str, str] = {}  # name in the file -> what it was imported as
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            full.update({name.asname or name.name: f"{node.module}.{name.name}" for name in node.names})
        elif isinstance(node, ast.Import):
            full.update({name.asname: name.name for name in node.names if name.asname})
    chains = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    firsts = [(chain.partition(".")[0], chain) for chain in chains]
    expanded = [full[first] + chain.removeprefix(first) for first, chain in firsts if first in full]
    return any(map(PRIVATE.search, [text, *full.values(), *expanded]))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from ray.train import v2", True),
        ("from ray import (\n    _private,\n    data,\n)", True),
        ("import ray._private.state", True),
        ("from ray.train.v2 import api", True),
        ("import ray.train as t\nt.v2", True),
        ("from ray import train\ntrain.v2.api", True),
        ("import ray as r\nr._private", True),
        ("from ray.train import torch", False),
    ],
)
def test_private_modules_in_all_forms_of_import(text: str, expected: bool) -> None:
    assert names_private_module(text) is expected


def test_one_file_names_private_modules_of_ray() -> None:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if names_private_module(path.read_text())}
    assert files == {"ray_private.py"}


def test_the_map_of_the_rooms_names_every_file() -> None:
    page = (PACKAGE.parent / "docs" / "development.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \| (.+) \|$", page.partition("\n## Tests")[0], flags=re.MULTILINE))
    missing = []
    for path in PACKAGE.rglob("*.py"):
        room, name = path.parent.relative_to(PACKAGE), path.stem
        if name in ("__init__", "__main__"):
            continue
        if room == Path():
            missing += [] if f"`{path.name}`" in page else [path.name]
        else:
            missing += [] if f"`{name}`" in rows[f"`{room}/`"] else [f"{room}/{path.name}"]
    assert not missing


def test_the_package_is_a_command() -> None:
    """`python -m tune_ego`, as `tune-ego`."""
    run = subprocess.run([sys.executable, "-m", "tune_ego", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == __version__
