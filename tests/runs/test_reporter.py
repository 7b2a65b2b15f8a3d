"""The files that a worker writes while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.errors import StorageError
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.results import experiment
from tune_ego.results.checkpoint_files import checkpoint_iterations, checkpoint_uri
from tune_ego.runs import reporter
from tune_ego.runs.job import Job
from tune_ego.runs.reporter import Reporter
from tune_ego.training import checkpoint
from tune_ego.training.checkpoint import Origin
from tune_ego.training.trainer import Trainer

METRICS = {"iteration": 2, experiment.METRIC: 0.5}


@pytest.fixture(autouse=True)
def _told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray is not there to be told."""
    monkeypatch.setattr(Reporter, "_report_to_ray", staticmethod(lambda metrics: None))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Checkpoints are written once it is open."""
    opened = threading.Event()

    def write(*arguments: Any) -> None:
        assert opened.wait(30)
        checkpoint.write_checkpoint(*arguments)

    monkeypatch.setattr(reporter, "write_checkpoint", write)
    yield opened
    opened.set()


def a_reporter(run: Path, *, final: bool) -> Reporter:
    config = tiny_config()
    return Reporter(Job(config, "", str(run), 0, "", final), 0, FeedPlan.from_config("", config, 1, 0))


def trained(iteration: int) -> Trainer:
    trainer = Trainer(tiny_config(streams="rgb"), Origin(["a", "b"], (48, 36), "dis"), torch.device("cpu"))
    trainer.iteration = iteration
    return trainer


def test_a_final_run_goes_on_while_its_checkpoint_is_written(tmp_path: Path, gate: threading.Event) -> None:
    report, trainer = a_reporter(tmp_path, final=True), trained(2)
    saved = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    report(METRICS, trainer.checkpoint())
    assert experiment.read_metrics(str(tmp_path)) == [METRICS] and checkpoint_iterations(str(tmp_path)) == []
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter.add_(1)
    gate.set()
    report.wait()
    (iteration,) = checkpoint_iterations(str(tmp_path))
    written = checkpoint.read_checkpoint(checkpoint_uri(str(tmp_path), iteration))["model"]
    assert iteration == 2 and all(torch.equal(value, saved[name]) for name, value in written.items())


@pytest.mark.parametrize(("final", "metrics"), [(False, METRICS), (True, None)], ids=["a trial's", "after a notice"])
def test_what_may_be_the_last_word_is_written_before_the_run_goes_on(
    tmp_path: Path, gate: threading.Event, final: bool, metrics: dict[str, Any] | None
) -> None:
    report, content = a_reporter(tmp_path, final=final), trained(2).checkpoint()
    thread = threading.Thread(target=report, args=(metrics, content))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    gate.set()
    thread.join(30)
    assert checkpoint_iterations(str(tmp_path)) == [2]


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    report = a_reporter(tmp_path, final=True)
    report(METRICS, trained(2).checkpoint())
    thread = threading.Thread(target=report, args=({**METRICS, "iteration": 4}, trained(4).checkpoint()))
    thread.start()
    thread.join(0.3)
    assert thread.is_alive()
    gate.set()
    thread.join(30)
    report.wait()
    assert checkpoint_iterations(str(tmp_path)) == [2, 4]


def fails(*arguments: Any) -> None:
    raise StorageError("the disk is full")


def test_a_failed_write_is_heard_of_at_the_next_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reporter, "write_checkpoint", fails)
    report = a_reporter(tmp_path, final=True)
    report(METRICS, trained(2).checkpoint())
    assert report.writing is not None and isinstance(report.writing.exception(30), StorageError)
    with pytest.raises(StorageError, match="the disk is full"):
        report({"iteration": 3}, None)


def test_a_failed_write_does_not_hide_why_training_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(reporter, "write_checkpoint", fails)
    report = a_reporter(tmp_path, final=True)
    report(METRICS, trained(2).checkpoint())
    report.end()
    assert "its last checkpoint was not written: StorageError('the disk is full')" in " ".join(
        capsys.readouterr().out.split()
    )


def test_an_error_in_training_waits_for_the_checkpoint(tmp_path: Path, gate: threading.Event) -> None:
    report = a_reporter(tmp_path, final=True)
    report(METRICS, trained(2).checkpoint())
    threading.Timer(0.3, gate.set).start()
    report.end()
    assert checkpoint_iterations(str(tmp_path)) == [2]


@pytest.mark.parametrize("final", [False, True], ids=["a trial", "a final run"])
def test_the_metrics_of_a_checkpoint_are_on_disk_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, final: bool
) -> None:
    """A run that dies between the two writes resumes from a checkpoint whose lines are all there."""
    there: list[Any] = []

    def write(run: str, content: dict[str, Any], keep: Any) -> None:
        there.append((content["iteration"], experiment.read_metrics(run)))

    monkeypatch.setattr(reporter, "write_checkpoint", write)
    report = a_reporter(tmp_path, final=final)
    lines: list[dict[str, Any]] = [{"iteration": 1}, METRICS, {"iteration": 3}, {**METRICS, "iteration": 4}]
    for line in lines:
        report(line, trained(line["iteration"]).checkpoint() if experiment.METRIC in line else None)
    report.wait()
    assert there == [(2, lines[:2]), (4, lines)]


def test_a_resumed_run_forgets_what_was_logged_after_its_checkpoint_and_reports_the_validations_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported: list[int] = []
    monkeypatch.setattr(Reporter, "_report_to_ray", staticmethod(lambda metrics: reported.append(metrics["iteration"])))
    lines = [{"iteration": n, **({experiment.METRIC: 0.1} if n % 2 == 0 else {})} for n in range(1, 8)]
    for final, expected in ((False, [2, 4]), (True, [])):
        experiment.write_metrics(str(tmp_path), lines)
        report = a_reporter(tmp_path, final=final)
        report.begin(5)
        assert report.lines == lines[:5] and reported == expected
        reported.clear()


def test_a_worker_of_another_rank_reports_and_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[int] = []
    monkeypatch.setattr(Reporter, "_report_to_ray", staticmethod(lambda metrics: reported.append(metrics["iteration"])))
    config = tiny_config()
    report = Reporter(Job(config, "", str(tmp_path), 0, "", False), 1, FeedPlan.from_config("", config, 1, 0))
    report({"iteration": 1}, None)
    report(METRICS, trained(2).checkpoint())
    assert reported == [2] and not list(tmp_path.iterdir())
