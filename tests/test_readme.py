"""The README and the pages of docs/: their commands, links, examples and tables fit the package."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import typer

from tests.pages import NEEDS_CLUSTER, PAGES, ROOT, blocks, commands
from tune_ego.cli import app
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.dataset.shards import CLIP_SCHEMA, FRAME_SCHEMA, PROBLEM_SCHEMA
from tune_ego.training.checkpoint import Origin, checkpoint_content
from tune_ego.yaml_files import parse_yaml

README_LINES, PAGE_LINES = 170, 150
DATA, OUTPUTS, DEVELOPMENT = ((ROOT / "docs" / f"{name}.md").read_text() for name in ("data", "outputs", "development"))


def resolve(words: list[str]) -> tuple[Any, list[str]]:
    """(command, its arguments); a `KeyError` where there is no such command."""
    command: Any = typer.main.get_command(app)
    while words and hasattr(command, "commands"):
        name, *words = words
        command = command.commands[name]
    return command, words


COMMANDS = [pytest.param(words, id=f"{page.name}: {' '.join(words)}") for page in PAGES for words in commands(page)]


def test_the_commands_of_the_pages_are_recognised() -> None:
    lines = [line for page in PAGES for block in blocks(page, "bash", "console") for line in block.splitlines()]
    assert len(COMMANDS) == sum(bool(re.search(r"(^|\s)tune-ego ", line)) for line in lines) > 30
    documented = {words[0] for page in PAGES for words in commands(page)}
    assert documented == set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_has_options_and_arguments_that_exist(words: list[str]) -> None:
    """The real command line parses it and runs nothing; keys and values of --set build a configuration."""
    command, arguments = resolve(words)
    values = command.make_context("tune-ego", list(arguments)).params
    changes = dict(pair.split("=", 1) for pair in values.get("changes") or [])
    override_config(Config(), {key: parse_yaml(text, key) for key, text in changes.items()}, "--set")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_that_need_a_cluster_say_so(page: Path) -> None:
    for block in blocks(page, "bash"):
        if re.search(r"--address|--concurrent|compute\.workers", block):
            assert block.startswith(NEEDS_CLUSTER)


def test_a_command_that_does_not_exist_is_noticed() -> None:
    command, arguments = resolve(["resume", "/s/n", "--sample", "3"])
    with pytest.raises(Exception, match="No such option"):
        command.make_context("tune-ego", arguments)
    with pytest.raises(KeyError):
        resolve(["retune"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_sentences_name_commands_and_options_that_exist(page: Path) -> None:
    for text in re.findall(r"`tune-ego ([^`]+)`", page.read_text()):
        if not text.startswith("COMMAND"):
            command, arguments = resolve(text.split())
            names = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
            assert {word for word in arguments if word.startswith("--")} <= names, text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_is_short(page: Path) -> None:
    assert len(page.read_text().splitlines()) < (README_LINES if page.name == "README.md" else PAGE_LINES)


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text()):
        if "://" not in target:
            file = (page.parent / target).resolve() if target else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), f"{target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_examples_compile(page: Path) -> None:
    for number, code in enumerate(blocks(page, "python")):
        compile(code, f"{page.name}, example {number + 1}", "exec")


@pytest.mark.parametrize("library", ["duckdb", "pyarrow"])
def test_shards_can_be_read_without_this_package(library: str, shards: str) -> None:
    (snippet,) = (code for code in blocks(ROOT / "docs" / "data.md", "python") if f"import {library}" in code)
    names: dict[str, Any] = {}
    exec(snippet.replace("SHARDS", shards), names)
    clips = pq.read_table(f"{shards}/clips.parquet").to_pylist()
    train = [row for row in clips if row["split1"] == "train"]
    if library == "duckdb":
        expected: dict[int, tuple[int, int]] = {}
        for row in train:
            frames, gaze = expected.get(row["action"], (0, 0))
            expected[row["action"]] = (frames + row["frames"], gaze + row["gaze_frames"])
        read = {action: (frames, round(share * frames)) for action, frames, share in names["rows"]}
        assert read == expected
    else:
        assert names["image"].shape == (36, 48, 3)
        assert names["table"].num_rows == train[0]["frames"]


@pytest.mark.parametrize("schema", [CLIP_SCHEMA, FRAME_SCHEMA, PROBLEM_SCHEMA])
def test_the_page_of_the_data_names_every_column(schema: Any) -> None:
    for name in schema.names:
        assert f"`{name}`" in DATA


def test_the_page_of_the_outputs_names_every_key_of_metrics_checkpoints_and_benchmarks() -> None:
    measured = ROOT / "docs" / "measured"
    lines = map(json.loads, (measured / "run-h200.jsonl").read_text().splitlines())
    metrics = {re.sub(r"_(flow|fused)$", "_rgb", key) for line in lines for key in line}
    checkpoint = checkpoint_content(
        Config(), Origin(["a"], (320, 240), "dis"), 0, {}, losses=[], model={}, optimizers={}
    )
    for key in [*metrics, *checkpoint, *json.loads((measured / "step.json").read_text())]:
        assert f"`{key}`" in OUTPUTS, key


def test_the_page_of_the_development_names_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", DEVELOPMENT)
    assert len(named) > 15
    for file, test in named:
        assert re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{file}::{test}"


def test_the_page_of_the_development_names_files_that_exist() -> None:
    for path in re.findall(r"`((?:\w+/)*\w+\.(?:py|yaml))`", DEVELOPMENT):
        assert (ROOT / path).exists() or (ROOT / "tune_ego" / path).exists(), path


def test_the_map_has_every_room_and_ray_s_private_parts() -> None:
    package = ROOT / "tune_ego"
    rooms = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    rooms |= {path.name for path in package.glob("[!_]*.py")}
    for room in rooms:
        assert f"`{room}`" in DEVELOPMENT, room
    tree = ast.parse((package / "ray_private.py").read_text())
    for entry in (node.name for node in tree.body if isinstance(node, ast.FunctionDef)):
        assert entry.startswith("_") or f"| `{entry}` |" in DEVELOPMENT, entry
