"""The `demo` command: all steps from clips to report on synthetic data, in one folder, on one machine."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tune_ego import storage
from tune_ego.cluster import ray_session
from tune_ego.config_io import load_config, override_config
from tune_ego.console import console, heading, percent, print_table
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.synthetic import synthesize
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import evaluate
from tune_ego.evaluation.tables import show
from tune_ego.prediction.predict import PredictionSettings
from tune_ego.prediction.write import predict_files
from tune_ego.report.write import write_report
from tune_ego.results.experiment import METRIC, Configuration, Experiment, Trial
from tune_ego.results.tables import config_value, trial_table
from tune_ego.runs.final import train_final
from tune_ego.search import export
from tune_ego.search.tune import start_search

IMAGE_SIZE = (96, 72)
"""Width and height of the images in the shards, pixels."""
NOUNS, CLIPS = 3, 360
_UNSEEN_CLIPS = 45
"""Clips of two sessions; the first one, of 36 clips, is the untrimmed video."""
DEMO_ITERATIONS = 180
FINAL_CHANGES = {
    "train.iterations": DEMO_ITERATIONS,
    "train.validate_every": 45,
    "schedule.name": "multistep",  # a run this short needs a lower learning rate at its end
    "schedule.milestones": [135],
    "compute.cpus_per_worker": 1.5,  # alone on the machine: two threads
}
"""Keys of the best configuration that the final run changes."""


def run_demo(folder: str, seed: int) -> dict[str, Any]:
    """Synthesize, prepare, tune, export, train, evaluate, report and predict.

    Args:
        folder: Folder for all files; empty or absent.
        seed: Seed of the clips, the search and the training.

    Returns:
        Content of `summary.json` in the folder.

    Raises:
        UserError: The folder is not empty.
    """
    root = Path(storage.absolute(folder))
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: the folder is not empty; choose another with --out")
    egtea, shards, best_file = (str(root / name) for name in ("egtea", "shards", "best.yaml"))
    seconds: dict[str, float] = {}

    @contextmanager
    def step(name: str, title: str) -> Iterator[None]:
        """Print a heading and time a step of the demo."""
        heading(f"{len(seconds) + 1}. {title}")
        start = time.monotonic()
        yield
        seconds[name] = round(time.monotonic() - start, 1)

    with step("synthesize", "synthesize: clips, annotations and gaze in EGTEA's format"):
        synthesize(egtea, nouns=NOUNS, clips=CLIPS, seconds=1.0, size=(128, 96), seed=seed)
    with ray_session():
        with step("prepare", "prepare: frames, optical flow and gaze into Parquet shards"):
            prepare(egtea, shards, Settings(IMAGE_SIZE))
        with step("tune", "tune: SGD and Ranger with two learning rates each, with ASHA"):
            search = start_search("demo", shards, str(root / "search"), {}, seed, 2, None)
        with step("export", "export: the best configuration"):
            best = export.export_best(search.root, best_file)
            print_table("", ["", ""], [["trial", best.id], ["in", best_file]])
        with step("train", f"train: the final run, {DEMO_ITERATIONS} iterations"):
            config = override_config(load_config(best_file), FINAL_CHANGES, best_file)
            train_final(config, shards, str(root / "final"), None)
    with step("evaluate", "evaluate: the test clips of split 1"):
        evaluation = evaluate(str(root / "final"), shards, 1)
    with step("report", "report: the results as one page"):
        write_report(search.root, str(root / "report.html"), str(root / "final"), data=shards)
    with step("predict", "predict: the actions in an untrimmed video of another session"):
        detection = _detect(root, seed)
    summary = {**_summarize(search, best, evaluation, seconds, seed), "detection": detection}
    storage.write_json(str(root / "summary.json"), summary)
    _print_summary(root, summary, search)
    return summary


def _detect(root: Path, seed: int) -> dict[str, Any]:
    """Detect the actions in a session of another synthetic data set, and return the scores of the detection."""
    unseen = root / "unseen"
    with console.capture():
        synthesize(unseen, nouns=NOUNS, clips=_UNSEEN_CLIPS, seconds=1.0, size=(128, 96), sessions=True, seed=seed + 1)
    video = min((unseen / "videos").iterdir())
    truth = [str(file) for file in sorted((unseen / "action_annotation").glob("*_split1.txt"))]
    scores = predict_files(
        str(root / "final"),
        [str(video)],
        str(root / "prediction"),
        PredictionSettings(),
        truth,
        overlay=False,
    )
    assert scores is not None
    return scores


def _summarize(
    search: Experiment, best: Configuration, evaluation: dict[str, Any], seconds: dict[str, float], seed: int
) -> dict[str, Any]:
    """Return the content of `summary.json`; `seconds` maps the name of a step to its duration."""
    return {
        "chance": evaluation["chance"],
        "evaluation": evaluation,
        "trials": [
            {
                "trial": t.id,
                "state": t.state,
                "iteration": t.iteration,
                METRIC: t.accuracy,
                "configuration": _searched_values(search, t),
            }
            for t in search.trials
        ],
        "best": {"trial": best.id, METRIC: best.accuracy, "configuration": _searched_values(search, best)},
        "seconds": {**seconds, "total": round(sum(seconds.values()), 1)},
        "seed": seed,
    }


def _searched_values(search: Experiment, trial: Trial | Configuration) -> dict[str, str]:
    """Return the value of each searched parameter."""
    return {key: config_value(trial.config, key) for key in search.space.searched_keys}


def _print_summary(root: Path, summary: dict[str, Any], search: Experiment) -> None:
    best, fused = summary["best"], summary["evaluation"]["fused"]["mean_class_accuracy"]
    chosen = ", ".join(f"{key} {value}" for key, value in best["configuration"].items())
    heading("Summary")
    print_table("Trials", *trial_table(search))
    show(summary["evaluation"])
    rows = [
        ["best values", chosen],
        ["validation mean class accuracy", percent(best[METRIC])],
        [
            "test mean class accuracy, fused",
            f"{percent(fused)}, {fused / summary['chance']:.1f} times chance ({percent(summary['chance'])})",
        ],
        ["seconds", ", ".join(f"{name} {value:g}" for name, value in summary["seconds"].items())],
        ["shards", str(root / "shards")],
        ["search", search.root],
        ["best configuration", str(root / "best.yaml")],
        ["weights", str(root / "final" / "final" / "model.pt")],
        ["summary as JSON", str(root / "summary.json")],
        ["report as HTML", str(root / "report.html")],
        ["detected actions as HTML", str(root / "prediction")],
    ]
    print_table("", ["", ""], rows)
