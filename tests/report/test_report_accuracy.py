"""An evaluation in a report: its classes in readable order, and which run it is of."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.report.test_report import check_page, without_charts
from tests.six_trials import write_six_trials
from tests.stub_experiment import write_evaluation, write_experiment
from tune_ego import storage
from tune_ego.config import Config
from tune_ego.config_io import dump_config, override_config
from tune_ego.errors import UserError
from tune_ego.report.accuracy import evaluation_numbers, read_evaluation
from tune_ego.report.page import SECTIONS
from tune_ego.report.provenance import reproduction
from tune_ego.report.write import write_report
from tune_ego.results.reading import read_experiment


def _stream(micro: float, recall: list[float | None], confusion: list[list[int]]) -> dict[str, Any]:
    return {
        "micro_accuracy": micro,
        "mean_class_accuracy": micro - 0.1,
        "verb_accuracy": micro + 0.1,
        "noun_accuracy": micro + 0.05,
        "recall": recall,
        "confusion": confusion,
    }


# Rows are the true classes, columns the predicted ones: open 4 clips, close 10, lift 4, wash none.
CONFUSION = [
    [1, 3, 0, 0],
    [2, 5, 0, 3],
    [0, 1, 3, 0],
    [0, 0, 0, 0],
]
RGB = [
    [4, 0, 0, 0],
    [0, 10, 0, 0],
    [1, 0, 3, 0],
    [0, 0, 0, 0],
]
SCORES = {"auc_judd": 0.8, "auc": 0.7, "nss": 1.5, "f1": 0.3, "precision": 0.2, "recall": 0.6, "frames": 300}
EVALUATION: dict[str, Any] = {
    "split": 2,
    "trained_on_split": 1,
    "clips": 18,
    "clips_trained_on": 3,
    "chance": 0.25,
    "iteration": 90,
    "checkpoint": "/nowhere/final/final/model.pt",
    "fusion_weight": 0.4,
    "classes": [
        {"action": "open", "clips": 4},
        {"action": "close", "clips": 10},
        {"action": "lift", "clips": 4},
        {"action": "wash", "clips": 0},
    ],
    "rgb": _stream(0.5, [1.0, 1.0, 0.75, None], RGB),
    "flow": None,
    "fused": _stream(0.7, [0.25, 0.5, 0.75, None], CONFUSION),
    "attention": {"rgb": SCORES, "flow": None, "centre": {**SCORES, "auc": 0.6}},
}


def test_an_evaluation_in_readable_order(tmp_path: Path) -> None:
    """Most clips first, then by name: close (10), lift (4), open (4), wash (0)."""
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(EVALUATION))
    numbers = evaluation_numbers(str(file))
    assert numbers == {
        "why": "",
        "file": str(file),
        "checkpoint": "/nowhere/final/final/model.pt",
        "fusion_weight": 0.4,
        "split": 2,
        "clips": 18,
        "iteration": 90,
        "chance": 0.25,
        "clips_trained_on": 3,
        "trained_on_split": 1,
        "streams": [
            {
                "stream": name,
                "micro_accuracy": micro,
                "mean_class_accuracy": pytest.approx(micro - 0.1),
                "verb_accuracy": pytest.approx(micro + 0.1),
                "noun_accuracy": pytest.approx(micro + 0.05),
            }
            for name, micro in (("rgb", 0.5), ("fused", 0.7))
        ],
        "confusion_of": "fused",
        "confusion": [
            [5, 0, 2, 3],  # close as close, lift, open, wash
            [1, 3, 0, 0],  # lift
            [3, 0, 1, 0],  # open
            [0, 0, 0, 0],
        ],
        "classes": [
            {"rank": 1, "action": "close", "clips": 10, "recall": {"rgb": 1.0, "fused": 0.5}},
            {"rank": 2, "action": "lift", "clips": 4, "recall": {"rgb": 0.75, "fused": 0.75}},
            {"rank": 3, "action": "open", "clips": 4, "recall": {"rgb": 1.0, "fused": 0.25}},
            {"rank": 4, "action": "wash", "clips": 0, "recall": {"rgb": None, "fused": None}},
        ],
        "confused": [  # by clips, then by their share of the true class's
            {"true": "open", "predicted": "close", "clips": 3, "share": 0.75},
            {"true": "close", "predicted": "wash", "clips": 3, "share": 0.3},
            {"true": "close", "predicted": "open", "clips": 2, "share": 0.2},
            {"true": "lift", "predicted": "close", "clips": 1, "share": 0.25},
        ],
        "attention": [{"name": "rgb", **SCORES}, {"name": "centre", **SCORES, "auc": 0.6}],
    }


def test_twenty_pairs_of_confused_classes_at_most(tmp_path: Path) -> None:
    """6 classes, each clip predicted as another class: 30 pairs, of which 25 have the most clips."""
    counts = [[0 if row == column else 2 if row else 1 for column in range(6)] for row in range(6)]
    clips = [sum(row) for row in counts]
    content = {
        **EVALUATION,
        "classes": [{"action": f"{n}", "clips": count} for n, count in enumerate(clips)],
        "rgb": None,
        "fused": _stream(0.0, [0.0] * 6, counts),
    }
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(content))
    confused = evaluation_numbers(str(file))["confused"]
    assert [pair["true"] for pair in confused] == [name for name in "1234" for _ in range(5)]


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (("fused", "confusion", 0, 1), 2, "fused: the confusion matrix does not match the classes and their clips"),
        (
            ("fused", "confusion", 0),
            [1, 3, 0],
            "fused: the confusion matrix does not match the classes and their clips",
        ),
        (("rgb", "recall", 3), 0.5, "rgb: the recall does not match the classes"),
        (("rgb", "recall", 0), None, "rgb: the recall does not match the classes"),
        (("rgb", "recall"), [1.0, 1.0, 0.75], "rgb: the recall does not match the classes"),
        (("classes", 3, "clips"), -1, "classes.3.clips: Input should be greater than or equal to 0"),
        (("split",), "2", "split: Input should be a valid integer"),
        (("chance",), float("nan"), "chance: Input should be a finite number"),
    ],
)
def test_an_evaluation_that_does_not_belong_together(
    tmp_path: Path, place: tuple[str | int, ...], value: object, reason: str
) -> None:
    content: Any = copy.deepcopy(EVALUATION)
    node = content
    for part in place[:-1]:
        node = node[part]
    node[place[-1]] = value
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match=f"not written by `tune-ego evaluate`: {reason}"):
        evaluation_numbers(str(file))


def test_an_evaluation_without_streams(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text(json.dumps({**EVALUATION, "rgb": None, "fused": None}))
    with pytest.raises(UserError, match="streams missing"):
        evaluation_numbers(str(file))


def test_commands_of_an_evaluated_run(tmp_path: Path) -> None:
    """The evaluation's split, not the trained one; a fusion weight only where the run has another."""
    root = write_six_trials(tmp_path / "six")
    search = read_experiment(str(root))
    evaluation: dict[str, Any] = {
        "run": "/nowhere/final",
        "run_data": None,
        "run_fusion_weight": 0.5,
        "checkpoint": "/nowhere/final/final/model.pt",
        "fusion_weight": 0.4,
        "split": 2,
        "trained_on_split": 1,
    }
    train = "tune-ego train /nowhere/final/config.yaml --data {} --storage {} --name final-again"
    test = "tune-ego evaluate /nowhere/final --data {} --split 2"
    cases: list[tuple[dict[str, Any], str, str]] = [
        ({}, "/nowhere/shards", " --fusion-weight 0.4"),
        ({"run_data": "/other"}, "/other", " --fusion-weight 0.4"),
        ({"fusion_weight": 0.5}, "/nowhere/shards", ""),
        ({"fusion_weight": None}, "/nowhere/shards", ""),
    ]
    for changes, data, weight in cases:
        commands = reproduction(search, {**evaluation, **changes}, [])["commands"]
        assert [one["what"] for one in commands] == [
            "start the search",
            "resume the search",
            "export the best configuration",
            "train and test the run shown here again",
            "evaluate the checkpoint shown here again",
            "write this report again",
        ]
        assert commands[3]["command"] == train.format(data, tmp_path)
        assert commands[4]["command"] == test.format(data) + weight


