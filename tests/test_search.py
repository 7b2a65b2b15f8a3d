"""Searches and runs with real Ray: the whole path, and what must hold when something dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from ray._private.state import actors
from ray.util.placement_group import placement_group_table

from tests.conftest import TINY, tiny_config
from tune_ego.config import Config, load_config, override_config
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.evaluate import evaluate
from tune_ego.experiment import METRIC, read_experiment, read_metrics
from tune_ego.export import export_best
from tune_ego.final import train_final
from tune_ego.launch import fitting_runs
from tune_ego.model import build_stream, load_weights
from tune_ego.tune import resume_search, start_search

SPACE = {
    "base": {"data": {}, "model": {}, "train": {}},
    "space": {
        "optimizer.name": {"grid": ["ranger", "sgd"]},
        "optimizer.lr": [
            {"when": {"optimizer.name": "ranger"}, "loguniform": [1e-3, 1e-2]},
            {"when": {"optimizer.name": "sgd"}, "value": 0.05},
        ],
    },
}

RAY_DATA_ACTORS = {"_StatsActor", "_AutoscalingCoordinatorActor"}
"""One of each for the whole cluster."""


def test_runs_are_placed_on_nodes_not_on_their_sum() -> None:
    nodes = [{"CPU": 16.0, "GPU": 1.0}] * 8
    assert fitting_runs(tiny_config(), 1.0, nodes) == 8
    assert fitting_runs(tiny_config(compute__workers=2), 1.0, nodes) == 4
    with pytest.raises(UserError, match=r"2 GPUs each.*8 GPUs on 8 node"):
        fitting_runs(tiny_config(compute__gpus_per_worker=2.0), 2.0, nodes)


def write_space(folder: Path, grace: int = 2, **changes: Any) -> str:
    base: dict[str, Any] = {}
    for key, value in {**TINY, **changes}.items():
        part, leaf = key.split(".")
        base.setdefault(part, {})[leaf] = value
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({**SPACE, "base": base, "asha": {"grace": grace, "reduction": 2}}, sort_keys=False))
    return str(path)


def live_placement_groups() -> list[dict[str, Any]]:
    return [group for group in placement_group_table().values() if group["state"] != "REMOVED"]


def live_actors() -> list[dict[str, Any]]:
    return [actor for actor in actors().values() if actor["State"] != "DEAD"]


def assert_nothing_is_left() -> None:
    """No live placement group, no actor (`RAY_DATA_ACTORS` aside), and all CPUs free."""
    for _ in range(60):
        live = live_placement_groups()
        live += [actor for actor in live_actors() if actor["ActorClassName"] not in RAY_DATA_ACTORS]
        free = ray.available_resources().get("CPU", 0) == ray.cluster_resources()["CPU"]
        if not live and free:
            return
        time.sleep(0.5)
    raise AssertionError(f"left behind: {live}, CPUs free: {ray.available_resources().get('CPU')}")


def test_tune_export_train_evaluate(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    found = start_search(write_space(tmp_path), shards, str(tmp_path / "search"), {}, 0, None, None)
    assert_nothing_is_left()
    assert len(found.trials) == 2
    assert {trial.state for trial in found.trials} <= {"finished", "stopped"}
    assert found.trials[0].state == "finished" and found.trials[0].iteration == 6
    for trial in found.trials:
        assert trial.config is not None
        assert [line["iteration"] for line in trial.metrics] == list(range(1, trial.iteration + 1))
    assert {trial.config.optimizer.name for trial in found.trials if trial.config} == {"ranger", "sgd"}

    best = export_best(found.root, str(tmp_path / "best.yaml"))
    assert best.accuracy == max(trial.accuracy for trial in found.trials if trial.accuracy is not None)
    exported = load_config(tmp_path / "best.yaml")
    assert exported.train.iterations == 3000
    assert best.config is not None and exported.optimizer == best.config.optimizer
    assert yaml.safe_load((tmp_path / "best.yaml").read_text())["provenance"]["trial"] == best.id

    config = override_config(exported, {"train.iterations": 4}, "t")
    run = str(tmp_path / "final")
    weights = train_final(config, shards, run, None)
    assert_nothing_is_left()
    assert [line["iteration"] for line in read_metrics(run)] == [1, 2, 3, 4]
    state = torch.load(weights, weights_only=True)
    assert {name.split(".")[0] for name in state} == {"rgb", "flow"}
    for modality in ("rgb", "flow"):
        assert not load_weights(build_stream(modality, 4, config.model), weights).fresh
    capsys.readouterr()
    train_final(config, shards, run, None)
    assert "finished already" in capsys.readouterr().out

    last = f"{run}/iteration-000004"
    assert evaluate(last, shards, 2, str(tmp_path / "a.json")) == evaluate(f"{last}/checkpoint.pt", shards, 2)
    result = evaluate(run, shards, 2)
    assert json.loads((tmp_path / "final" / "evaluation.json").read_text()) == result
    assert (result["split"], result["iteration"], result["clips"]) == (2, 4, 8)
    for name in ("rgb", "flow", "fused"):
        assert 0 <= result[name]["mean_class_accuracy"] <= 1


@pytest.mark.slow
def test_stopped_trials_make_room_for_the_next(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    """Each trial always answers one class: the first a class of the validation clips, the others one of no clip."""
    space = Path(write_space(tmp_path, grace=50, **{"train.iterations": 300, "train.validate_every": 50}))
    text = yaml.safe_load(space.read_text())
    text["base"]["streams"] = "rgb"
    data = open_shards(shards)
    present = {clip.label for clip in data.validation(Config().data)}
    absent = min(set(range(len(data.actions))) - present)
    answers = [tmp_path / name for name in ("a.pt", "b.pt", "c.pt")]
    for path, label in zip(answers, (min(present), absent, absent)):
        stream = build_stream("rgb", len(data.actions), tiny_config().model)
        weights = stream.state_dict()
        weights["logits.conv3d.bias"][label] = 1000
        torch.save(weights, path)
    text["space"] = {"init_from.rgb": {"grid": [str(path) for path in answers]}, "optimizer.lr": 1e-12}
    space.write_text(yaml.safe_dump(text, sort_keys=False))
    found = start_search(str(space), shards, str(tmp_path / "search"), {}, 0, 1, None)
    assert [trial.state for trial in found.trials] == ["finished", "stopped", "stopped"]
    assert [trial.accuracy for trial in found.trials] == [pytest.approx(1 / len(present)), 0, 0]
    assert_nothing_is_left()


def test_two_workers_train_one_run(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    config = tiny_config(compute__workers=2, compute__cpus_per_worker=0.5, train__iterations=2)
    run = str(tmp_path / "pair")
    train_final(config, shards, run, None)
    assert [line["iteration"] for line in read_metrics(run)] == [1, 2]
    assert METRIC in read_metrics(run)[-1]
    assert_nothing_is_left()


def test_a_diverging_trial_fails_alone_and_is_not_tried_again(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    space = Path(write_space(tmp_path))
    text = yaml.safe_load(space.read_text())
    text["space"]["optimizer.lr"][1]["value"] = 1e30
    space.write_text(yaml.safe_dump(text, sort_keys=False))
    found = start_search(str(space), shards, str(tmp_path / "search"), {}, 0, None, None)
    states = {trial.config.optimizer.name: trial for trial in found.trials if trial.config}
    assert states["ranger"].state == "finished"
    assert states["sgd"].state == "failed"
    assert "loss of the" in states["sgd"].reason
    assert found.best.id == states["ranger"].id
    assert_nothing_is_left()


@pytest.mark.slow
def test_a_trial_whose_process_dies_makes_room_for_the_next(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    root = tmp_path / "search"

    def kill_the_first_trial() -> None:
        prefix = "tune_ego-"
        while not any(group["name"].startswith(prefix) for group in live_placement_groups()):
            time.sleep(0.05)
        for actor in live_actors():
            if actor["ActorClassName"].endswith("ImplicitFunc"):  # Tune's name for a trainable made from a function
                os.kill(actor["Pid"], signal.SIGKILL)

    killer = threading.Thread(target=kill_the_first_trial)
    killer.start()
    found = start_search(write_space(tmp_path), shards, str(root), {}, 0, 1, None)
    killer.join()
    assert [trial.state for trial in found.trials] == ["failed", "finished"]
    assert found.trials[0].iteration < 6
    assert_nothing_is_left()


def wait_for(condition: Any, seconds: float, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too slow"
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.1)


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key != "clips_per_second"} for line in lines]


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, shards: str) -> None:
    """kill -9 of the driver after the first trial ended and the second has a checkpoint; its own Ray cluster."""
    root = tmp_path / "search"
    space = write_space(
        tmp_path, grace=400, **{"train.iterations": 400, "train.validate_every": 10, "train.log_every": 10}
    )
    command = "import sys; from tune_ego.cli import main; sys.argv = ['tune-ego', *sys.argv[1:]]; main()"
    arguments = ["tune", space, "--data", shards, "--storage", str(tmp_path), "--name", "search", "--concurrent", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )

    def second_trial_has_a_checkpoint() -> bool:
        if not (root / "trials.json").exists():
            return False
        trials = read_experiment(str(root)).trials
        return len(trials) == 2 and trials[1].iteration >= 30 and trials[1].state == "running"

    wait_for(second_trial_has_a_checkpoint, 240, process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    before = read_experiment(str(root))
    first, second = before.trials
    assert first.state == "finished" and second.state == "running"
    first_metrics = (Path(first.run) / "metrics.jsonl").read_bytes()
    assert 30 <= second.iteration < 400

    output = subprocess.run(
        [sys.executable, "-c", command, "resume", str(root)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    assert f"{second.id}: running, goes on from iteration-0" in output
    assert f"{first.id}: starts" not in output
    after = read_experiment(str(root))
    assert [trial.state for trial in after.trials] == ["finished", "finished"]
    assert (Path(first.run) / "metrics.jsonl").read_bytes() == first_metrics
    iterations = [line["iteration"] for line in after.trials[1].metrics]
    assert iterations == list(range(10, 401, 10))
    assert timeless(after.trials[1].metrics)[: len(second.metrics)] == timeless(second.metrics)
    best = export_best(str(root), str(tmp_path / "best.yaml"))
    assert best.accuracy == max(line[METRIC] for trial in after.trials for line in trial.validations)


def test_an_experiment_that_ended_is_resumed_without_repeating_anything(
    tmp_path: Path, shards: str, ray_cluster: None
) -> None:
    root = str(tmp_path / "search")
    found = start_search(write_space(tmp_path), shards, root, {}, 0, None, None)
    before = {trial.id: trial.metrics for trial in found.trials}
    assert {trial.id: trial.metrics for trial in resume_search(root, None).trials} == before
