"""Trackers: what is written is read back by their own means."""

from __future__ import annotations

import resource
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import tiny_config
from tests.searches import KnownSearch
from tune_ego.config_io import flatten
from tune_ego.errors import UserError
from tune_ego.results import experiment, tracking
from tune_ego.results.experiment import METRIC, Trial
from tune_ego.results.trackers import TensorBoard
from tune_ego.results.tracking import _Follower, check_trackers, make_trackers, run_tracked, tracked
from tune_ego.search.tune import start_search


def runs_of(client: Any, name: str) -> dict[str, Any]:
    (one,) = [known for known in client.search_experiments() if known.name == name]
    return {run.info.run_name: run for run in client.search_runs([one.experiment_id])}


def logged(client: Any, run: Any, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run.info.run_id, key))


def test_mlflow_and_tensorboard_have_the_trials_of_a_search(known_search: KnownSearch) -> None:
    """All lines of the trial that finished, and for each how it ended."""
    mlflow = pytest.importorskip("mlflow")
    found, root = known_search.read(), known_search.root
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
    runs = runs_of(client, "search")
    statuses = {name: run.info.status for name, run in runs.items()}
    assert statuses == {"00000": "FINISHED", "00001": "KILLED", "00002": "FAILED"}
    labels = {name: (run.data.params["label"], run.data.params["optimizer.lr"]) for name, run in runs.items()}
    assert labels == {"00000": ("right", "1e-12"), "00001": ("wrong", "1e-12"), "00002": ("diverges", "1e+30")}
    finished = found.trials[0]
    for key, count in (("train_loss", 6), (METRIC, 3)):
        lines = [(line["iteration"], line[key]) for line in finished.metrics if key in line]
        assert logged(client, runs["00000"], key) == lines and len(lines) == count
    check_event_file(f"{root}/tensorboard/00000", finished)


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


def test_tensorboard_has_each_line_once_after_a_full_disk(tmp_path: Path) -> None:
    """A limit on the size of files cuts a record, as a full disk does; the lines are written again afterwards."""
    trial = Trial("00000", "finished", str(tmp_path), {}, 0, tiny_config(), [])
    tracker = TensorBoard(str(tmp_path))
    run = tracker.begin(trial)
    lines = [{"iteration": n, "train_loss": 1.0 / n, METRIC: 0.1 * n} for n in range(1, 5)]
    tracker.log(run, lines[:2])
    (file,) = (tmp_path / "tensorboard" / "00000").iterdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.stat().st_size + 70, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            tracker.log(run, lines[2:])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    tracker.log(run, lines[2:])
    tracker.end(run, "finished")
    assert run.last == {METRIC: 0.4}
    events = EventAccumulator(str(file.parent), {"scalars": 0})
    events.Reload()
    values = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert values == [(n, pytest.approx(1 / n)) for n in range(1, 5)]


def test_a_damaged_picture_costs_tensorboard_no_metrics(tmp_path: Path) -> None:
    trial = Trial("00000", "finished", str(tmp_path / "run"), {}, 0, tiny_config(), [])
    tracker = TensorBoard(str(tmp_path))
    run = tracker.begin(trial)
    for iteration, content in ((1, b""), (2, b"\x89PNG\r\n\x1a\n damaged")):
        file = tmp_path / "run" / experiment.picture_file(iteration)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    tracker.log(run, [{"iteration": n, "train_loss": 1.0, METRIC: 0.5} for n in (1, 2, 3)])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "00000"), {"scalars": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("train_loss")] == [1, 2, 3]


def test_an_event_file_that_was_removed_begins_anew(tmp_path: Path) -> None:
    trial = Trial("00000", "finished", str(tmp_path), {}, 0, tiny_config(), [])
    tracker = TensorBoard(str(tmp_path))
    run = tracker.begin(trial)
    tracker.log(run, [{"iteration": 1, "train_loss": 1.0}])
    shutil.rmtree(tmp_path / "tensorboard")
    tracker.log(run, [{"iteration": 2, "train_loss": 0.5}])
    (file,) = (tmp_path / "tensorboard" / "00000").iterdir()
    file.write_bytes(b"")
    tracker.log(run, [{"iteration": 3, "train_loss": 0.25}])
    events = EventAccumulator(str(tmp_path / "tensorboard" / "00000"), {"scalars": 0})
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [(3, 0.25)]


