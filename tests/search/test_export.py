"""The exported configuration and its provenance."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import COMMAND
from tests.test_cli import call
from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.config_io import load_config, override_config
from tune_ego.results.experiment import METRIC, write_metrics
from tune_ego.results.trial_records import TrialRecords, run_folder
from tune_ego.search.export import export_best

SPACE = """
base: {train: {iterations: 30, validate_every: 10}, data: {fold: 4, split: 2, validation: by_session}}
space:
  model.stam_depth: {choice: [1, 2, 3]}
samples: 3
"""
SPEC = {
    "space_source": "s.yaml",
    "overrides": {"seed": 5},
    "samples": 3,
    "trials": 3,
    "data": "/data/shards",
    "data_settings": {},
    "seed": 9,
    "version": "0.0.1",
    "ray": "2.0",
}


def write_search(root: Path, repeats: int, accuracies: dict[str, list[float]], text: str = SPACE) -> None:
    """Trials validated at 10, 20, ...; one without validations failed."""
    storage.write_json(root / "experiment.json", {"space": f"{text}repeats: {repeats}\n", **SPEC})
    records = TrialRecords(str(root))
    for name, values in accuracies.items():
        number, _, repeat = name.partition("-")
        draw = {"trial": name, "repeat": int(repeat or 0), "sampled": {"model.stam_depth@0": int(number) + 1}}
        records.add([draw])
        records.note(name, *(("finished", "") if values else ("failed", "nan")))
        lines: list[dict[str, Any]] = [{"iteration": 10 * n, METRIC: value} for n, value in enumerate(values, start=1)]
        if values and len(values) < 3:
            lines.append({"iteration": 30})
        write_metrics(run_folder(str(root), name), lines)


def test_the_best_configuration_is_exported_with_where_it_came_from(tmp_path: Path) -> None:
    accuracies: dict[str, list[float]] = {
        "00000-0": [0.9],
        "00000-1": [0.1],
        "00001-0": [0.25, 0.5, 0.5],
        "00001-1": [0.75, 0.5],  # the best mean: 0.625
        "00002-0": [],
        "00002-1": [0.95],
    }
    write_search(tmp_path, 2, accuracies)
    out = tmp_path / "best.yaml"
    best = export_best(str(tmp_path), str(out))
    assert (best.id, best.accuracy) == ("00001", 0.625)
    assert out.read_text().splitlines()[:2] == [
        f"# The best of 6 trials of {tmp_path}.",
        "# Train it: tune-ego train THIS --data SHARDS --storage DIR --name NAME",
    ]
    changes: dict[str, Any] = {"data.fold": 4, "data.split": 2, "data.validation": "by_session", "seed": 5}
    changes |= {"train.iterations": 3000, "train.validate_every": 10, "model.stam_depth": 2}  # the paper's budget
    assert load_config(out) == override_config(Config(), changes, "t")
    content = yaml.safe_load(out.read_text())
    provenance = content.pop("provenance")
    assert list(content) == list(Config.model_fields)
    assert provenance.pop("standard_deviation") == pytest.approx(0.125 * 2**0.5)  # of 0.5 and 0.75
    assert provenance == {
        "experiment": str(tmp_path),
        "trial": "00001",
        METRIC: 0.625,
        "repeats": [
            {"trial": "00001-0", METRIC: 0.5, "at_iteration": 20, "seed": 5},
            {"trial": "00001-1", METRIC: 0.75, "at_iteration": 10, "seed": 6},
        ],
        "trial_iterations": 30,
        "validation": "by_session fold 4 of split 2",
        "failed": {"00002-0": "nan"},
        "trials": {"finished": 5, "failed": 1},
        "data": "/data/shards",
        "search_seed": 9,
        "searched_with": "tune_ego 0.0.1, ray 2.0",
        "exported_with": f"tune_ego {__version__}",
    }


def test_a_repeat_without_a_validation_is_left_out_and_one_alone_has_no_deviation(tmp_path: Path) -> None:
    write_search(tmp_path, 2, {"00000-0": [], "00000-1": [0.5]})
    assert export_best(str(tmp_path), str(tmp_path / "best.yaml")).accuracy == 0.5
    provenance = yaml.safe_load((tmp_path / "best.yaml").read_text())["provenance"]
    assert provenance["repeats"] == [{"trial": "00000-1", METRIC: 0.5, "at_iteration": 10, "seed": 6}]
    assert "standard_deviation" not in provenance


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # A horizon that ends before the final run becomes that run's; a longer one stays.
        ("{name: cosine, horizon: 2999, floor: 0.25}", {"horizon": None, "floor": 0.25}),
        ("{name: cosine, horizon: 30}", {"horizon": None}),
        ("{name: cosine}", {"horizon": None}),
        ("{name: cosine, horizon: 3000}", {"horizon": 3000}),
        ("{name: cosine, horizon: 5000}", {"horizon": 5000}),
        ("{name: plateau, patience: 2}", {"patience": 2}),
        ("{name: multistep, milestones: [5]}", {"milestones": [5]}),
    ],
)
def test_the_schedule_is_laid_out_for_the_final_run(tmp_path: Path, schedule: str, expected: dict[str, Any]) -> None:
    text = SPACE.replace("data: {fold", f"schedule: {schedule}, data: {{fold")
    write_search(tmp_path, 1, {"00000": [0.5]}, text)
    export_best(str(tmp_path), str(tmp_path / "best.yaml"))
    content = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert expected.items() <= content["schedule"].items()
    assert load_config(tmp_path / "best.yaml").horizon == (expected.get("horizon") or 3000)


def test_a_pipe_or_the_standard_output_gets_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe stays one."""
    search, pipe = str(tmp_path / "search"), tmp_path / "pipe"
    write_search(tmp_path / "search", 1, {"00000": [0.5]})
    export_best(search, str(tmp_path / "best.yaml"))
    expected = (tmp_path / "best.yaml").read_text()
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    assert call(monkeypatch, "export", search, "--out", str(pipe)) == 0
    assert os.read(reader, 1 << 16).decode() == expected and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.yaml", "pipe", "search"]
    command = [sys.executable, "-c", COMMAND, "export", search, "--out", "/dev/stdout"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert printed.startswith(expected) and printed[len(expected) :].startswith("/dev/stdout: trial 00000, ")
