"""`reproduce` on synthetic shards, as docs/model.md has it, in small."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, tiny_config
from tests.pages import ROOT, commands
from tests.searches import KnownSearch
from tune_ego.cli import app
from tune_ego.errors import UserError
from tune_ego.model import build_stream
from tune_ego.reproduction import _starting_weights
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
    ("kinds", "starts"),
    [
        (["_imagenet"], {"lu_o": "_imagenet", "lu": "", "table1": ""}),
        (["-o"], {"lu": "-o", "table1": "-o"}),
        (["_imagenet", "-o"], {"lu_o": "_imagenet", "lu": "-o", "table1": "-o"}),
    ],
)
def test_starting_weights_are_known_by_their_names(
    kinds: list[str], starts: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for kind in kinds:
        for stream in ("rgb", "flow"):
            (tmp_path / f"{stream}{kind}.pt").write_bytes(b"x")
    assert _starting_weights(str(tmp_path)) == {
        name: {stream: str(tmp_path / f"{stream}{kind}.pt") for stream in ("rgb", "flow")} if kind else {}
        for name, kind in starts.items()
    }
    assert ("-o is not repeated" in capsys.readouterr().out) == (kinds == ["-o"])


def test_missing_weights_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"none of the expected files: rgb_imagenet.pt and flow_imagenet.pt; rgb-o.pt"):
        _starting_weights(str(tmp_path))
    (tmp_path / "rgb-o.pt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"rgb-o.pt and flow-o.pt belong together; one is missing"):
        _starting_weights(str(tmp_path))
    assert _starting_weights(None) == {"lu_o": {}, "lu": {}, "table1": {}}
    assert "starts from random weights" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ("repeats=5", "--set repeats: the number of runs of each row is --repeats"),
        ("model.stam_depth=2", "table1.yaml searches this key"),
        ("data.crop=500", "500"),
    ],
)
def test_changes_that_do_not_fit_the_last_search_are_refused_before_the_first(
    option: str, words: str, shards: str, tmp_path: Path
) -> None:
    arguments = ["reproduce", shards, "--storage", str(tmp_path / "results"), *SMALL, "--set", option]
    with pytest.raises(UserError, match=words):
        app(arguments, standalone_mode=False)
    assert not (tmp_path / "results").exists()


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
    assert all(0 <= row["mean_class"]["mean"] <= 1 for row in numbers["rows"]) and numbers["not_comparable"]
    assert "Not comparable" in (root / "reproduction.html").read_text()

    printed = capsys.readouterr().out
    assert "NOT COMPARABLE: 4 classes here, 106 in EGTEA Gaze+." in printed and "has finished" not in printed
    changed = {path: path.stat().st_mtime_ns for path in root.rglob("metrics.jsonl")}
    app(run, standalone_mode=False)
    assert capsys.readouterr().out.count("has finished") == 3
    assert {path: path.stat().st_mtime_ns for path in root.rglob("metrics.jsonl")} == changed

    for more, key in ((["--repeats", "12"], "repeats"), (["--set", "seed=3"], "seed"), (["--set", "label=x"], "label")):
        with pytest.raises(UserError, match=rf"lu_o: this search was started with other arguments \({key}\)"):
            app([*run, *more], standalone_mode=False)
    place = run.index("train.log_every=2")
    with pytest.raises(UserError, match=r"other arguments \(train.log_every\)"):
        app(run[: place - 1] + run[place + 1 :], standalone_mode=False)


def test_a_search_on_other_shards_is_refused(known_search: KnownSearch, handmade_shards: str, tmp_path: Path) -> None:
    shutil.copytree(known_search.copy(tmp_path / "copy"), tmp_path / "results" / "reproduction" / "lu_o")
    with pytest.raises(UserError, match=r"lu_o: .* is another data set than it was started on"):
        app(["reproduce", handmade_shards, "--storage", str(tmp_path / "results"), *SMALL], standalone_mode=False)
