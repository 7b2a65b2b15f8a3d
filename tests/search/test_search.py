"""Searches and runs with real Ray: the whole path, and what must hold when something dies."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
import yaml
from ray._private.state import actors
from ray.util.placement_group import placement_group_table

from tests.conftest import COMMAND, TINY, tiny_config
from tests.searches import KnownSearch
from tests.specs import search_spec
from tune_ego import storage
from tune_ego.bench.resume import descendants
from tune_ego.config import Config
from tune_ego.config_io import load_config, override_config
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.evaluate import evaluate
from tune_ego.model import build_stream, load_weights
from tune_ego.results.checkpoint_files import checkpoint_iterations
from tune_ego.results.decisions import read_decisions
from tune_ego.results.experiment import METRIC, TIMES, Failure, read_metrics, write_failure, write_metrics
from tune_ego.results.reading import read_experiment
from tune_ego.results.trial_records import TrialRecords, run_folder
from tune_ego.runs.final import train_final
from tune_ego.search.export import export_best
from tune_ego.search.tune import resume_search, start_search
from tune_ego.space_io import parse_space

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


def write_space(folder: Path, grace: int = 2, **changes: Any) -> str:
    base: dict[str, Any] = {}
    for key, value in {**TINY, **changes}.items():
        part, leaf = key.split(".")
        base.setdefault(part, {})[leaf] = value
    path = folder / "space.yaml"
    path.write_text(
        yaml.safe_dump({**SPACE, "base": base, "scheduler": {"grace": grace, "reduction": 2}}, sort_keys=False)
    )
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


def assert_it_went_on(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> None:
    """The lines of a run up to a checkpoint are not made again: they keep what no two runs have alike, their speed."""
    assert before and after[: len(before)] == before
    assert len(after) > len(before)


def test_a_search_ends_with_its_files_and_nothing_else(known_search: KnownSearch) -> None:
    """One trial finished, one stopped by ASHA, one diverged: states, lines, accuracies, checkpoints and decisions."""
    assert_nothing_is_left()
    found = known_search.read()
    assert [trial.state for trial in found.trials] == ["finished", "stopped", "failed"]
    assert [trial.iteration for trial in found.trials] == [6, 2, 1]
    finished, stopped, failed = found.trials
    assert [line["iteration"] for line in finished.metrics] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in finished.validations] == [2, 4, 6]
    accuracy = known_search.accuracy
    assert [line[METRIC] for line in finished.validations] == pytest.approx([accuracy] * 3)
    assert finished.best == finished.validations[0]  # the first of equals
    micro = known_search.labels.count(known_search.right) / len(known_search.labels)
    assert finished.best["val_micro_accuracy"] == pytest.approx(micro)
    assert [line[METRIC] for line in stopped.validations] == [0]
    assert failed.validations == [] and failed.reason.startswith("iteration 2: action loss of the rgb stream is nan")
    assert checkpoint_iterations(finished.run) == [2, 4, 6]
    assert checkpoint_iterations(stopped.run) == checkpoint_iterations(failed.run) == []
    decisions = [decision[1:] for decision in read_decisions(found.root)]
    assert decisions == [
        *(("00000", n, pytest.approx(accuracy), "CONTINUE") for n in (2, 4, 6)),
        ("00001", 2, 0.0, "STOP"),
    ]
    assert found.best.trials == [finished]
    names = {path.name for path in known_search.root.iterdir()}
    assert names == {"experiment.json", "trials.json", "runs", "tune", "mlflow.db", "tensorboard"}


def test_a_search_says_what_happens_to_its_trials(known_search: KnownSearch) -> None:
    accuracy = f"{100 * known_search.accuracy:.1f} %"
    of_trials = [line.strip() for line in known_search.output.splitlines() if re.match(r"  0000\d: ", line)]
    assert of_trials[:-1] == [
        "00000: starts",
        *(f"00000: iteration {n}, validation mean class accuracy {accuracy}" for n in (2, 4, 6)),
        "00000: finished",
        "00001: starts",
        "00001: iteration 2, validation mean class accuracy 0.0 %",
        "00001: stopped by ASHA",
        "00002: starts",
    ]
    assert of_trials[-1].startswith("00002: failed: iteration 2: action loss of the rgb stream is nan")
    assert "3 trials of up to 6 iterations, 1 at a time, in" in known_search.output


def test_export_train_evaluate(
    tmp_path: Path, shards: str, known_search: KnownSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    best = export_best(str(known_search.root), str(tmp_path / "best.yaml"))
    assert best.id == "00000" and best.accuracy == pytest.approx(known_search.accuracy)
    exported = load_config(tmp_path / "best.yaml")
    assert (exported.train.iterations, exported.label, exported.optimizer.lr) == (3000, "right", 1e-12)
    assert exported == override_config(best.config, {"train.iterations": 3000}, "t")
    provenance = yaml.safe_load((tmp_path / "best.yaml").read_text())["provenance"]
    assert (provenance["trial"], provenance["trial_iterations"]) == ("00000", 6)
    assert provenance["trials"] == {"finished": 1, "stopped": 1, "failed": 1}
    assert list(provenance["failed"]) == ["00002"]

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
    labels = [clip["action"] for clip in open_shards(shards).table.to_pylist() if clip["split2"] == "test"]
    for name in ("rgb", "fused"):  # every clip is taken for the same class
        assert result[name]["mean_class_accuracy"] == pytest.approx(1 / len(set(labels)))
        assert result[name]["micro_accuracy"] == pytest.approx(labels.count(known_search.right) / 8)


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


def wait_for(condition: Any, seconds: float, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "too slow"
        assert process.poll() is None, process.stdout.read().decode() if process.stdout else ""
        time.sleep(0.1)


RAY_AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Of a cluster that was killed they end by themselves, after two minutes."""


