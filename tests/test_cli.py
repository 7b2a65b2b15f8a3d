"""The command line as a user calls it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tune_ego.cli import main

COMMANDS = ["demo", "synthesize", "prepare", "inspect", "tune", "resume", "status", "export", "train", "evaluate"]


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Exit code of a command, run in this process."""
    monkeypatch.setattr(sys, "argv", ["tune-ego", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_help_answers_at_once_and_imports_no_heavy_package() -> None:
    program = (
        "import sys; sys.argv = ['tune-ego', '--help']\n"
        "from tune_ego.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(sorted({'torch', 'ray', 'cv2', 'pyarrow', 'pydantic'} & sys.modules.keys()))"
    )
    seconds = []
    for _ in range(3):
        start = time.monotonic()
        output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        seconds.append(time.monotonic() - start)
    assert output.strip().endswith("[]")
    assert all(command in output for command in COMMANDS)
    assert min(seconds) < 0.6


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_reads_writes_and_costs(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(monkeypatch, command, "--help") == 0
    words = capsys.readouterr().out.lower()
    assert "read" in words or command == "synthesize"
    assert "write" in words
    assert "cost" in words or "second" in words or "hours" in words


def bad(tmp_path: Path, shards: str) -> dict[str, tuple[list[str], list[str]]]:
    """Commands with a mistake each -> words that the one line must hold."""
    (tmp_path / "eval.yaml").write_text('space: {model.stam_depth: {"eval": "1"}}')
    (tmp_path / "config.yaml").write_text("data: {crop: 32}")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("x")
    search = ["--data", shards, "--storage", str(tmp_path), "--name", "n"]
    used = ["--data", shards, "--storage", str(tmp_path), "--name", "used"]
    small = ["--set", "data.crop=32"]
    return {
        "space": (["tune", str(tmp_path / "eval.yaml"), *search], ["eval.yaml", "model.stam_depth", "'eval'"]),
        "no such space": (["tune", "nosuch", *search], ["nosuch"]),
        "set": (["tune", "demo", *search, "--set", "data.crap=1"], ["data.crap", "data.crop"]),
        "set without value": (["tune", "demo", *search, "--set", "data.crop"], ["KEY=VALUE"]),
        "crop": (["tune", "demo", *search], ["data.crop", "48 x 36"]),
        "used name": (["tune", "demo", *used, *small], ["used"]),
        "no shards": (
            ["tune", "demo", "--data", str(tmp_path), "--storage", str(tmp_path), "--name", "n"],
            ["dataset.json"],
        ),
        "no experiment": (["resume", str(tmp_path)], ["experiment.json"]),
        "no experiment to export": (["export", str(tmp_path)], ["experiment.json"]),
        "no annotations": (["prepare", str(tmp_path), str(tmp_path / "out")], ["action_annotation"]),
        "size": (["prepare", str(tmp_path), str(tmp_path / "out"), "--image-size", "big"], ["big", "320x240"]),
        "no configuration": (["train", str(tmp_path / "no.yaml"), *search], ["no.yaml"]),
        "used run": (["train", str(tmp_path / "config.yaml"), *used], ["used"]),
        "no checkpoint": (["evaluate", str(tmp_path / "no"), "--data", shards], ["checkpoint"]),
        "not a checkpoint": (
            ["evaluate", str(tmp_path / "config.yaml"), "--data", shards],
            ["config.yaml", "not a torch file"],
        ),
    }


CASES = [
    "space",
    "no such space",
    "set",
    "set without value",
    "crop",
    "used name",
    "no shards",
    "no experiment",
    "no experiment to export",
    "no annotations",
    "size",
    "no configuration",
    "used run",
    "no checkpoint",
    "not a checkpoint",
]


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_one_line_and_exit_code_2(
    case: str, tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cases = bad(tmp_path, shards)
    assert list(cases) == CASES
    arguments, words = cases[case]
    before = sorted(tmp_path.rglob("*"))
    assert call(monkeypatch, *arguments) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert sorted(tmp_path.rglob("*")) == before


def test_more_than_the_cluster_has_is_refused(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    search = ["tune", "demo", "--data", shards, "--storage", str(tmp_path), "--name", "n", "--set", "data.crop=32"]
    assert call(monkeypatch, *search, "--set", "compute.gpus_per_worker=1") == 2
    error = capsys.readouterr().err
    assert "1 GPUs each" in error
    assert "0 GPUs on 1 node" in error
    assert call(monkeypatch, *search, "--set", "compute.cpus_per_worker=4096") == 2
    assert "CPUs" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_shards_of_another_version_and_data_of_other_classes(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(shards, tmp_path / "old")
    path = tmp_path / "old" / "dataset.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 0}))
    search = ["tune", "demo", "--data", str(tmp_path / "old"), "--storage", str(tmp_path), "--name", "n"]
    assert call(monkeypatch, *search) == 2
    assert "schema version 0" in capsys.readouterr().err


def test_an_empty_part_of_the_base_is_named(
    tmp_path: Path, shards: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "s.yaml").write_text("base:\n  train:\n")
    search = ["tune", str(tmp_path / "s.yaml"), "--data", shards, "--storage", str(tmp_path), "--name", "n"]
    assert call(monkeypatch, *search, "--set", "train.iterations=5") == 2
    assert "train: expected keys and values" in capsys.readouterr().err
