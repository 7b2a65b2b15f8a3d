"""A search of seven trials by hand: one finished, one stopped, two running, one failed, one pending, one to come.

Its rungs are 20, 40 and 80 of 100 iterations. Every figure that a test expects of it is worked out from these lines.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.drivers import write_driver
from tune_ego import __version__

GIB = 1 << 30
SPACE = """
base:
  train: {iterations: 100, validate_every: 20, log_every: 10}
  compute: {workers: 4}
space:
  optimizer.name: {choice: [sgd, ranger]}
  train.batch_size: {choice: [40, 20]}
samples: 7
scheduler: {name: asha, grace: 20, reduction: 2}
"""
SPEC: dict[str, Any] = {
    "space": SPACE,
    "space_source": "six.yaml",
    "overrides": {},
    "samples": 7,
    "trials": 7,
    "data": "/nowhere/shards",
    "data_settings": {"image_size": [320, 240], "flow": "dis"},
    "seed": 11,
    "concurrent": None,
    "gpus_per_worker": 0.5,
    "version": __version__,
    "ray": "2.60.0",
    "started": "2026-11-20T08:00:00+00:00",
    "command": "tune-ego tune six.yaml --data /nowhere/shards",
}
# Trial -> (state, optimizer, batch size)
TRIALS = {
    "00000": ("finished", "sgd", 20),
    "00001": ("stopped", "ranger", 40),
    "00002": ("running", "ranger", 20),
    "00003": ("running", "sgd", 40),
    "00004": ("failed", "sgd", 20),
    "00005": ("pending", "ranger", 20),
}
# Trial -> lines of (iteration, training loss, clips/s, seconds of reporting, seconds of validation, accuracy).
# The seconds of training between two lines are 10 iterations x batch size / clips/s.
LINES: dict[str, list[tuple[int, float, float, float, float | None, float | None]]] = {
    "00000": [  # training 20 + 4 + 5 + 4 + 6 x 2 = 45 s, validation 5 x 6 = 30 s, reporting 15 s: 90 s
        (10, 9.0, 10.0, 0.0, None, None),
        (20, 8.0, 50.0, 1.0, 6.0, 0.3),
        (30, 7.0, 40.0, 2.0, None, None),
        (40, 6.0, 50.0, 1.0, 6.0, 0.5),
        (50, 5.0, 100.0, 4.0, None, None),
        (60, 4.0, 100.0, 1.0, 6.0, 0.6),
        (70, 3.5, 100.0, 2.0, None, None),
        (80, 3.0, 100.0, 1.0, 6.0, 0.8),
        (90, 2.5, 100.0, 2.0, None, None),
        (100, 2.0, 100.0, 1.0, 6.0, 0.7),
    ],
    "00001": [  # training 20 + 3 x 10 = 50 s, validation 18 s, reporting 4 s: 72 s
        (10, 9.5, 20.0, 0.0, None, None),
        (20, 9.0, 40.0, 1.0, 9.0, 0.2),
        (30, 8.5, 40.0, 1.0, None, None),
        (40, 8.0, 40.0, 2.0, 9.0, 0.1),
        (50, 1.0, 40.0, 1.0, None, None),  # logged before the stop arrived: no part of the trial
    ],
    "00002": [  # training 20 + 8 + 3 x 5 = 43 s, validation 6 s, reporting 5 s: 54 s
        (10, 9.0, 10.0, 0.0, None, None),
        (20, 8.0, 25.0, 1.0, 2.0, 0.4),
        (30, 7.0, 40.0, 1.0, None, None),
        (40, 6.0, 40.0, 1.0, 4.0, 0.3),
        (50, 5.5, 40.0, 2.0, None, None),
    ],
    "00003": [  # training 20 + 3 x 5 = 35 s, validation 16 s, reporting 3 s: 54 s
        (10, 9.0, 20.0, 0.0, None, None),
        (20, 8.0, 80.0, 1.0, 10.0, 0.1),
        (30, 7.0, 80.0, 1.0, None, None),
        (40, 6.0, 80.0, 1.0, 6.0, 0.6),
    ],
    "00004": [  # training 10 + 8 = 18 s
        (10, 9.0, 20.0, 0.0, None, None),
        (20, 8.0, 25.0, 0.0, None, None),
    ],
    "00005": [],
}
# (trial, iteration, accuracy, action), in their order
DECISIONS = [
    ("00000", 20, 0.3, "CONTINUE"),
    ("00001", 20, 0.2, "CONTINUE"),
    ("00000", 40, 0.5, "CONTINUE"),
    ("00002", 20, 0.4, "CONTINUE"),
    ("00003", 20, 0.1, "CONTINUE"),
    ("00001", 40, 0.1, "STOP"),
    ("00000", 60, 0.6, "CONTINUE"),
    ("00002", 40, 0.3, "CONTINUE"),
    ("00000", 80, 0.8, "CONTINUE"),
    ("00003", 40, 0.6, "CONTINUE"),
    ("00000", 100, 0.7, "CONTINUE"),
]


def write_json(file: Path, content: object) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


def write_lines(run: Path, lines: list[dict[str, Any]]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def drive_elsewhere(root: Path) -> None:
    """Record a driver on another machine that is alive."""
    write_driver(root, elsewhere=True)


def _line(trial: str, values: tuple[int, float, float, float, float | None, float | None]) -> dict[str, Any]:
    iteration, loss, speed, reporting, validating, accuracy = values
    line: dict[str, Any] = {
        "iteration": iteration,
        "train_loss": loss,
        "clips_per_second": speed,
        "report_seconds": reporting,
    }
    if accuracy is not None:
        line |= {
            "val_mean_class_accuracy": accuracy,
            "val_mean_class_accuracy_rgb": round(accuracy - 0.1, 1),
            "val_mean_class_accuracy_flow": round(accuracy / 2, 2),
            "val_mean_class_accuracy_fused": accuracy,
            "val_micro_accuracy": round(accuracy + 0.05, 2),
            "validation_seconds": validating,
        }
    if trial == "00000":
        line |= {"learning_rate": 0.1, "learning_rate_rgb": 0.1}
        line["learning_rate_flow"] = 5e-5 if iteration == 30 else 0.1  # a rate that collapsed: 1e-3 of 0.1 is 1e-4
    memory = {("00002", 20): 6, ("00002", 50): 2, ("00003", 40): 4}.get((trial, iteration))
    return line if memory is None else {**line, "gpu_bytes": memory * GIB}


def write_six_trials(root: Path, alive: bool = True) -> Path:
    """Write the search's files into the folder `root` and return it."""
    write_json(root / "experiment.json", SPEC)
    records = {
        name: {
            "state": state,
            "reason": "out of memory" if state == "failed" else "",
            "repeat": 0,
            "sampled": {"optimizer.name@0": optimizer, "train.batch_size@0": batch},
        }
        for name, (state, optimizer, batch) in TRIALS.items()
    }
    write_json(root / "trials.json", records)
    for name, lines in LINES.items():
        write_lines(root / "runs" / name, [_line(name, line) for line in lines])
        made = [[order, *decision] for order, decision in enumerate(DECISIONS) if decision[0] == name]
        write_json(root / "runs" / name / "decisions.json", made)
    if alive:
        drive_elsewhere(root)
    return root