def wait_for_end(pids: list[int], *but: str) -> None:
    """`but`: how the command lines of those begin that may go on."""
    alive: list[str] = []
    for _ in range(100):
        alive = [line for pid in pids if (line := command_line(pid)) and not line.startswith(but)]
        if not alive:
            return
        time.sleep(0.1)
    pytest.fail(f"still alive: {alive}")


def command_line(pid: int) -> str:
    """Empty of a process that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def timeless(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


@pytest.mark.slow
def test_a_killed_search_goes_on_where_it_was(tmp_path: Path, shards: str) -> None:
    """kill -9 of the driver after the first trial ended and the second has a checkpoint; its own Ray cluster."""
    root = tmp_path / "search"
    space = write_space(
        tmp_path, grace=400, **{"train.iterations": 400, "train.validate_every": 10, "train.log_every": 10}
    )
    arguments = ["tune", space, "--data", shards, "--storage", str(tmp_path), "--name", "search", "--concurrent", "1"]
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment
    )

    def second_trial_has_a_checkpoint() -> bool:
        if not (root / "trials.json").exists():
            return False
        trials = read_experiment(str(root)).trials
        return (
            len(trials) == 2
            and trials[1].state == "running"
            and max(checkpoint_iterations(trials[1].run), default=0) >= 30
        )

    wait_for(second_trial_has_a_checkpoint, 240, process)
    everything = descendants(process.pid)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    wait_for_end(everything, *RAY_AGENTS)
    before = read_experiment(str(root))
    first, second = before.trials
    assert first.state == "finished" and second.state == "interrupted"
    first_metrics = (Path(first.run) / "metrics.jsonl").read_bytes()
    assert 30 <= second.iteration < 400
    saved = checkpoint_iterations(second.run)[-1]

    output = subprocess.run(
        [sys.executable, "-c", COMMAND, "resume", str(root)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    ).stdout
    assert f"{second.id}: interrupted, resumes from iteration " in output
    assert f"{first.id}: starts" not in output
    after = read_experiment(str(root))
    assert [trial.state for trial in after.trials] == ["finished", "finished"]
    assert (Path(first.run) / "metrics.jsonl").read_bytes() == first_metrics
    iterations = [line["iteration"] for line in after.trials[1].metrics]
    assert iterations == list(range(10, 401, 10))
    assert timeless(after.trials[1].metrics)[: len(second.metrics)] == timeless(second.metrics)
    assert_it_went_on([line for line in second.metrics if line["iteration"] <= saved], after.trials[1].metrics)
    best = export_best(str(root), str(tmp_path / "best.yaml"))
    assert best.accuracy == max(line[METRIC] for trial in after.trials for line in trial.validations)


def test_a_search_that_ended_is_resumed_for_more_iterations_alone(
    tmp_path: Path, known_search: KnownSearch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From 6 to 8 iterations: finished trials go on from their last one, stopped and diverged ones do not."""
    root = known_search.copy(tmp_path)
    before = read_experiment(root).trials
    refused: list[tuple[dict[str, Any], str]] = [
        ({"iterations": 6}, "has 6 already"),
        ({"samples": 1}, "has 1 already"),
    ]
    for changes, message in refused:
        with pytest.raises(UserError, match=message):
            resume_search(root, None, **changes)
    larger = resume_search(root, None, iterations=8).trials
    assert [(trial.id, trial.state, trial.iteration) for trial in larger] == [
        ("00000", "finished", 8),
        ("00001", "stopped", 2),
        ("00002", "failed", 1),
    ]
    assert [line["iteration"] for line in larger[0].metrics] == list(range(1, 9))
    assert larger[0].metrics[:6] == before[0].metrics
    assert [trial.metrics for trial in larger[1:]] == [trial.metrics for trial in before[1:]]
    output = capsys.readouterr().out
    assert "00000: finished, resumes from iteration 6" in output and "00001: stopped\n" in output
    assert "00002: failed for good: iteration" in output
    assert "00001: starts" not in output
    assert_nothing_is_left()


