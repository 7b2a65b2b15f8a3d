"""YAML as its version 1.2 has it, and text that must not hang or crash."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import pytest

from tune_ego.errors import UserError
from tune_ego.yaml_files import parse_yaml, read_yaml

CORE_SCHEMA = {
    **dict.fromkeys(("null", "Null", "NULL", "~", "", "# nothing"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **{word: word for word in ("on", "off", "yes", "No", "y", "n", "nULL", "tRUE", "O", "0b1", "1_000", "1:30", "=")},
    **{word: word for word in ("2020-01-01", "0o8", "0xG", "1e", "e5", ".", "+", "..5", "1.2.3", "-0x1", ".infx")},
    "0": 0,
    "17": 17,
    "017": 17,
    "-017": -17,
    "+3": 3,
    "0o17": 15,
    "0xfF": 255,
    "08": 8,
    "1.": 1.0,
    ".5": 0.5,
    "-.5": -0.5,
    "1e3": 1000.0,
    "1E-3": 1e-3,
    "0.e1": 0.0,
    "12e03": 12000.0,
    "-2E+05": -2e5,
    ".inf": math.inf,
    "-.Inf": -math.inf,
    "+.INF": math.inf,
    "'017'": "017",
    '"true"': "true",
}
"""Text -> value. The examples of section 10.3.2 of the specification are among them."""


@pytest.mark.parametrize("text", CORE_SCHEMA)
def test_scalars_are_those_of_the_core_schema(text: str) -> None:
    expected = CORE_SCHEMA[text]
    for value in (parse_yaml(text, "t"), *([] if text.startswith("#") else parse_yaml(f"a:\n- {text}", "t")["a"])):
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("text", [".nan", ".NaN", ".NAN"])
def test_no_number(text: str) -> None:
    assert math.isnan(parse_yaml(text, "t"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}}),
        (  # a mapping that has a merge key itself, and one of its keys again, is merged into another one
            "a: &a {x: 1}\nb: &b {<<: *a, x: 2}\nc: {<<: *b, x: 3}\nd: *b",
            {"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}, "d": {"x": 2}},
        ),
        (
            "a: &a {x: 1}\nb: &b {x: 2, y: 2}\nc: {<<: [*a, *b]}",
            {"a": {"x": 1}, "b": {"x": 2, "y": 2}, "c": {"x": 1, "y": 2}},
        ),
        ("a: &a [1, 2]\nb: *a", {"a": [1, 2], "b": [1, 2]}),
        ('{1: a, "1": b}', {1: "a", "1": "b"}),
    ],
)
def test_merge_keys_and_aliases(text: str, expected: Any) -> None:
    assert parse_yaml(text, "t") == expected


BOMB = "a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\na: 2", "t: not valid YAML: key 'a' given twice"),
        ("{<<: {x: 1}, <<: {x: 2}}", "t: not valid YAML: key '<<' given twice"),
        (BOMB, "t: more than 100,000 values, those of aliases (*name) counted at each use"),
        ("a: &a [*a]", "t: more than 100,000 values"),
        ("a: &a {b: *a}", "t: more than 100,000 values"),
        ("[" * 100_000, "t: nested too deeply"),
        ("- " * 100_000 + "1", "t: nested too deeply"),
        ("a" * (1 << 20) + "b", "t: longer than 1,048,576 characters"),
        ("1" * 10_000, "t: not valid YAML: Exceeds the limit"),
        ("!!python/object/apply:os.system [ls]", "t: not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "t: not valid YAML: expected a single document"),
        ("{[1]: 2}", "t: not valid YAML: "),
        ("a: *b", "t: not valid YAML: found undefined alias"),
        ("\x00", "t: not valid YAML: unacceptable character"),
    ],
    ids=range(14),
)
def test_text_that_is_refused_at_once(text: str, message: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        parse_yaml(text, "t")
    assert str(caught.value).startswith(message) and len(str(caught.value)) < 500
    assert time.monotonic() - start < 5


def test_yaml_that_cannot_be_used_is_named_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    contents = {
        "a: 1\nb:\n  c: 1\n  c: 2\n": "not valid YAML: key 'c' given twice",
        "a: [": "not valid YAML",
        "- a\n": "expected keys and values, found list",
        "": "expected keys and values, found NoneType",
    }
    for text, message in contents.items():
        file.write_text(text)
        with pytest.raises(UserError, match=rf"x\.yaml: {message}"):
            read_yaml(file)
    file.write_text("a: {b: 1}\nc: {b: 2}\n")
    assert read_yaml(file) == {"a": {"b": 1}, "c": {"b": 2}}
    file.write_bytes(b"a: \xff\n")
    for name in ("x.yaml", "absent.yaml"):
        with pytest.raises(UserError, match=rf"{name}: cannot be read"):
            read_yaml(tmp_path / name)
