"""The package's rooms: what may import what, and who may touch what Ray keeps private."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tune_ego import __version__

PACKAGE = Path(__file__).parents[1] / "tune_ego"
PRIVATE = re.compile(r"\bray\.(\w+\.)*(_[a-z]\w*|v2)\b")
"""A module of Ray that begins with an underscore, and Ray Train's implementation."""


def test_one_file_names_private_modules_of_ray() -> None:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if PRIVATE.search(path.read_text())}
    assert files == {"runs/ray_private.py"}


def test_the_package_is_a_command() -> None:
    """`python -m tune_ego`, as `tune-ego`."""
    run = subprocess.run([sys.executable, "-m", "tune_ego", "--version"], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == __version__
