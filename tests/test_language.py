"""The language of the package: docstrings that begin with what a thing is or does, names that say it, small parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "tune_ego"
FILES = sorted(PACKAGE.rglob("*.py"))
FIRST_WORDS = {"What", "Of", "Whose", "Who", "Which", "How", "Where", "As", "With"}
NOT_IMPERATIVE = {"A", "An", "The", "All", "One", "No", "None", "True", "Every", "Each"}
NAMES = {"found", "told", "heard", "wanted"}
LONGEST_FUNCTION, LONGEST_FILE = 60, 400


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str, ast.AST]]:
    """(line, text, what it belongs to) of each docstring: of modules, classes, functions and attributes."""
    for node in ast.walk(tree):
        body = getattr(node, "body", [])
        for number, statement in enumerate(body if isinstance(body, list) else []):
            if isinstance(statement, ast.Expr) and isinstance(value := statement.value, ast.Constant):
                if not isinstance(value.value, str):
                    continue
                before = body[number - 1] if number else node
                yield statement.lineno, value.value.strip(), before


def is_boolean(node: ast.AST) -> bool:
    """Whether it is an attribute or a property annotated as bool, or an attribute assigned True or False."""
    kind = getattr(node, "annotation", None) or (is_property(node) and getattr(node, "returns", None))
    value = getattr(node, "value", None)
    names = {part.id for part in ast.walk(kind) if isinstance(part, ast.Name)} if kind else set()
    return "bool" in names or (isinstance(value, ast.Constant) and isinstance(value.value, bool))


def is_property(node: ast.AST) -> bool:
    return any("property" in ast.unparse(decorator) for decorator in getattr(node, "decorator_list", []))


def is_imperative(word: str) -> bool:
    """Whether a word may begin the docstring of a function: no article, code or lower-case word."""
    return word[:1].isupper() and word not in NOT_IMPERATIVE and not word.endswith("s")


def faults(path: Path) -> list[str]:
    """The docstrings and names of a file that break the rules."""
    tree = ast.parse(path.read_text())
    place = path.relative_to(PACKAGE)
    result = []
    for line, text, owner in docstrings(tree):
        first = text.split(maxsplit=1)[0].rstrip(",:;.") if text else ""
        function = isinstance(owner, (ast.FunctionDef, ast.AsyncFunctionDef)) and not is_property(owner)
        if (
            first in FIRST_WORDS
            or (first == "Whether" and not is_boolean(owner))
            or (function and not is_imperative(first))
        ):
            result.append(f"{place}:{line}: {text.splitlines()[0]}")
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword):  # of another package's function
            continue
        names = [getattr(node, attribute, None) for attribute in ("id", "arg", "attr", "name", "asname")]
        result += [
            f"{place}:{getattr(node, 'lineno', 0)}: the name {name}"
            for name in names
            if isinstance(name, str) and NAMES & {*name.split("_")}
        ]
    return result


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_and_names_are_plain(path: Path) -> None:
    assert not faults(path), "\n".join(faults(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_and_functions_are_small(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert (node.end_lineno or 0) - node.lineno < LONGEST_FUNCTION, node.name