def test_mlflow_goes_on_with_the_runs_of_an_earlier_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two trials, first interrupted after 2 lines: each value once, at its iteration, in the run of its own trial."""
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = str(tmp_path / "search")
    for last, states, statuses in (
        (2, ("interrupted", "running"), ("KILLED", "KILLED")),
        (4, ("finished", "failed"), ("FINISHED", "FAILED")),
    ):
        trials = [
            Trial(
                name,
                state,
                f"{root}/runs/{name}",
                {},
                0,
                tiny_config(seed=seed, optimizer__lr=lr),
                [{"iteration": 10 * n, "train_loss": loss / n, METRIC: n / 10} for n in range(1, last + 1)],
            )
            for name, state, seed, lr, loss in (
                ("00000", states[0], 3, 0.25, 1.0),
                ("00001", states[1], 4, 0.5, 6.0),
            )
        ]
        with tracked(make_trackers(["mlflow"], root), lambda trials=trials: trials):  # type: ignore[misc]
            pass
        client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")
        runs = runs_of(client, "search")
        assert sorted(runs) == ["00000", "00001"] and len(client.search_runs([runs["00000"].info.experiment_id])) == 2
        assert (runs["00000"].info.status, runs["00001"].info.status) == statuses
        assert (runs["00000"].data.tags["tune_ego.state"], runs["00001"].data.tags["tune_ego.state"]) == states
        params = [(runs[name].data.params["seed"], runs[name].data.params["optimizer.lr"]) for name in sorted(runs)]
        assert params == [("3", "0.25"), ("4", "0.5")]
        losses = [(10, 1.0), (20, 0.5), (30, 1 / 3), (40, 0.25)][:last]
        assert logged(client, runs["00000"], "train_loss") == losses
        assert logged(client, runs["00001"], "train_loss") == [(10, 6.0), (20, 3.0), (30, 2.0), (40, 1.5)][:last]
        assert logged(client, runs["00001"], METRIC) == [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.4)][:last]
        assert "iteration" not in runs["00000"].data.metrics


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
    """The files of the first start are removed, and no others."""
    config, run = tiny_config(), str(tmp_path / "run")
    folder = tmp_path / "run" / "tensorboard" / "run"
    folder.mkdir(parents=True)
    (folder / "events.out.tfevents.1.host").write_bytes(b"")
    (folder / "notes.txt").write_text("")
    for upto in (3, 4):
        with run_tracked(["tensorboard"], config, run):
            lines: list[dict[str, Any]] = [{"iteration": 5 * n, "train_loss": 2.0 / n} for n in range(1, upto + 1)]
            lines[1] |= {METRIC: 0.75, "val_loss": 1.5}
            lines[2] |= {METRIC: 0.25, "val_loss": 2.5}
            experiment.write_metrics(run, lines)
    names = {file.name for file in folder.iterdir()}
    assert "events.out.tfevents.1.host" not in names and "notes.txt" in names
    events = EventAccumulator(f"{run}/tensorboard/run", {"scalars": 0})
    events.Reload()
    scalars = {key: [(event.step, event.value) for event in events.Scalars(key)] for key in events.Tags()["scalars"]}
    assert scalars == {
        "train_loss": [(5, 2.0), (10, 1.0), (15, pytest.approx(2 / 3)), (20, 0.5)],
        METRIC: [(10, 0.75), (15, 0.25)],
        "val_loss": [(10, 1.5), (15, 2.5)],
    }


def test_tensorboard_s_table_has_a_trial_s_best_accuracy(tmp_path: Path) -> None:
    board = make_trackers(["tensorboard"], str(tmp_path))["tensorboard"]
    run = board.begin(Trial("00007", "running", str(tmp_path), {}, 0, tiny_config(), []))
    for n, accuracy in enumerate((0.25, 0.75, 0.5), start=1):
        board.log(run, [{"iteration": n, METRIC: accuracy}, {"iteration": 10 * n, "train_loss": 9.0}])
    assert run.last == {METRIC: 0.75} and run.folder == f"{tmp_path}/tensorboard/00007"
    board.end(run, "finished")


class Recorder:
    """A tracker that notes its calls."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def begin(self, trial: Trial) -> str:
        self.calls.append(("begin", trial.id))
        return f"run of {trial.id}"

    def log(self, run: str, lines: list[dict[str, float]]) -> None:
        self.calls.append(("log", run, lines))

    def end(self, run: str, state: str) -> None:
        self.calls.append(("end", run, state))


