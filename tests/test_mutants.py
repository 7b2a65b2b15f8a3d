"""The table of planted mistakes fits the tree. The mistakes themselves are planted by `python -m tests.mutants`."""

from __future__ import annotations

import ast

import pytest

from tests.mutants import ROOT, Mutant, copied_tree, read_tables, verdict


def functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


def test_every_row_has_its_place_and_its_test() -> None:
    table = read_tables()
    assert len({row.name for row in table}) == len(table) > 0
    planted = {(row.file, row.spoilt((ROOT / row.file).read_text())): row.name for row in table}
    assert set(planted.values()) == {row.name for row in table}  # else two rows plant the same mistake
    tests = {file: functions(file) for file in {row.test.partition("::")[0] for row in table}}
    for row in table:
        file, _, test = row.test.partition("::")
        text = (ROOT / row.file).read_text()
        assert row.spoilt(text) != text, row.name
        assert test.partition("[")[0] in tests[file], row.name


def test_a_mistake_is_noticed_by_its_test_alone_and_taken_out_again() -> None:
    """One planted mistake and two tests of the same file: one looks at the place, the other does not."""
    old, new = "frames - span, 0)\n    starts", "frames - span, 8)\n    starts"
    file, tests = "tune_ego/feed/sampling.py", "tests/test_small.py"
    content = "from tune_ego.feed.sampling import dense_starts, spread_starts\n"
    content += "def test_dense(): assert dense_starts(16) == [0]\n"
    content += "def test_spread(): assert spread_starts(16, 1) == [0]\n"
    with copied_tree() as tree:
        (tree / tests).write_text(content)
        before = (tree / file).read_text()
        said = [
            verdict(Mutant("m", file, old, new, f"{tests}::test_{name}"), tree) for name in ("dense", "spread", "x")
        ]
        assert (tree / file).read_text() == before
    assert said[:2] == ["noticed", "SURVIVED"] and said[2].startswith("NO VERDICT")


def test_a_row_without_its_place_is_refused() -> None:
    assert Mutant("m", "", "y = 2\nz = 3", "z = 4", "").spoilt("x\n    y = 2\n    z = 3\n") == "x\n    z = 4\n"
    for old, times in (("x = 1", 2), ("y", 0)):
        with pytest.raises(ValueError, match=f"m: a.py holds the text to replace {times} times"):
            Mutant("m", "a.py", old, "", "").spoilt("x = 1\nx = 1\n")
