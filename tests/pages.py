"""The README and the pages of docs/, and the commands in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS_CLUSTER = "# needs a cluster\n"


def blocks(page: Path, *languages: str) -> list[str]:
    """The fenced blocks of a page in one of these languages."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text for language, text in fenced if language in languages]


def commands(page: Path, *, with_cluster: bool = True) -> Iterator[list[str]]:
    """The words after `tune-ego` of each such command in a page's blocks; `ray job submit ... -- tune-ego` too.

    Without `with_cluster`, those of blocks that need a cluster are left out.
    """
    for block in blocks(page, "bash", "console"):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            clustered = block.startswith(NEEDS_CLUSTER) or words[:1] == ["ray"]
            if "tune-ego" in words and (with_cluster or not clustered):
                yield words[words.index("tune-ego") + 1 :]
