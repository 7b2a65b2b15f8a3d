"""`reproduce` on synthetic shards, as docs/model.md has it, in small."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, tiny_config
from tests.pages import ROOT, commands
from tune_ego.cli import app
from tune_ego.errors import UserError
from tune_ego.model import build_stream
from tune_ego.reproduction import _given_weights
from tune_ego.results.reading import read_experiment

SIZES = {key: value for key, value in TINY.items() if not key.startswith("train.")} | {"train.log_every": 2}
SMALL = [word for key, value in SIZES.items() for word in ("--set", f"{key}={value}")]
SMALL += ["--repeats", "1", "--iterations", "4"]


def documented(shards: str) -> list[list[str]]:
    """Both commands of the page: the dry run, and the run."""
    page = ROOT / "docs" / "model.md"
    found = [words for words in commands(page) if words[0] == "reproduce"]
    return [[shards if word == "SHARDS" else word for word in words] + SMALL for words in found]


def write_weights(folder: str, *names: str) -> None:
    Path(folder).mkdir(exist_ok=True)
    for name in names:
        modality = "rgb" if name.startswith("rgb") else "flow"
        torch.save(build_stream(modality, 4, tiny_config(model__stam_depth=0).model).state_dict(), f"{folder}/{name}")


@pytest.mark.parametrize(
    ("names", "spaces"),
    [
        (["rgb_imagenet.pt", "flow_imagenet.pt"], {"lu_o"}),
        (["rgb-o.pt", "flow-o.pt"], {"lu", "table1"}),
        (["rgb_imagenet.pt", "flow_imagenet.pt", "rgb-o.pt", "flow-o.pt"], {"lu_o", "lu", "table1"}),
    ],
)
def test_starting_weights_are_known_by_their_names(names: list[str], spaces: set[str], tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    given = _given_weights(str(tmp_path))
    assert given.keys() == spaces
    for name, files in given.items():
        kind = "%s_imagenet.pt" if name == "lu_o" else "%s-o.pt"
        assert files == {stream: str(tmp_path / (kind % stream)) for stream in ("rgb", "flow")}


def test_missing_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"none of the expected files: rgb_imagenet.pt and flow_imagenet.pt; rgb-o.pt"):
        _given_weights(str(tmp_path))
    (tmp_path / "rgb-o.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"rgb-o.pt and flow-o.pt belong together; one is missing"):
        _given_weights(str(tmp_path))
    assert _given_weights(None) == {}
    assert "starts from random weights" in capsys.readouterr().out


@pytest.mark.slow
def test_the_published_experiments_are_run_once(
    shards: str,
    ray_cluster: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_weights("WEIGHTS", "rgb_imagenet.pt", "flow_imagenet.pt")
    dry_run, run = documented(shards)
    app(dry_run, standalone_mode=False)
    assert not Path("RESULTS").exists()
    assert len(re.findall("^iterations in all", capsys.readouterr().out, re.MULTILINE)) == 3
    app(run, standalone_mode=False)
    root = tmp_path / "RESULTS" / "reproduction"
    searches = {name: read_experiment(str(root / name)) for name in ("lu_o", "lu", "table1")}
    assert [len(search.trials) for search in searches.values()] == [1, 2, 4]
    for name, search in searches.items():
        assert {(trial.state, trial.iteration) for trial in search.trials} == {("finished", 4)}
        first = Path("WEIGHTS").absolute() if name == "lu_o" else root / "lu_o" / "runs" / "00000"
        assert all(str(trial.config.init_from.rgb).startswith(str(first)) for trial in search.trials)
    assert {trial.config.init_from.flow for trial in searches["table1"].trials} == {None}
    numbers = json.loads((root / "reproduction.json").read_text())
    assert all(0 <= row["mean_class"]["mean"] <= 1 for row in numbers["rows"]) and numbers["comparable"] is False
    assert "Not comparable" in (root / "reproduction.html").read_text()

    printed = capsys.readouterr().out
    assert "NOT COMPARABLE: 4 classes here, 106 in EGTEA Gaze+." in printed and "has finished" not in printed
    changed = {path: path.stat().st_mtime_ns for path in root.rglob("metrics.jsonl")}
    app(run, standalone_mode=False)
    assert capsys.readouterr().out.count("has finished") == 3
    assert {path: path.stat().st_mtime_ns for path in root.rglob("metrics.jsonl")} == changed
    with pytest.raises(UserError, match=r"lu_o: this search was started with other arguments \(repeats\)"):
        app([*run, "--repeats", "2"], standalone_mode=False)
