"""The lines that `train` prints while a run goes on, from its files; no Ray runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tune_ego.results.experiment import METRIC, write_metrics
from tune_ego.runs import final


def line(iteration: int, accuracy: float | None = None) -> dict[str, float]:
    values = {"iteration": iteration, "train_loss": 1.5, "learning_rate_rgb": 0.1, "clips_per_second": 8.0}
    return values if accuracy is None else {**values, METRIC: accuracy}


def test_a_resumed_run_prints_its_new_validations_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(final, "_READ_EVERY", 0.01)
    before = [line(1), line(2, 0.25), line(4, 0.5)]
    write_metrics(str(tmp_path), before)
    with final._print_validations(tiny_config(), str(tmp_path)):
        write_metrics(str(tmp_path), [*before, line(5), line(6, 0.75)])
    printed = [text for text in capsys.readouterr().out.splitlines() if "iteration" in text]
    assert printed == [
        "  iteration 6: loss 1.500, learning rate 0.1, validation mean class accuracy 75.0 %, 8.0 clips/s"
    ]
