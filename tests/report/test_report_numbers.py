"""The figures of a report, worked out by hand from a search's files: `tests/six_trials.py` has its lines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.six_trials import SPACE, write_json, write_six_trials
from tune_ego import __version__
from tune_ego.report.accuracy import read_evaluation
from tune_ego.report.numbers import SERIES, experiment_numbers, published_numbers
from tune_ego.results.reading import read_experiment

VALIDATED_ON = "stratified fold 0 of split 1"


def numbers_of(root: Path, *options: str) -> dict[str, Any]:
    search = read_experiment(str(root))
    return experiment_numbers(search, read_evaluation(search, None), list(options))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_six_trials(tmp_path / "six")


@pytest.fixture
def numbers(root: Path) -> dict[str, Any]:
    return numbers_of(root, "--data", "my shards")


def test_sections(numbers: dict[str, Any]) -> None:
    assert list(numbers) == [
        *(
            "report",
            "experiment",
            "damaged",
            "answer",
            "choices",
            "repeats",
            "trials",
            "curves",
            "stopping",
            "parallel",
        ),
        *("importance", "published", "evaluation", "cost", "reproduce"),
    ]
    assert numbers["report"]["version"] == __version__
    assert numbers["report"]["made"].endswith("+00:00") and len(numbers["report"]["made"]) == 25
    assert numbers["damaged"] == []
    assert numbers["evaluation"] == {
        "why": "no evaluated run of the best configuration lies beside the search; choose a run with --evaluation"
    }


def test_overview(numbers: dict[str, Any], root: Path) -> None:
    assert numbers["experiment"] == {
        "name": "six",
        "root": str(root),
        "state": "running: 3 of 7 trials have ended; this report shows the results so far",
        "started": "2026-11-20T08:00:00+00:00",
        "trials_planned": 7,
        "trials_drawn": 6,
        "states": {"failed": 1, "finished": 1, "pending": 1, "running": 2, "stopped": 1},
        "searcher": "random",
        "scheduler": "asha",
        "samples": 7,
        "repeats": 1,
        "budget_iterations": 100,
        "validation": VALIDATED_ON,
        "keys": ["optimizer.name", "train.batch_size"],
    }


def test_answer_is_of_the_best_validation_of_the_best_trial(numbers: dict[str, Any]) -> None:
    """0.8 at iteration 80, not the last one's 0.7."""
    assert numbers["answer"] == {
        "configuration": "00000",
        "trials": ["00000"],
        "values": [{"key": "optimizer.name", "value": "sgd"}, {"key": "train.batch_size", "value": "20"}],
        "accuracy": 0.8,
        "spread": None,
        "repeats_validated": 1,
        "at_iterations": [80],
        "micro_accuracy": 0.85,
        "streams": [
            {"stream": "flow", "accuracy": 0.4},
            {"stream": "fused", "accuracy": 0.8},
            {"stream": "rgb", "accuracy": 0.7},
        ],
        "all_trials": {  # 0.8, 0.2, 0.4, 0.6: squared deviations 0.09 + 0.09 + 0.01 + 0.01, over 3
            "validated": 4,
            "mean": pytest.approx(0.5),
            "spread": pytest.approx((0.2 / 3) ** 0.5),
            "best": 0.8,
            "worst": 0.2,
        },
        "warnings": ["00000: the learning rate of the flow stream fell from 0.1 to 5e-05 by iteration 30 of 100"],
    }


