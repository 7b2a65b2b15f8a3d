"""Test of all finished trials of a search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.searches import KnownSearch
from tune_ego.cli import app
from tune_ego.errors import UserError
from tune_ego.evaluation.trials import evaluate_trials
from tune_ego.report.repeats import _read_tests, _tests
from tune_ego.results.reading import read_experiment


def test_each_finished_trial_is_tested_once(
    known_search: KnownSearch,
    shards: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of the known search one trial has finished; its RGB stream answers one class whatever it sees."""
    root = known_search.copy(tmp_path)
    app(["evaluate", root, "--data", shards], standalone_mode=False)
    shown = capsys.readouterr().out
    assert "00000: trial 1 of 1" in shown and "Test mean class accuracy of the finished trials" in shown
    written = sorted(path.parent.name for path in Path(root).glob("runs/*/evaluation.json"))
    assert written == ["00000"]
    result = json.loads((Path(root) / "runs" / "00000" / "evaluation.json").read_text())
    assert (result["split"], result["iteration"]) == (1, 6)
    assert result["rgb"]["mean_class_accuracy"] == pytest.approx(1 / sum(row["clips"] > 0 for row in result["classes"]))
    trials = read_experiment(root).trials
    assert list(_tests(trials, _read_tests(trials))["test"].values()) == [result["fused"]["mean_class_accuracy"]]

    calls: list[tuple[Any, ...]] = []

    def note(*arguments: Any, **views: Any) -> dict[str, Any]:
        calls.append((*arguments, *views.values()))
        return result

    monkeypatch.setattr("tune_ego.evaluation.trials.evaluate", note)
    evaluate_trials(root, shards)
    evaluate_trials(root, shards, 1, 0.5)
    assert not calls and "00000: trial" not in capsys.readouterr().out
    evaluate_trials(root, shards, 2)
    evaluate_trials(root, shards, fusion_weight=0.25)
    (Path(root) / "runs" / "00000" / "evaluation.json").write_text("{")
    evaluate_trials(root, shards)
    run = str(Path(root) / "runs" / "00000")
    evaluate_trials(root, shards, crops=3, flips=True)
    assert calls == [
        (run, shards, 2, None, None, 1, False),
        (run, shards, None, None, 0.25, 1, False),
        (run, shards, None, None, None, 1, False),
        (run, shards, None, None, None, 3, True),
    ]


def test_a_search_without_finished_trials_and_options_of_one_checkpoint(
    known_search: KnownSearch, shards: str, tmp_path: Path
) -> None:
    root = known_search.copy(tmp_path)
    for option in (["--out", "x.json"], ["--compare"], ["--fusion-sweep"]):
        with pytest.raises(UserError, match="are for one checkpoint, not for a search"):
            app(["evaluate", root, "--data", shards, *option], standalone_mode=False)
    records = Path(root) / "trials.json"
    records.write_text(records.read_text().replace('"finished"', '"pending"'))
    with pytest.raises(UserError, match="no trial has finished"):
        evaluate_trials(root, shards)
