"""The package's rooms: what may import what, and who may touch what Ray keeps private."""

from __future__ import annotations

import re
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "tune_ego"
PRIVATE = re.compile(r"\bray\.(\w+\.)*(_[a-z]\w*|v2)\b")
"""A module of Ray that begins with an underscore, and Ray Train's implementation."""


def test_one_file_names_private_modules_of_ray() -> None:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert files == {"runs/ray_private.py"}
