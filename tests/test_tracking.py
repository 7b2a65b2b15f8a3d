"""Trackers: what is written is read back by their own means."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import tiny_config
from tests.test_search import write_space
from tune_ego import experiment
from tune_ego.errors import UserError
from tune_ego.experiment import METRIC, Trial
from tune_ego.tracking import flat, make_trackers, run_tracked, tracked
from tune_ego.tune import start_search


def runs_of(client: Any, name: str) -> dict[str, Any]:
    (one,) = [known for known in client.search_experiments() if known.name == name]
    return {run.info.run_name: run for run in client.search_runs([one.experiment_id])}


def logged(client: Any, run: Any, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def test_mlflow_and_tensorboard_have_both_trials_of_a_search(
    tmp_path: Path, shards: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = str(tmp_path / "search")
    found = start_search(
        write_space(tmp_path, grace=6), shards, root, {}, 0, None, None, track=["mlflow", "tensorboard"]
    )
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    runs = runs_of(client, "search")
    assert runs.keys() == {trial.id for trial in found.trials} and len(runs) == 2
    for trial in found.trials:
        assert runs[trial.id].info.status == "FINISHED"
        assert runs[trial.id].data.params["optimizer.lr"] == str(trial.config.optimizer.lr)
        for key in ("train_loss", METRIC):
            lines = [(line["iteration"], line[key]) for line in trial.metrics if key in line]
            assert logged(client, runs[trial.id], key) == lines
        check_event_file(f"{root}/tensorboard/{trial.id}", trial)


def check_event_file(folder: str, trial: Trial) -> None:
    """Scalars, pictures of attention and the hyper-parameters, read back by TensorBoard."""
    events = EventAccumulator(folder, {"scalars": 0, "images": 0})
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert [step for step, _ in losses] == [line["iteration"] for line in trial.metrics]
    assert [loss for _, loss in losses] == pytest.approx([line["train_loss"] for line in trial.metrics])
    pictures = events.Images("attention")
    assert [event.step for event in pictures] == [2, 4, 6]
    assert (pictures[0].width, pictures[0].height) == (3 * 112, 3 * 112)  # 3 clips; the frame, rgb and flow
    assert events.PluginTagToContent("hparams").keys() == {
        "_hparams_/experiment",
        "_hparams_/session_start_info",
        "_hparams_/session_end_info",
    }


def test_mlflow_goes_on_with_the_run_of_an_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = str(tmp_path / "search")
    lines = [{"iteration": n, "train_loss": 1.0 / n} for n in range(1, 5)]
    for state, last, status in (("interrupted", 2, "KILLED"), ("finished", 4, "FINISHED")):
        trial = Trial("00000", state, f"{root}/runs/00000", {}, 0, tiny_config(), lines[:last])
        with tracked(make_trackers(["mlflow"], root), lambda trial=trial: [trial]):  # type: ignore[misc]
            pass
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
        (run,) = runs_of(client, "search").values()
        assert run.info.status == status
        assert logged(client, run, "train_loss") == [(n, 1.0 / n) for n in range(1, last + 1)]


def test_wandb_keeps_a_final_run_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # where nobody has logged in: it must not ask
    config, run = tiny_config(), str(tmp_path / "run")
    with run_tracked(["wandb"], config, run):
        experiment.write_metrics(run, [{"iteration": n, "train_loss": 1 / n, METRIC: 0.5} for n in (1, 2, 3)])
    (written,) = Path(run).glob("wandb/offline-run-*/*.wandb")
    for _ in range(100):  # its own process writes it
        content = written.read_bytes()
        if b"train_loss" in content and b"optimizer" in content:
            return
        time.sleep(0.1)
    pytest.fail(f"not in {written}")


def test_tensorboard_has_each_line_once_after_a_second_start(tmp_path: Path) -> None:
    config, run = tiny_config(), str(tmp_path / "run")
    for upto in (3, 5):
        with run_tracked(["tensorboard"], config, run):
            experiment.write_metrics(run, [{"iteration": n, "train_loss": 1 / n} for n in range(1, upto + 1)])
    events = EventAccumulator(f"{run}/tensorboard/run", {"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3, 4, 5]


def test_a_tracker_that_fails_is_told_of_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Broken:
        def begin(self, trial: Trial) -> None:
            raise ConnectionError("no server")

        def log(self, run: None, lines: list[dict[str, float]]) -> None: ...

        def end(self, run: None, state: str) -> None: ...

    trials = [Trial(str(n), "running", "", {}, 0, tiny_config(), [{"iteration": 1}]) for n in (1, 2)]
    with tracked({"mlflow": Broken()}, lambda: trials):
        pass
    assert capsys.readouterr().out.count("mlflow: no server; training goes on") == 1


def test_every_value_of_a_configuration_has_its_dotted_key() -> None:
    values = flat(tiny_config())
    assert (values["model.width"], values["optimizer.name"], values["seed"]) == (0.05, "ranger", 0)
    assert not any(isinstance(value, dict) for value in values.values())


def test_unknown_trackers_and_places_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="--track mlfow: expected one of tensorboard, mlflow, wandb"):
        make_trackers(["mlfow"], str(tmp_path))
    with pytest.raises(UserError, match="--track mlfow"):  # before anything is written
        start_search("demo", "absent", str(tmp_path / "search"), {}, 0, None, None, track=["mlfow"])
    assert not (tmp_path / "search").exists()
    pytest.importorskip("mlflow")
    with pytest.raises(UserError, match="no place for its database; set MLFLOW_TRACKING_URI"):
        make_trackers(["mlflow"], "s3://bucket/search")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    with pytest.raises(UserError, match="--track mlflow: "):
        make_trackers(["mlflow"], str(tmp_path))
