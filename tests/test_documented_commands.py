"""Every command of the README and of docs/, run on a tiny data set in the order in which a user would run them.

Places are replaced (a bucket by a folder) and sizes are reduced; all else is as the pages have it. Commands that need a
cluster are marked so on their page. Benchmarks take minutes each: tests/bench/ runs their parts. The commands of
`reproduce` are in tests/test_reproduction.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

from tests.conftest import TINY, tiny_config
from tests.pages import PAGES, commands
from tune_ego.cli import app
from tune_ego.dataset.shards import open_shards
from tune_ego.demo import run_demo
from tune_ego.model import build_stream
from tune_ego.results.experiment import read_metrics
from tune_ego.results.reading import read_experiment

REPLACED = {
    "s3://bucket/egtea-shards": "SHARDS",
    "s3://bucket/results": "RESULTS",
    "RUN": "RESULTS/final",
    "480": "40",
    "320x240": "96x72",
    "96": "3",
    "3000": "8",
}
ADDED = {
    "synthesize": ["--verbs", "2", "--nouns", "2", "--seconds", "0.8"],
    "train": ["--iterations", "4"],
}
ORDER = ["synthesize", "prepare", "inspect", "tune", "resume", "export", "train", "evaluate", "status", "report"]
ORDER += ["visualize", "predict", "package"]
ELSEWHERE = ["bench", "demo", "reproduce"]


def local(words: list[str], clip: str) -> tuple[str, ...]:
    """The command with this test's places and sizes."""
    name, *rest = words
    for place, folder in REPLACED.items():
        rest = [folder if word == place else word.replace(f"{place}/", f"{folder}/") for word in rest]
    rest = [clip if word == "CLIP" else word for word in rest]
    if name == "tune":
        rest[0] = "space.yaml"
    if name == "prepare" and "--check" not in rest:
        rest += ["--image-size", "96x72"]
    if "tvl1" in rest:
        rest[rest.index("SHARDS")] = "TVL1"
    return (name, *rest, *ADDED.get(name, []))


def write_inputs() -> None:
    """The files that the pages take as given: a search space, starting weights, a recipe, another search."""
    base: dict[str, dict[str, object]] = {}
    for key, value in (TINY | {"train.iterations": 4}).items():
        part, leaf = key.split(".")
        base.setdefault(part, {})[leaf] = value
    space = {"base": base, "space": {"optimizer.lr": {"loguniform": [1e-4, 1e-3]}}, "samples": 2}
    Path("space.yaml").write_text(yaml.safe_dump({**space, "scheduler": {"name": "fifo"}}))
    for modality in ("rgb", "flow"):
        stream = build_stream(modality, 4, tiny_config(model__stam_depth=0).model)
        torch.save(stream.state_dict(), f"{modality}_imagenet.pt")


def write_scores() -> None:
    """Scores of another program for the test clips of split 1: the first class, always."""
    clips = Path("EGTEA/action_annotation/test_split1.txt").read_text().splitlines()
    for modality in ("rgb", "flow"):
        Path(f"{modality}.txt").write_text("1 0 0 0\n" * len(clips))


@pytest.mark.slow
def test_every_documented_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    write_inputs()
    documented = [words for page in PAGES for words in commands(page, with_cluster=False)]
    assert {words[0] for words in documented} == {*ORDER, *ELSEWHERE}
    documented = [words for words in documented if words[0] not in ELSEWHERE]
    clip = ""
    done: set[tuple[str, ...]] = set()
    for words in sorted(documented, key=lambda words: (ORDER.index(words[0]), not {"--check", "--dry-run"} & {*words})):
        if words[0] == "inspect" and not clip:
            rows = pq.read_table("SHARDS/clips.parquet").to_pylist()
            clip = next(row["clip"] for row in rows if row["split1"] == "test")
        if words[0] == "evaluate" and not Path("rgb.txt").exists():
            write_scores()
        if words[0] == "train" and not Path("recipe.yaml").exists():
            shutil.copy("best.yaml", "recipe.yaml")
            shutil.copytree("RESULTS/full", "RESULTS/other")
        if words[0] == "predict" and not Path("VIDEO.mp4").exists():
            shutil.copy(next(Path("EGTEA").rglob("*.mp4")), "VIDEO.mp4")
        command = local(words, clip)
        if command not in done:
            done.add(command)
            app(list(command), standalone_mode=False)
    printed = capsys.readouterr().out
    search = read_experiment("RESULTS/full")
    assert [(trial.state, trial.metrics[-1]["iteration"]) for trial in search.trials] == [("finished", 8)] * 3
    assert open_shards("TVL1").table.num_rows == open_shards("SHARDS").table.num_rows == 40
    for run in ("final", "stage-o", "stage-a"):
        assert read_metrics(f"RESULTS/{run}")[-1]["iteration"] == 4
        assert 0 <= json.loads(Path(f"RESULTS/{run}/evaluation.json").read_text())["fused"]["mean_class_accuracy"] <= 1
    assert json.loads(Path("other.json").read_text())["split"] == 2
    assert "search" in printed
    assert Path("VIDEO.mp4.html").stat().st_size > 5000 and Path("RESULTS/detection.json").exists()
    assert Path("MODEL/model.pt2").exists() and Path("PACKAGE/model.onnx").exists()
    assert Path(f"{clip}.png").stat().st_size > 10_000
    assert Path("report.html").stat().st_size > 20_000  # of two searches, the last one of the page
    assert Path(f"{clip}.mp4").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_demo_shows_what_it_is_for(tmp_path: Path, ray_cluster: None) -> None:
    """Attention finds the gaze, both streams are needed, the search has something to find, actions are detected."""
    run_demo(str(tmp_path / "demo"), 0)
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    results = summary["evaluation"]
    attention = results["attention"]
    for stream in ("rgb", "flow"):
        assert attention[stream]["nss"] > attention["centre"]["nss"] + 0.1
        assert attention[stream]["auc"] > attention["centre"]["auc"] + 0.05
    accuracy = {name: results[name]["mean_class_accuracy"] for name in ("rgb", "flow", "fused")}
    assert accuracy["fused"] >= 0.6
    assert accuracy["fused"] > max(accuracy["rgb"], accuracy["flow"]) + 0.05
    trials = summary["trials"]
    assert any(trial["state"] == "stopped" for trial in trials)
    best_of_trials = [trial["val_mean_class_accuracy"] for trial in trials]
    assert max(best_of_trials) > min(best_of_trials) + 0.15
    detection = summary["detection"]
    assert detection["frame_accuracy"] >= 0.7 * detection["clip_accuracy"] > 3 * summary["chance"]
    assert detection["map"]["0.3"] > 2 * summary["chance"] > 0
    pages = list((tmp_path / "demo" / "prediction").glob("*.html"))
    assert len(pages) == 1 and "data:image/jpeg" in pages[0].read_text()
