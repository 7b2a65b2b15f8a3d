"""The README's tables and examples of the shards fit the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from tune_ego.dataset.shards import CLIP_SCHEMA, FRAME_SCHEMA, PROBLEM_SCHEMA

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.parametrize("library", ["duckdb", "pyarrow"])
def test_shards_can_be_read_without_this_package(library: str, shards: str, capsys: pytest.CaptureFixture[str]) -> None:
    (snippet,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if f"import {library}" in code)
    names: dict[str, Any] = {}
    exec(snippet.replace("SHARDS", shards), names)
    clips = pq.read_table(f"{shards}/clips.parquet").to_pylist()
    train = [row for row in clips if row["split1"] == "train"]
    if library == "duckdb":
        expected: dict[int, tuple[int, int]] = {}
        for row in train:
            frames, gaze = expected.get(row["action"], (0, 0))
            expected[row["action"]] = (frames + row["frames"], gaze + row["gaze_frames"])
        found = {action: (frames, round(share * frames)) for action, frames, share in names["rows"]}
        assert found == expected
    else:
        assert names["image"].shape == (36, 48, 3)
        assert names["table"].num_rows == train[0]["frames"]


@pytest.mark.parametrize("schema", [CLIP_SCHEMA, FRAME_SCHEMA, PROBLEM_SCHEMA])
def test_the_readme_names_every_column(schema: Any) -> None:
    for name in schema.names:
        assert f"`{name}`" in README