def test_choices_are_compared_at_the_last_iteration_that_all_validated(numbers: dict[str, Any]) -> None:
    """Iteration 40: the running trials have validated at 20 and 40 alone."""

    def row(value: str, mean: float, spread: float, best: float, at_even: float, *members: str) -> dict[str, Any]:
        return {
            "value": value,
            "trials": 2,
            "mean": pytest.approx(mean),
            "spread": pytest.approx(spread * 2**0.5),
            "best": best,
            "mean_at_even": pytest.approx(at_even),
            "members": list(members),
        }

    assert numbers["choices"] == {
        "even_iteration": 40,
        "parameters": [  # values in the order of the search space
            {
                "key": "optimizer.name",
                "when": "",
                "form": "choice",
                "values": [
                    row("sgd", 0.7, 0.1, 0.8, 0.55, "00000", "00003"),  # (0.8 + 0.6) / 2; at 40 (0.5 + 0.6) / 2
                    row("ranger", 0.3, 0.1, 0.4, 0.2, "00001", "00002"),  # (0.2 + 0.4) / 2; at 40 (0.1 + 0.3) / 2
                ],
            },
            {
                "key": "train.batch_size",
                "when": "",
                "form": "choice",
                "values": [
                    row("40", 0.4, 0.2, 0.6, 0.35, "00001", "00003"),  # (0.2 + 0.6) / 2; at 40 (0.1 + 0.6) / 2
                    row("20", 0.6, 0.2, 0.8, 0.4, "00000", "00002"),  # (0.8 + 0.4) / 2; at 40 (0.5 + 0.3) / 2
                ],
            },
        ],
    }


def test_trials_are_listed_best_first(numbers: dict[str, Any]) -> None:
    keys = ["trial", "state", "iterations", "accuracy", "at_iteration", "micro_accuracy", "values", "numbers", "hours"]
    assert [[trial[key] for key in keys] for trial in numbers["trials"]] == [
        ["00000", "finished", 100, 0.8, 80, 0.85, ["sgd", "20"], {"train.batch_size": 20}, 0.025],  # 90 s
        ["00003", "running", 40, 0.6, 40, 0.65, ["sgd", "40"], {"train.batch_size": 40}, 0.015],  # 54 s
        ["00002", "running", 50, 0.4, 20, 0.45, ["ranger", "20"], {"train.batch_size": 20}, 0.015],  # 54 s
        ["00001", "stopped", 40, 0.2, 20, 0.25, ["ranger", "40"], {"train.batch_size": 40}, 0.02],  # 72 s
        ["00004", "failed", 20, None, None, None, ["sgd", "20"], {"train.batch_size": 20}, 0.005],  # 18 s
        ["00005", "pending", 0, None, None, None, ["ranger", "20"], {"train.batch_size": 20}, 0.0],
    ]
    assert [trial["seed"] for trial in numbers["trials"]] == [0] * 6
    assert [trial["reason"] for trial in numbers["trials"]] == ["", "", "", "", "out of memory", ""]
    assert [bool(trial["warning"]) for trial in numbers["trials"]] == [True, *[False] * 5]
    assert len(numbers["trials"][0]) == len(keys) + 3


def test_stopping_counts_ended_trials_alone(numbers: dict[str, Any]) -> None:
    def rung(iterations: int, reported: int, stopped: int, went_on: int) -> dict[str, int]:
        return {"iterations": iterations, "reported": reported, "stopped": stopped, "went_on": went_on}

    assert numbers["stopping"] == {
        "scheduler": "asha",
        "grace": 20,
        "reduction": 2,
        "budget_iterations": 100,
        "rungs": [rung(20, 4, 0, 4), rung(40, 4, 1, 3), rung(80, 1, 0, 1)],
        "stopped": [{"trial": "00001", "iteration": 40, "accuracy": 0.1, "rung": 40}],
        "trials_counted": 2,  # 00000 and 00001: neither the running ones nor the one that failed
        "spent_iterations": 140,  # 100 + 40
        "full_iterations": 200,
        "saved_iterations": 60,
        "saved_share": 0.3,
    }


def test_cost(numbers: dict[str, Any]) -> None:
    assert numbers["cost"] == {
        "gpus_per_trial": 2.0,  # 4 workers of half a GPU
        "workers_per_trial": 4,
        "trial_hours": pytest.approx(0.08),  # 90 + 72 + 54 + 54 + 18 = 288 s
        "gpu_hours": pytest.approx(0.16),
        "worker_hours": pytest.approx(0.32),
        "mean_trial_hours": pytest.approx(0.016),  # of the 5 that have started
        "longest_trial_hours": pytest.approx(0.025),
        # 25 (twice), 40 x 7, 50 x 2, 80 x 3, 100 x 6, without each trial's first line: the 11th of 20
        "median_clips_per_second": 50.0,
    }


