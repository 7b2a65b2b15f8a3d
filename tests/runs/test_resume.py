"""Checkpoints that are whole or not there, and runs that go on after something died."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch

from tests.conftest import COMMAND, tiny_config
from tests.search.test_search import wait_for, wait_for_end, write_space
from tune_ego.bench.resume import bench_resume, descendants
from tune_ego.config import Config
from tune_ego.config_io import dump_config
from tune_ego.dataset.shards import open_shards
from tune_ego.feed.batches import batches_to_device
from tune_ego.feed.feed_plan import FeedPlan, read_items
from tune_ego.results import checkpoint_files, driver, experiment
from tune_ego.results.checkpoint_files import checkpoint_iterations, checkpoint_uri, last_whole_iteration
from tune_ego.results.experiment import METRIC
from tune_ego.runs.job import Job
from tune_ego.runs.launch import fit
from tune_ego.runs.reporter import Reporter
from tune_ego.training.checkpoint import (
    DamagedCheckpoint,
    Origin,
    mean_weights,
    read_checkpoint,
    snapshot,
    to_bytes,
    write_checkpoint,
)
from tune_ego.training.loop import train
from tune_ego.training.trainer import Trainer


def trainer() -> Trainer:
    return Trainer(tiny_config(streams="rgb"), Origin(["a", "b"], (48, 36), "dis"), torch.device("cpu"))


def save(run: Path, iteration: int, best: int, keep: Iterable[int] = ()) -> None:
    made = trainer()
    made.iteration, made.best = iteration, {"iteration": best, METRIC: 0.5}
    write_checkpoint(str(run), made.checkpoint(), keep)


def test_the_best_and_the_last_two_checkpoints_stay(tmp_path: Path) -> None:
    for iteration, best in ((10, 10), (20, 20), (30, 20), (40, 20), (50, 20)):
        save(tmp_path, iteration, best)
    assert checkpoint_iterations(str(tmp_path)) == [20, 40, 50]
    assert last_whole_iteration(str(tmp_path)) == 50
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"iteration-0000{n}" for n in (20, 40, 50)]


def test_what_the_final_weights_are_the_mean_of_stays_whatever_is_written_in_between(tmp_path: Path) -> None:
    config = tiny_config(train__iterations=8, train__average_checkpoints=3)
    for final, averaged in ((True, {4, 6, 8}), (False, set[int]())):
        plan = FeedPlan.from_config("", config, 1, 0)
        assert Reporter(Job(config, "", "", 0, "", final), 0, plan).averaged == averaged
    for iteration in (2, 4, 6, 7, 8):  # 7: interrupted, or a spot notice
        save(tmp_path, iteration, 2, {4, 6, 8})
    assert checkpoint_iterations(str(tmp_path)) == [2, 4, 6, 7, 8]
    assert mean_weights(str(tmp_path), [4, 6, 8])


def test_a_snapshot_stays_as_it_is_while_training_goes_on() -> None:
    made = trainer()
    saved = snapshot(made.checkpoint())
    before = to_bytes(saved)
    with torch.no_grad():
        for parameter in made.model.parameters():
            parameter.add_(1)
    assert to_bytes(saved) == before != to_bytes(made.checkpoint())


@pytest.mark.parametrize("damage", ["a bit", "cut off", "no checksum", "checksum alone", "half a checksum"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    save(tmp_path, 10, 10)
    save(tmp_path, 20, 10)
    file, checksum = (Path(checkpoint_uri(str(tmp_path), 20, name)) for name in ("checkpoint.pt", "checkpoint.json"))
    data = file.read_bytes()
    if damage == "a bit":
        file.write_bytes(data[:5000] + bytes([data[5000] ^ 1]) + data[5001:])
    elif damage == "cut off":
        file.write_bytes(data[:-1])
    elif damage == "no checksum":  # the process died between the two
        checksum.unlink()
    elif damage == "checksum alone":
        file.unlink()
    else:
        checksum.write_bytes(checksum.read_bytes()[:20])
    assert last_whole_iteration(str(tmp_path)) == 10
    named = f"{file}: damaged" in capsys.readouterr().out.replace("\n", "")
    assert named == (damage in ("a bit", "cut off", "half a checksum"))
    if named:
        with pytest.raises(DamagedCheckpoint, match="damaged, its content does not match its checksum"):
            read_checkpoint(str(file))
    save(tmp_path, 20, 10)  # the run comes by again
    assert last_whole_iteration(str(tmp_path)) == 20


@pytest.mark.slow
def test_a_run_goes_back_to_the_checkpoint_before(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    """The last checkpoint is damaged: the run does those iterations again, and ends with the weights of a loop without
    Ray that was never interrupted. It reports all validations before its checkpoint once more, for the search's
    scheduler may have missed some; so does a run that had finished.
    """

    class Reports(ray.train.UserCallback):  # type: ignore[misc]
        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
            with (tmp_path / "reports").open("a") as file:
                print(metrics[0]["iteration"], file=file)

    config = tiny_config(train__iterations=6, streams="rgb")
    run = str(tmp_path / "run")
    whole = trainer_of(shards, config)
    plan = FeedPlan.from_config(shards, config, 1, 0)
    lines: list[dict[str, Any]] = []

    def report(metrics: dict[str, Any] | None, checkpoint: dict[str, Any] | None) -> None:
        lines.extend([metrics] if metrics else [])
        if checkpoint is not None and whole.iteration <= 4:
            experiment.write_metrics(run, lines)
            write_checkpoint(run, checkpoint)

    train(whole, plan, batches_to_device(read_items(plan, range(plan.item_count)), torch.device("cpu")), report)
    Path(checkpoint_uri(run, 4)).write_bytes(b"x" * 100)
    for _ in range(2):
        fit(Job(config, shards, run, 0, driver.stop_uri(run), final=False), [Reports()])
    assert (tmp_path / "reports").read_text().split() == ["2", "4", "6", "2", "4", "6"]
    assert [line["iteration"] for line in experiment.read_metrics(run)] == [1, 2, 3, 4, 5, 6]
    resumed = read_checkpoint(checkpoint_uri(run, 6))
    assert resumed["best"] == whole.best
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed["model"][name], value), name


def trainer_of(shards: str, config: Config) -> Trainer:
    data = open_shards(shards)
    return Trainer(config, Origin(data.actions, data.image_size, "dis"), torch.device("cpu"))


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not() -> None:
    """`bench resume` in a short form; it raises where one bit differs."""
    benchmark = bench_resume(kills=2, seed=1)
    assert benchmark.facts["kills"] == 2 and benchmark.facts["of these while a checkpoint was written"] >= 1
    assert all(0 <= lost < 12 for lost in benchmark.figures[1].values)
    assert list(itertools.chain.from_iterable(figure.values for figure in benchmark.figures))


@pytest.mark.slow
@pytest.mark.parametrize(("command", "receiver"), [("tune", "group"), ("train", "group"), ("train", "driver")])
def test_sigterm_ends_cleanly_and_says_how_to_go_on(tmp_path: Path, shards: str, command: str, receiver: str) -> None:
    """To the process group, as by `timeout`, systemd, Slurm and container runtimes, or to the driver alone."""
    source = write_space(tmp_path, grace=2000, **{"train.iterations": 2000})
    if command == "train":
        source = str(tmp_path / "config.yaml")
        Path(source).write_text(dump_config(tiny_config(train__iterations=2000)))
    root = tmp_path / "x"
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                COMMAND,
                command,
                source,
                "--data",
                shards,
                "--storage",
                str(tmp_path),
                "--name",
                "x",
            ],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
        )
        wait_for(lambda: any(root.rglob("checkpoint.json")), 120, process)
        everything = descendants(process.pid)
        before = sorted(root.rglob("checkpoint.json"))
        if receiver == "group":
            os.killpg(process.pid, signal.SIGTERM)
        else:
            process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        assert process.wait(timeout=45) == 130
        print(f"{command}, {receiver}: ended {time.monotonic() - start:.1f} s after SIGTERM")
    assert sorted(root.rglob("checkpoint.json")) > before  # one at the iteration at which it was stopped
    assert not (root / "driver.json").exists() and not (root / "stop").exists()
    hint = f"tune-ego resume {root}" if command == "tune" else "the same command"
    assert f"Interrupted. To resume from the last checkpoint, run: {hint}" in (tmp_path / "log").read_text()
    wait_for_end(everything)


@pytest.mark.slow
@pytest.mark.parametrize("notice", ["", "notice"])
@pytest.mark.parametrize("command", ["train", "tune"])
def test_it_goes_on_when_the_node_of_its_workers_is_lost(
    tmp_path: Path, shards: str, command: str, notice: str
) -> None:
    """After a spot notice a checkpoint is written out of turn."""
    changes = {"train__iterations": 400, "train__validate_every": 50}
    source, run = str(tmp_path / "config.yaml"), tmp_path / "x"
    Path(source).write_text(dump_config(tiny_config(**changes)))
    if command == "tune":
        source = write_space(tmp_path, grace=400, **{key.replace("__", "."): value for key, value in changes.items()})
        run = tmp_path / "x" / "runs" / "00000"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            str(root / "tests/node_loss.py"),
            command,
            source,
            shards,
            str(tmp_path / "x"),
            *notice.split(),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root), "RAY_ADDRESS": ""},
        timeout=400,
    )
    lost = re.search(r"lost its node after iteration (\d+)", done.stdout)
    assert done.returncode == 0 and lost is not None, done.stdout + done.stderr
    assert int(lost[1]) < 400
    assert ("out of turn" in done.stdout) == bool(notice)
    assert [line["iteration"] for line in experiment.read_metrics(str(run))] == list(range(1, 401))
    if command == "tune":
        assert "['finished', 'finished']" in done.stdout
    else:
        assert (run / checkpoint_files.MODEL_FILE).exists()
