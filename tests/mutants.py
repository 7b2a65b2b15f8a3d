"""Planted mistakes, and the test that fails with each: `python -m tests.mutants [NAME...] [--jobs N]`.

The tables are the YAML files in `planted/`. A row names a file of the package, a piece of its text, the mistake that
replaces it, and a test. Each mistake is planted alone, in a copy of the tree, and its test is run there. A mistake
whose test passes all the same is a survivor: it is printed, and the exit code is 1. Every bug that is mended in the
package gets a row. Some rows need tests that start Ray; all of them take about half an hour on two cores.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import shutil
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).parents[1]
TABLES = Path(__file__).parent / "planted"
_COPIED: tuple[str, ...] = ("tune_ego", "tests", "search_spaces", "docs", ".ci", "pyproject.toml", "cluster.yaml")
_COPIED += ("README.md", "CHANGELOG.md", "LICENSE")
_IMPORTED = ["torch", "torchvision.io", "cv2", "av", "pyarrow.parquet", "pyarrow.fs", "pydantic", "rich.console"]
_IMPORTED += ["simplejpeg", "typer", "matplotlib.pyplot", "optuna", "ray.tune", "ray.train", "pytest"]
"""Packages that are imported once: each test runs in a fork of the process that has them."""
_PASSED, _FAILED, _NO_CALL, _CRASHED = 0, 1, 98, 99
"""Exit codes of a test's process: pytest's own, a failure before the test itself was called, and any other error."""
_SECONDS = 300
"""Time limit of one test: a mistake may make a loop endless."""


class Mutant(NamedTuple):
    """A planted mistake: one row of a table."""

    name: str
    file: str
    """Path below the root of the repository: of the package, or `cluster.yaml`."""
    old: str
    """Text that occurs once in the file."""
    new: str
    test: str
    """Node id of the test that has to fail, as pytest takes it."""

    def spoilt(self, text: str) -> str:
        """The file's text with the mistake.

        YAML strips the common indentation of several lines, so any indentation matches. Raises `ValueError` where the
        text to replace is absent or occurs twice.
        """
        for width in range(0, 28, 4):
            old, new = (textwrap.indent(piece, " " * width) for piece in (self.old, self.new))
            if count := text.count(old):
                break
        if count != 1:
            raise ValueError(f"{self.name}: {self.file} holds the text to replace {count} times")
        return text.replace(old, new)


def read_tables() -> list[Mutant]:
    """Read all rows, in the order of the files' names."""
    return [
        Mutant(row["name"], row["file"], row["old"].rstrip("\n"), row["new"].rstrip("\n"), row["test"])
        for table in sorted(TABLES.glob("*.yaml"))
        for row in yaml.safe_load(table.read_text())
    ]


@contextmanager
def copied_tree() -> Iterator[Path]:
    """Copy the tree into a temporary folder for the time of the body."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        for name in _COPIED:
            source, target = ROOT / name, tree / name
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)
        yield tree


class _Calls:
    """Plugin of pytest that counts the tests which failed when they were called, not in a fixture."""

    failed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed += report.when == "call" and report.failed


def _run_pytest(tree: str, tests: list[str], output: str) -> None:
    """Body of a forked process: run tests in a copy of the tree, slow ones too, and exit with a code of the above."""
    try:
        import pytest

        for name in [name for name in sys.modules if name.split(".")[0] in ("tests", "tune_ego")]:
            del sys.modules[name]
        sys.modules["__main__"] = ModuleType("__main__")  # processes that tests start must not import this file's tree
        os.chdir(tree)
        sys.path.insert(0, tree)
        sys.dont_write_bytecode = True
        file = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
        options = ["-q", "-x", "--tb=short", "-o", "addopts=", "-p", "no:cacheprovider", "-p", "no:randomly"]
        options += [f"--timeout={_SECONDS}", f"--basetemp={output}.files"]
        calls = _Calls()
        code = int(pytest.main([*options, *tests], plugins=[calls]))
        os._exit(_NO_CALL if code == _FAILED and not calls.failed else code)
    finally:  # an exception's own exit code would be that of a failed test
        os._exit(_CRASHED)


def run_tests(tree: Path, tests: list[str]) -> tuple[int, str]:
    """Run tests in a copy of the tree; return (pytest's exit code, its output)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    output = tree.with_suffix(".output")
    process = context.Process(target=_run_pytest, args=(str(tree), tests, str(output)))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode, output.read_text() if output.exists() else ""


def verdict(mutant: Mutant, tree: Path) -> str:
    """Plant a mistake in a copy of the tree, run its test, and restore the file: `noticed`, or the fault.

    A mistake may also stop a fixture of the test. That counts where the same test, alone, passes without the mistake.
    """
    path = tree / mutant.file
    sound = path.read_text()
    path.write_text(mutant.spoilt(sound))
    try:
        code, output = run_tests(tree, [mutant.test])
    finally:
        path.write_text(sound)
    if code == _FAILED or (code == _NO_CALL and run_tests(tree, [mutant.test])[0] == _PASSED):
        return "noticed"
    return "SURVIVED" if code == _PASSED else f"NO VERDICT: exit code {code}: {output[-500:]}"


def check_mutants(mutants: list[Mutant], jobs: int) -> int:
    """Print a line for each mutant and a summary; return how many were not noticed."""
    start, not_noticed = time.monotonic(), 0
    with ThreadPoolExecutor(jobs) as pool, copied_tree() as whole:
        code, output = run_tests(whole, list(dict.fromkeys(mutant.test for mutant in mutants)))
        if code != _PASSED:
            raise SystemExit(f"{output}\nThe tests have to pass before mistakes are planted.")
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(jobs):
            trees.put(shutil.copytree(whole, whole.parent / str(number)))

        def check(mutant: Mutant) -> str:
            tree = trees.get()
            try:
                return verdict(mutant, tree)
            finally:
                trees.put(tree)

        for mutant, said in zip(mutants, pool.map(check, mutants)):
            not_noticed += said != "noticed"
            print(f"{said:9} {mutant.name}  ({mutant.file}; {mutant.test})", flush=True)
    print(f"{len(mutants) - not_noticed} of {len(mutants)} noticed, {time.monotonic() - start:.0f} s")
    return not_noticed


def main() -> None:
    parser = argparse.ArgumentParser(description="Plant mistakes, one at a time, and run the test that notices each.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="rows of the tables, or beginnings of their names")
    parser.add_argument("--jobs", type=int, default=2, help="tests at a time")
    options = parser.parse_args()
    mutants = [row for row in read_tables() if not options.names or row.name.startswith(tuple(options.names))]
    if not mutants:
        raise SystemExit(f"no row in {TABLES.name}/ begins with {', '.join(options.names)}")
    raise SystemExit(1 if check_mutants(mutants, options.jobs) else 0)


if __name__ == "__main__":
    main()
