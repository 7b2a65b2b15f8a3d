"""An experiment's folder with made-up results, written by the writers of the real one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.results import experiment, trial_records
from tune_ego.results.decisions import Decision, write_decisions
from tune_ego.results.experiment import METRIC
from tune_ego.results.trial_records import TrialRecords
from tune_ego.search_space import SearchSpace
from tune_ego.space_io import find_space, load_space

CLASSES = 106


def write_experiment(root: Path, trials: int = 8, space_name: str = "full", seed: int = 0) -> SearchSpace:
    """A search of `trials` trials that has ended: a few failed, ASHA stopped the worse half at each rung."""
    space = load_space(find_space(space_name))
    spec = {
        "space": space.text,
        "space_source": space.source,
        "overrides": {},
        "samples": trials,
        "trials": trials,
        "data": "/nowhere/shards",
        "data_settings": {"image_size": [320, 240], "flow": "dis"},
        "seed": seed,
        "concurrent": None,
        "gpus_per_worker": 1.0,
        "version": __version__,
        "ray": "2.60.0",
        "started": "2026-11-20T08:00:00+00:00",
        "command": "tune-ego tune full --data /nowhere/shards --storage /nowhere --name search",
    }
    storage.write_json(str(root / experiment.EXPERIMENT_FILE), spec)
    records = TrialRecords(str(root))
    random = np.random.default_rng(seed)
    draws: list[dict[str, Any]] = [
        {"trial": f"{n:05d}", "repeat": 0, "sampled": space.draw(seed, n)} for n in range(trials)
    ]
    records.add(draws)
    seen: dict[int, list[float]] = {}
    order = 0
    for number, draw in enumerate(draws):
        name, config = draw["trial"], space.config(draw["sampled"])
        lines, decisions = _run(config, space, seen, random, name, order)
        order += len(decisions)
        run = trial_records.run_folder(str(root), name)
        if trials > 4 and number % 25 == 3:
            lines, decisions = lines[:2], []
            reason = "iteration 21: action loss of the rgb stream is nan; a lower optimizer.lr may help"
            experiment.write_failure(run, experiment.Failure(reason, final=True))
            records.note(name, "failed", reason)
        else:
            records.note(name, "stopped" if decisions[-1].action == "STOP" else "finished")
        experiment.write_metrics(run, lines)
        write_decisions(str(root), name, decisions)
    return space


def _run(
    config: Config, space: SearchSpace, seen: dict[int, list[float]], random: np.random.Generator, name: str, order: int
) -> tuple[list[dict[str, Any]], list[Decision]]:
    """(metrics, decisions) of a trial that learns the better, the nearer its learning rate is to a good one."""
    good = 0.03 if config.optimizer.name == "sgd" else 1.5e-3
    level = 0.55 * math.exp(-((math.log(config.optimizer.lr / good) / 2.5) ** 2)) + 0.02 * config.model.stam_depth
    lines: list[dict[str, Any]] = []
    decisions: list[Decision] = []
    settings = space.scheduler
    rung = settings.grace
    for iteration in range(config.train.log_every, config.train.iterations + 1, config.train.log_every):
        done = 1 - math.exp(-iteration / 400)
        noise = float(random.normal(0, 0.03))
        loss = 9.3 - 7 * level * done / 0.6 + 3 * noise
        line = {
            "iteration": iteration,
            "train_loss": loss,
            "action_loss": loss - 0.05,
            "gaze_loss": 0.5 - 0.2 * done + noise / 5,
            "learning_rate": config.optimizer.lr * 0.5 ** (iteration // 600),
            "clips_per_second": 55.0 + 20 * noise,
            "report_seconds": 0.25,
        }
        if iteration % config.train.validate_every == 0:
            accuracy = min(max(level * done + noise, 0.0), 1.0)
            line |= {METRIC: accuracy, "val_micro_accuracy": min(1.0, accuracy * 1.1), "validation_seconds": 21.0}
            line |= {f"{METRIC}_{stream}": accuracy * part for stream, part in (("rgb", 0.9), ("flow", 0.7))}
            line[f"{METRIC}_fused"] = accuracy
            stop = False
            if iteration == rung and iteration < config.train.iterations:
                others = seen.setdefault(rung, [])
                others.append(accuracy)
                rung *= settings.reduction
                stop = accuracy < float(np.quantile(others, 1 - 1 / settings.reduction))
            action = "STOP" if stop else "CONTINUE"
            decisions.append(Decision(order + len(decisions), name, iteration, accuracy, action))
        lines.append(line)
        if decisions and decisions[-1].action == "STOP":
            break
    return lines, decisions


def write_evaluation(file: Path, classes: int = CLASSES, seed: int = 0) -> dict[str, Any]:
    """An `evaluation.json` of 106 classes, as unevenly frequent as EGTEA's."""
    random = np.random.default_rng(seed)
    clips = [int(c) for c in np.maximum(1, 170 * np.exp(-np.arange(classes) / 22)).astype(int)]
    content: dict[str, Any] = {
        "split": 1,
        "trained_on_split": 1,
        "clips": sum(clips),
        "clips_trained_on": 0,
        "chance": 1 / classes,
        "iteration": 3000,
        "checkpoint": "/nowhere/final/final/model.pt",
        "attention": {
            name: {
                "auc_judd": 0.8 + 0.03 * n,
                "auc": 0.7 + 0.03 * n,
                "nss": 1.1 + n / 10,
                "f1": 0.3,
                "precision": 0.2,
                "recall": 0.6,
                "threshold": 0.4,
                "maps": 4000,
                "frames": 31000,
            }
            for n, name in enumerate(("rgb", "flow", "centre"))
        },
        "classes": [
            {"action": f"Verb{n % 19} the noun{n % 53} of class {n}", "clips": count} for n, count in enumerate(clips)
        ],
    }
    for name, right in (("rgb", 0.55), ("flow", 0.45), ("fused", 0.62)):
        counts = np.zeros((classes, classes), int)
        for true, count in enumerate(clips):
            hit = random.binomial(count, right)
            counts[true, true] += hit
            for wrong in random.choice([*range(min(12, classes)), (true + 1) % classes], count - hit):
                counts[true, wrong] += 1
        recall = [float(counts[n, n] / counts[n].sum()) for n in range(classes)]
        content[name] = {
            "micro_accuracy": float(np.trace(counts) / counts.sum()),
            "mean_class_accuracy": float(np.mean(recall)),
            "verb_accuracy": 0.7,
            "noun_accuracy": 0.66,
            "recall": recall,
            "confusion": counts.tolist(),
        }
    storage.write_json(str(file), content)
    return content