def test_curves(numbers: dict[str, Any]) -> None:
    curves = numbers["curves"]
    metric = "val_mean_class_accuracy"
    logged = {
        "train_loss": "training loss",
        metric: "validation mean class accuracy",
        "learning_rate": "learning rate",
    }
    assert curves["logged"] == logged
    assert curves["not_logged"] == ["validation loss", "gaze loss"]
    assert (curves["most_points"], curves["streams"], curves["best"]) == (400, 2, ["00000"])
    assert [(one["trial"], one["state"]) for one in curves["trials"]] == [
        ("00000", "finished"),
        ("00003", "running"),
        ("00002", "running"),
        ("00001", "stopped"),
        ("00004", "failed"),
    ]
    assert curves["trials"][3]["series"] == {
        "train_loss": [[10, 20, 30, 40], [9.5, 9.0, 8.5, 8.0]],  # iteration 50 came after the stop
        metric: [[20, 40], [0.2, 0.1]],
    }
    assert list(curves["trials"][0]["series"]) == ["train_loss", metric, "learning_rate"]
    assert curves["trials"][4]["series"] == {"train_loss": [[10, 20], [9.0, 8.0]]}


def test_parallel_coordinates_and_importance_of_few_trials(numbers: dict[str, Any]) -> None:
    assert numbers["parallel"] == {
        "keys": ["optimizer.name", "train.batch_size"],
        "left_out": [],
        "by_importance": False,
    }
    assert numbers["importance"] == {
        "method": "PED-ANOVA (Optuna)",
        "best_share": 0.25,
        "configurations": 4,
        "entries": [],
        "why": "4 validated configurations are too few; at least 12 are needed",
    }


def test_published_results_are_fractions(numbers: dict[str, Any]) -> None:
    published = numbers["published"]
    assert [(row["micro"], row["mean_class"]) for row in published["rows"]] == [
        (micro and pytest.approx(micro), pytest.approx(mean_class))
        for micro, mean_class in [
            *((0.6251, 0.5489), (0.5786, 0.4696), (0.6756, 0.5926), (0.6266, 0.5530), (0.5930, 0.4970)),
            *((0.6770, 0.5973), (0.6365, 0.5634), (0.6009, 0.5099), (0.6860, 0.6054), (0.6597, 0.5702)),
            *((0.6365, 0.5634), (0.6356, 0.5634), (0.6330, 0.5500), (0.6147, 0.5113), (0.6251, 0.5366)),
            *((0.6659, 0.5944), (0.6958, 0.6284), (0.6973, 0.6309), (None, 0.7012), (0.8175, 0.76)),
        ]
    ]
    assert published["rows"][8] == {
        "model": "fused (-a)",
        "micro": pytest.approx(0.686),
        "mean_class": pytest.approx(0.6054),
        "on": "test clips of split 1",
        "source": "Lu et al.",
        "start": "Kinetics",
    }
    on = [row["on"] for row in published["rows"]]
    assert on == ["test clips of split 1"] * 9 + ["test clips, mean of the splits"] + ["test clips of split 1"] * 10
    assert published["sources"].keys() == {row["source"] for row in published["rows"]}
    assert published["ours"] == [
        {"model": "trial 00000", "micro": 0.85, "mean_class": 0.8, "on": f"validation clips: {VALIDATED_ON}"}
    ]
    assert (published["classes"], published["published_classes"], published["comparable"]) == (None, 106, None)