def test_each_line_is_handed_on_once_and_each_run_ended_once() -> None:
    """New lines alone, and numbers alone; a trial without a line has no run; at the last look every run ends."""

    def trial(name: str, state: str, *iterations: int) -> Trial:
        lines: list[dict[str, Any]] = [{"iteration": n, "x": n / 2} for n in iterations]
        return Trial(name, state, "", {}, 0, tiny_config(), lines)

    recorder = Recorder()
    follower = _Follower("stub", recorder)
    looks = [
        [trial("a", "running", 10, 20), trial("b", "pending")],
        [trial("a", "running", 10, 20, 30), trial("b", "running", 10)],
        [trial("a", "finished", 10, 20, 30), trial("b", "running", 10)],
        [trial("a", "finished", 10, 20, 30), trial("b", "running", 10, 20)],
    ]
    looks[0][0].metrics[0] |= {"y": "text", "z": float("nan"), "w": 3}
    for number, look in enumerate(looks):
        follower.log_trials(look, last=number == 3)
    assert recorder.calls == [
        ("begin", "a"),
        ("log", "run of a", [{"iteration": 10, "x": 5.0, "w": 3}, {"iteration": 20, "x": 10.0}]),
        ("log", "run of a", [{"iteration": 30, "x": 15.0}]),
        ("begin", "b"),
        ("log", "run of b", [{"iteration": 10, "x": 5.0}]),
        ("log", "run of a", []),
        ("end", "run of a", "finished"),
        ("log", "run of b", []),
        ("log", "run of b", [{"iteration": 20, "x": 10.0}]),
        ("end", "run of b", "running"),
    ]


def test_a_run_is_tracked_while_it_trains_and_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look every few seconds, and one after the body, with what was written last."""
    monkeypatch.setattr(tracking, "_READ_EVERY", 0.01)
    recorder, run = Recorder(), str(tmp_path / "run")
    monkeypatch.setattr(tracking, "make_trackers", lambda names, root: {"stub": recorder})
    with run_tracked(["stub"], tiny_config(), run):
        experiment.write_metrics(run, [{"iteration": 1, "x": 1.0}])
        for _ in range(500):
            if len(recorder.calls) > 1:
                break
            time.sleep(0.01)
        assert recorder.calls[:2] == [("begin", "run"), ("log", "run of run", [{"iteration": 1, "x": 1.0}])]
        experiment.write_metrics(run, [{"iteration": 1, "x": 1.0}, {"iteration": 2, "x": 2.0}])
        (tmp_path / "run" / "final").mkdir()
        (tmp_path / "run" / "final" / "model.pt").write_bytes(b"")
    lines = [line for call in recorder.calls if call[0] == "log" for line in call[2]]
    assert lines == [{"iteration": 1, "x": 1.0}, {"iteration": 2, "x": 2.0}]
    assert [call for call in recorder.calls if call[0] != "log"] == [
        ("begin", "run"),
        ("end", "run of run", "finished"),
    ]


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
    assert capsys.readouterr().out.count("mlflow: no server; training continues") == 1


def test_every_value_of_a_configuration_has_its_dotted_key() -> None:
    values = flatten(tiny_config(data__split=2, compute__gpus_per_worker=0.5))
    some = {key: values[key] for key in ("seed", "model.width", "optimizer.name", "optimizer.betas", "data.split")}
    assert some == {
        "seed": 0,
        "model.width": 0.05,
        "optimizer.name": "ranger",
        "optimizer.betas": [0.95, 0.999],
        "data.split": 2,
    }
    assert values["compute.gpus_per_worker"] == 0.5 and values["init_from.rgb"] is None
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


@pytest.mark.parametrize("fault", ["refuses", "is silent", "deleted"])
def test_a_tracker_that_cannot_be_used_is_noticed_at_the_start(
    fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mlflow = pytest.importorskip("mlflow")
    uri, words = "http://127.0.0.1:1", "refused"
    if fault == "is silent":
        server = socket.create_server(("127.0.0.1", 0))
        uri, words = f"http://127.0.0.1:{server.getsockname()[1]}", "timed out"
    elif fault == "deleted":
        uri, words = f"sqlite:///{tmp_path}/m.db", "its experiment 'search' is deleted; restore it"
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.delete_experiment(client.create_experiment("search"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    root, start = str(tmp_path / "search"), time.monotonic()
    with pytest.raises(UserError, match=f"^--track mlflow: .*{words}.*; to make it optional: .* mlflow[?]$"):
        check_trackers(["tensorboard", "mlflow"], root)
    assert time.monotonic() - start < 15 and not (tmp_path / "search").exists()
    check_trackers(["mlflow?"], root)
    assert [*make_trackers(["tensorboard", "mlflow?"], root)] == ["tensorboard"]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("--track mlflow?: ") for line in lines) == 2


def test_an_optional_tracker_that_works_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert [*make_trackers(["mlflow?"], str(tmp_path))] == ["mlflow"]
    monkeypatch.setattr("tune_ego.results.tracking.importlib.util.find_spec", lambda name: None)
    check_trackers(["wandb?"], str(tmp_path))
    with pytest.raises(UserError, match="--track wandb: pip install"):
        check_trackers(["wandb"], str(tmp_path))