def test_fingerprints_are_of_the_shards_files(tmp_path: Path) -> None:
    """SHA-256 of `abc`, as FIPS 180 gives it, and of nothing."""
    search = read_experiment(str(write_six_trials(tmp_path / "six")))
    search.spec["data"] = str(tmp_path)
    (tmp_path / "dataset.json").write_bytes(b"abc")
    (tmp_path / "clips.parquet").write_bytes(b"")
    assert [one["sha256"] for one in reproduction(search, {"why": ""}, [])["fingerprints"]] == [
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    ]


def test_the_run_of_an_evaluation(tmp_path: Path) -> None:
    """Its data, fusion weight and differences; another seed and length make no other configuration."""
    root = write_six_trials(tmp_path / "six")
    search = read_experiment(str(root))
    file = tmp_path / "elsewhere" / "evaluation.json"
    storage.write_json(str(file), EVALUATION)
    run = file.parent
    keys = ("run", "run_data", "run_fusion_weight", "differs")
    numbers = read_evaluation(search, str(file))
    assert [numbers[key] for key in keys] == [None, None, None, None]  # no configuration that can be read
    changes = {"fusion_weight": 0.3, "seed": 9, "train.iterations": 500, "optimizer.name": "ranger", "data.split": 2}
    storage.write_text(str(run / "config.yaml"), dump_config(override_config(search.best.config, changes, "")))
    storage.write_json(str(run / "run.json"), {"data": "/other"})
    numbers = read_evaluation(search, str(run))  # of the folder, its file
    assert [numbers[key] for key in keys] == [str(run), "/other", 0.3, ["optimizer.name", "data.split", "data"]]
    assert numbers["split"] == 2
    for trial in search.trials:
        trial.metrics = []
    assert read_evaluation(search, str(file))["differs"] == []  # there is no best one to differ from
    assert read_evaluation(search, None) == {"why": "no trial has been validated yet, so there is nothing to evaluate"}