@pytest.mark.parametrize(("classes", "comparable"), [(106, True), (105, False)])
def test_an_evaluation_beside_the_published_results(root: Path, classes: int, comparable: bool) -> None:
    stream = {"stream": "rgb", "micro_accuracy": 0.6, "mean_class_accuracy": 0.5}
    evaluation: dict[str, Any] = {"split": 2, "clips_trained_on": 0, "streams": [stream], "classes": [{}] * classes}
    search = read_experiment(str(root))
    published = published_numbers(search, None, evaluation)
    assert published["ours"] == [
        {"model": "evaluated checkpoint, rgb", "micro": 0.6, "mean_class": 0.5, "on": "test clips of split 2"}
    ]
    assert (published["classes"], published["comparable"]) == (classes, comparable)
    published = published_numbers(search, None, {**evaluation, "clips_trained_on": 7})
    assert published["ours"][0]["on"] == "test clips of split 2; not a test: the model was trained on 7 of these clips"


def test_reproduction(numbers: dict[str, Any], root: Path) -> None:
    reproduce, folder = numbers["reproduce"], root.parent
    train = f"--data /nowhere/shards --storage {folder} --name six-final"
    assert reproduce["commands"] == [
        {"what": "start the search", "command": "tune-ego tune six.yaml --data /nowhere/shards"},
        {"what": "resume the search", "command": f"tune-ego resume {root}"},
        {"what": "export the best configuration", "command": f"tune-ego export {root} --out best.yaml"},
        {"what": "train and test the best configuration", "command": f"tune-ego train best.yaml {train}"},
        {"what": "write this report again", "command": f"tune-ego report {root} --data 'my shards'"},
    ]
    assert reproduce["versions"] == {
        "tune_ego of the search": __version__,
        "ray of the search": "2.60.0",
        "tune_ego of this report": __version__,
    }
    rest = {key: value for key, value in reproduce.items() if key not in ("commands", "versions")}
    assert rest == {
        "search_seed": 11,
        "trial_seeds": [0],
        "data": "/nowhere/shards",
        "data_settings": {"image_size": [320, 240], "flow": "dis"},
        "fingerprints": [
            {"file": "dataset.json", "sha256": "cannot be read now (FileNotFoundError)"},
            {"file": "clips.parquet", "sha256": "cannot be read now (FileNotFoundError)"},
        ],
        "space_source": "six.yaml",
        "space": SPACE,
        "overrides": {},
    }


def test_no_trial_yet(tmp_path: Path) -> None:
    """Every part is there, and none of them divides by zero."""
    write_six_trials(tmp_path / "six", alive=False)
    (tmp_path / "six" / "trials.json").unlink()
    numbers = numbers_of(tmp_path / "six")
    overview = numbers["experiment"]
    assert overview["state"] == "empty: no trial has been started, or none can be read"
    assert (overview["budget_iterations"], overview["validation"]) == (100, "unknown: there is no trial")
    assert (overview["trials_drawn"], overview["states"]) == (0, {})
    assert (numbers["answer"], numbers["trials"]) == (None, [])
    assert numbers["choices"] == {"even_iteration": None, "parameters": []}
    assert numbers["curves"]["trials"] == [] == numbers["curves"]["best"]
    assert (numbers["curves"]["not_logged"], numbers["curves"]["streams"]) == (list(SERIES.values()), 0)
    assert numbers["published"]["ours"] == []
    stopping = numbers["stopping"]
    assert (stopping["budget_iterations"], stopping["rungs"], stopping["stopped"]) == (0, [], [])
    assert (stopping["trials_counted"], stopping["saved_iterations"], stopping["saved_share"]) == (0, 0, None)
    assert numbers["cost"] == {
        "gpus_per_trial": 0.5,
        "workers_per_trial": 1,
        "trial_hours": 0,
        "gpu_hours": 0,
        "worker_hours": 0,
        "mean_trial_hours": None,
        "longest_trial_hours": None,
        "median_clips_per_second": None,
    }
    write_json(tmp_path / "six" / "trials.json", {})
    assert numbers_of(tmp_path / "six")["experiment"]["state"].startswith("empty")