def test_a_trial_named_as_the_folder_of_another_run_is_left_out(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A search deletes the checkpoints of stopped trials at its end. Its own have finished, or failed for good."""
    root, others = tmp_path / "search", tmp_path / "others"
    for name in ("stopped", "pending"):
        for file in ("config.yaml", "iteration-000006/checkpoint.pt", "iteration-000006/checkpoint.json"):
            storage.write_text(others / name / file, "of another run")
    before = {path: path.stat().st_mtime_ns for path in others.rglob("*")}
    changes: dict[str, Any] = {"compute.cpus_per_worker": 0.5}
    text = Path(write_space(tmp_path, **changes)).read_text()
    settings = open_shards(shards).info["settings"]
    spec = search_spec(text, samples=2, trials=4, data=shards, data_settings=settings)
    storage.write_json(root / "experiment.json", spec)
    foreign = {"../../others/pending": "pending", "../../others/stopped": "stopped"}
    own = {"00000": "failed", "00001": "failed", "00002": "finished", "00003": "finished"}
    records, sampled = TrialRecords(str(root)), parse_space(text, "s").draw(0, 0)
    records.add([{"trial": name, "repeat": 0, "sampled": sampled} for name in (*foreign, *own)])
    for name, state in {**foreign, **own}.items():
        records.note(name, state)
    for name in ("00000", "00001"):
        write_failure(run_folder(str(root), name), Failure("nan", final=True))
    for name in ("00002", "00003"):
        write_metrics(run_folder(str(root), name), [{"iteration": 6, METRIC: 0.5}])
    resumed = resume_search(str(root), None)
    assert {path: path.stat().st_mtime_ns for path in others.rglob("*")} == before
    output = capsys.readouterr().out
    assert all(f"{name!r} is no name of a trial" in output for name in foreign)
    assert {trial.id: trial.state for trial in resumed.trials} == own
    assert list(json.loads((root / "trials.json").read_text())) == list(own)
    assert_nothing_is_left()


@pytest.mark.slow
def test_a_search_that_ended_is_made_larger(tmp_path: Path, known_search: KnownSearch) -> None:
    """From 3 to 6 trials and from 6 to 8 iterations: the new ones are those of the same configurations."""
    root = known_search.copy(tmp_path)
    unchanged = [(trial.id, trial.state, trial.metrics) for trial in known_search.read().trials]
    assert [(trial.id, trial.state, trial.metrics) for trial in resume_search(root, None).trials] == unchanged
    larger = resume_search(root, None, samples=2, iterations=8)
    assert [trial.id for trial in larger.trials] == [f"0000{n}" for n in range(6)]
    assert [trial.state for trial in larger.trials] == ["finished", "stopped", "failed"] * 2
    assert [trial.iteration for trial in larger.trials] == [8, 2, 1] * 2
    assert [trial.config.label for trial in larger.trials] == ["right", "wrong", "diverges"] * 2
    assert larger.spec["trials"] == 6
    assert_nothing_is_left()


def test_what_a_resumed_search_is_asked_for_is_on_record(
    tmp_path: Path, known_search: KnownSearch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No trial runs here: what reaches the part that runs them."""
    driven: list[Any] = []
    monkeypatch.setattr("tune_ego.search.tune._drive", lambda *arguments: driven.append(arguments))
    root = known_search.copy(tmp_path)
    states = {"pending", "running", "interrupted", "failed"}
    resume_search(root, None)
    resume_search(root, None, samples=3, concurrent=5)
    resume_search(root, None, iterations=10)
    specs = [experiment.spec for experiment, *_ in driven]
    assert [(spec["samples"], spec["trials"], spec["concurrent"]) for spec in specs] == [
        (1, 3, 1),
        (3, 9, 5),
        (1, 3, 1),
    ]
    assert [experiment.space.base["train"]["iterations"] for experiment, *_ in driven] == [6, 6, 10]
    assert [again for *_, again in driven] == [states, states, states | {"finished"}]
    settings = json.loads((tmp_path / "search" / "experiment.json").read_text())
    settings["data_fingerprint"] = "another"
    (tmp_path / "search" / "experiment.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="is another data set than it was started on"):
        resume_search(root, None)


@pytest.mark.slow
def test_repeats_over_seeds_with_tpe(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two configurations of two repeats each; what counts is the mean."""
    space = Path(write_space(tmp_path, **{"train.iterations": 4}))
    text = yaml.safe_load(space.read_text())
    text["space"]["optimizer.name"] = {"choice": ["ranger", "sgd"]}
    space.write_text(yaml.safe_dump({**text, "searcher": "tpe", "samples": 2, "repeats": 2}, sort_keys=False))
    found = start_search(str(space), shards, str(tmp_path / "search"), {}, 5, None, None)
    assert [trial.id for trial in found.trials] == ["00000-0", "00000-1", "00001-0", "00001-1"]
    assert [trial.config.seed for trial in found.trials] == [5, 6, 5, 6]
    assert found.trials[0].sampled == found.trials[1].sampled != found.trials[2].sampled
    assert found.trials[0].metrics != found.trials[1].metrics
    best = export_best(found.root, str(tmp_path / "best.yaml"))
    means = [(a.accuracy or 0) / 2 + (b.accuracy or 0) / 2 for a, b in zip(found.trials[::2], found.trials[1::2])]
    assert best.accuracy == pytest.approx(max(means))
    provenance = yaml.safe_load((tmp_path / "best.yaml").read_text())["provenance"]
    assert [repeat["seed"] for repeat in provenance["repeats"]] == [5, 6] and "standard_deviation" in provenance
    assert "Configurations, over their repeats" in capsys.readouterr().out
    assert_nothing_is_left()


@pytest.mark.slow
def test_a_search_starts_without_a_worker_node_and_gives_the_nodes_back(tmp_path: Path, shards: str) -> None:
    """Three trials at a time on nodes that the autoscaler starts one by one, from none to three."""
    changes: dict[str, Any] = {"train.iterations": 2, "train.validate_every": 2, "compute.gpus_per_worker": 0}
    space = write_space(tmp_path, **changes)
    Path(space).write_text(Path(space).read_text() + "samples: 2\n")
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    run = subprocess.run(
        [sys.executable, "-m", "tests.autoscaling", space, shards, str(tmp_path / "search")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    assert "waiting for nodes that the cluster starts" in run.stdout
    seen = json.loads((tmp_path / "result.json").read_text())
    assert seen["nodes"][0] == 1 and max(seen["nodes"]) == 4 and seen["left"] == 1
    assert set(seen["states"]) <= {"finished", "stopped"} and len(seen["states"]) == 4