def _evaluated(folder: Path, config: Config, data: str = "/nowhere/shards", **changes: object) -> Path:
    """A run of `config` with an evaluation."""
    storage.write_text(str(folder / "config.yaml"), dump_config(config))
    storage.write_json(str(folder / "run.json"), {"data": data, "version": "0.1.0"})
    content = write_evaluation(folder / "evaluation.json", 12)
    storage.write_json(str(folder / "evaluation.json"), {**content, **changes})
    return folder


def test_what_an_evaluation_is_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the best configuration alone are taken; a given one of another, or on known clips, says so."""
    without_charts(monkeypatch)
    root, out = tmp_path / "a" / "search", tmp_path / "report.html"
    write_experiment(root, 4)
    best = read_experiment(str(root)).best.config
    longer = override_config(best, {"train.iterations": 3000, "seed": 5}, "")
    changes = {"data.split": 3, "streams": "rgb", "model.width": 0.5, "init_from.rgb": "/x.pt"}
    others = [override_config(longer, {key: value}, "") for key, value in changes.items()]
    for number, (config, key) in enumerate([*zip(others, changes), (longer, "data")]):
        run = _evaluated(tmp_path / "a" / f"other{number}", config, "/other" if key == "data" else "/nowhere/shards")
        numbers = write_report(str(root), str(out), str(run))
        assert numbers["evaluation"]["differs"] == [key]
        assert f"not the best configuration: it differs in {key}" in check_page(out, SECTIONS).text
    assert "no evaluated run" in write_report(str(root), str(out))["evaluation"]["why"]

    run = _evaluated(tmp_path / "a" / "final", longer, clips_trained_on=7, fusion_weight=0.3)
    numbers = write_report(str(root), str(out))
    page = check_page(out, SECTIONS)
    assert numbers["evaluation"]["run"] == str(run) and numbers["evaluation"]["differs"] == []
    assert "NOT A TEST: mean class accuracy, fused" in page.text
    assert all(
        "not a test: the model was trained on 7 of these clips" in row["on"] for row in numbers["published"]["ours"][:3]
    )
    commands = [one["command"] for one in numbers["reproduce"]["commands"]]
    assert f"tune-ego train {run}/config.yaml --data /nowhere/shards" in " ".join(commands)
    assert any(command.endswith("--split 1 --fusion-weight 0.3") for command in commands)

    damages: list[dict[str, Any]] = [
        {"attention": {"rgb": {"auc": 0.5}}},
        {"classes": []},
        {"fused": {"recall": []}},
    ]
    for damage in damages:
        _evaluated(run, longer, **damage)
        assert "not written by `tune-ego evaluate`" in write_report(str(root), str(out))["evaluation"]["why"]
        check_page(out, SECTIONS)
        with pytest.raises(UserError, match="not written by `tune-ego evaluate`"):
            write_report(str(root), str(out), str(run))


def test_the_evaluated_run_beside_a_search_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_charts(monkeypatch)
    root = tmp_path / "search"
    write_experiment(root, 4)
    trials = sorted(read_experiment(str(root)).trials, key=lambda trial: trial.accuracy or 0)
    for name, trial in (("final", trials[-1]), ("another", trials[0])):
        storage.write_text(str(tmp_path / name / "config.yaml"), dump_config(trial.config))
        write_evaluation(tmp_path / name / "evaluation.json", 12)
    numbers = write_report(str(root), str(tmp_path / "report.html"))
    assert numbers["evaluation"]["file"] == str(tmp_path / "final" / "evaluation.json")
    assert numbers["published"]["comparable"] is False
    assert "Not comparable: 12 classes" in check_page(tmp_path / "report.html", SECTIONS).text
    shutil.copytree(tmp_path / "final", tmp_path / "final2")
    assert "2 runs beside" in write_report(str(root), str(tmp_path / "report.html"))["evaluation"]["why"]
