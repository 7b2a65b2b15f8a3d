"""A search's parts that need no running Ray: its space, what resumes, and how a trial starts and ends."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray import tune as ray_tune

from tests.conftest import tiny_config
from tests.specs import search_spec
from tune_ego import __version__, storage
from tune_ego.config_io import dump_config, override_config
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import Interrupted, UserError
from tune_ego.results.checkpoint_files import checkpoint_uri, checksum
from tune_ego.results.decisions import Decision, write_decisions
from tune_ego.results.experiment import (
    METRIC,
    Failure,
    describe_versions,
    note_version,
    read_failure,
    write_failure,
    write_metrics,
)
from tune_ego.results.trial_records import TrialRecords, run_folder
from tune_ego.runs.job import Job
from tune_ego.runs.placement import Nodes
from tune_ego.search import tune
from tune_ego.space_io import parse_space

SPACE = """
base: {train: {iterations: 30, validate_every: 10}, streams: rgb}
space:
  model.stam_depth: {choice: [1, 2]}
repeats: 2
samples: 3
"""


def write_checkpoint(run: str, iteration: int, data: bytes = b"weights") -> None:
    storage.write_bytes(checkpoint_uri(run, iteration), data)
    storage.write_json(checkpoint_uri(run, iteration, "checkpoint.json"), checksum(data))


def test_a_trial_that_ended_unnoticed_reports_its_last_validation_again(tmp_path: Path) -> None:
    """The driver died in between. No training is repeated, neither of a stopped trial nor of a finished one."""
    root, config = str(tmp_path), tiny_config(train__iterations=20)
    run = run_folder(root, "t1")
    assert tune.last_report(root, run, config) is None
    last = {"iteration": 20, METRIC: 0.2, "train_loss": 1.0}
    write_metrics(run, [{"iteration": 10, METRIC: 0.1}, {"iteration": 15}, last, {"iteration": 20, "train_loss": 2.0}])
    write_checkpoint(run, 10)
    write_decisions(root, "t1", [Decision(0, "t1", 10, 0.1, "CONTINUE")])
    assert tune.last_report(root, run, config) is None
    storage.write_text(checkpoint_uri(run, 20), "half")
    assert tune.last_report(root, run, config) is None
    write_checkpoint(run, 20)
    storage.write_bytes(checkpoint_uri(run, 20), b"damaged")
    assert tune.last_report(root, run, config) is None
    write_checkpoint(run, 20)
    assert tune.last_report(root, run, config) == last
    assert tune.last_report(root, run, tiny_config(train__iterations=30)) is None  # the budget was raised
    write_decisions(root, "t1", [Decision(0, "t1", 5, 0.3, "STOP"), Decision(1, "t1", 10, 0.4, "CONTINUE")])
    assert tune.last_report(root, run, config) == last
    write_decisions(root, "t1", [Decision(0, "t1", 5, 0.3, "CONTINUE"), Decision(1, "t1", 10, 0.4, "STOP")])
    assert tune.last_report(root, run, config) == {"iteration": 10, METRIC: 0.4}


def test_a_space_gets_the_seed_unless_it_has_one(tmp_path: Path) -> None:
    file = tmp_path / "space.yaml"
    for text, seed, changes in (
        (SPACE, 7, {"seed": 7}),
        (SPACE.replace("streams: rgb", "streams: rgb, seed: 3"), 3, {}),
        (SPACE.replace("repeats: 2", "").replace("samples", "  seed: 4\nsamples"), 4, {}),
    ):
        file.write_text(text)
        space, changed = tune.resolved_space(str(file), {"label": "x"}, 7)
        assert changed == {"label": "x", **changes}
        config = tune.any_config(space)
        assert (config.seed, config.label, config.train.iterations) == (seed, "x", 30)
    file.write_text(SPACE)
    assert tune.resolved_space(str(file), {"seed": 9}, 7)[1] == {"seed": 9}


def test_a_space_gets_its_starting_weights_as_absolute_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_checkpoint(str(tmp_path / "run"), 10)
    file = Path("space.yaml")
    file.write_text(SPACE.replace("streams: rgb", "init_from: {rgb: run, flow: flow.pt}"))
    space, changes = tune.resolved_space("space.yaml", {}, 7)
    weights = {
        "init_from.rgb": f"{tmp_path}/run/iteration-000010/checkpoint.pt",
        "init_from.flow": f"{tmp_path}/flow.pt",
    }
    assert changes == {"seed": 7, **weights}
    assert space.base["init_from"] == {"rgb": weights["init_from.rgb"], "flow": weights["init_from.flow"]}
    file.write_text(SPACE.replace("repeats", f"  init_from.rgb: {{choice: [{tmp_path}/a, {tmp_path}/b]}}\nrepeats"))
    assert tune.resolved_space("space.yaml", {}, 7)[1] == {"seed": 7}  # what is searched stays in the space


def test_a_trial_is_a_run_with_the_seed_of_its_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs: list[tuple[Job, list[Any]]] = []
    reports: list[dict[str, Any]] = []
    outcomes: list[Exception | None] = [None, Interrupted(), UserError("no such weights"), UserError("later")]

    def fit(job: Job, callbacks: list[Any]) -> None:
        jobs.append((job, callbacks))
        outcome = outcomes[len(jobs) - 1]
        if outcome is not None:
            raise outcome

    monkeypatch.setattr(tune, "fit", fit)
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: "callback")
    monkeypatch.setattr(ray_tune, "report", reports.append)
    root = str(tmp_path)
    space = parse_space(SPACE, "t", {"seed": 5})
    trial = tune._trainable(space, "/shards", root, 0.5, "")
    run, draw = run_folder(root, "00001-1"), {"trial": "00001-1", "repeat": 1, "sampled": {"model.stam_depth@0": 2}}
    for failure in (None, None, "no such weights", "no such weights"):  # the first reason stays
        trial(draw)
        written = read_failure(run)
        assert (written and written.reason) == failure
    assert written == Failure("no such weights", final=False)
    job, callbacks = jobs[0]
    assert callbacks == ["callback"] and len(jobs) == 4
    assert (job.data, job.run, job.gpus, job.stop, job.final) == ("/shards", run, 0.5, f"{root}/stop", False)
    assert (job.config.seed, job.config.model.stam_depth, job.config.train.iterations) == (6, 2, 30)
    write_decisions(root, "00001-1", [Decision(0, "00001-1", 10, 0.5, "STOP")])
    trial(draw)
    assert reports == [{"iteration": 10, METRIC: 0.5}] and len(jobs) == 4


STATES = ("pending", "running", "interrupted", "finished", "stopped", "failed")


@pytest.fixture
def driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, set[str]]]:
    """(experiment, states that go on) of each search that is driven, in place of driving it."""
    calls: list[tuple[Any, set[str]]] = []
    spec = search_spec(SPACE, overrides={"seed": 5}, trials=6)
    storage.write_json(tmp_path / "experiment.json", spec)
    records = TrialRecords(str(tmp_path))
    sampled = {"model.stam_depth@0": 1}
    records.add([{"trial": f"0000{n // 2}-{n % 2}", "repeat": n % 2, "sampled": sampled} for n in range(6)])
    for trial, state in zip(records, STATES):
        records.note(trial, state)
    monkeypatch.setattr(tune, "ray_session", lambda address: nullcontext())
    monkeypatch.setattr(tune, "cluster_nodes", lambda address, node_types: Nodes([{"CPU": 4.0}], [], False))
    same = SimpleNamespace(info={"settings": {"flow": "dis"}}, root="/shards")
    monkeypatch.setattr(tune, "open_shards", lambda data: same)
    monkeypatch.setattr(tune, "_drive", lambda found, address, command, again: calls.append((found, again)))
    return calls


@pytest.mark.parametrize(
    ("changes", "samples", "trials", "budget", "concurrent", "more"),
    [
        ({}, 3, 6, 30, None, set[str]()),
        ({"samples": 5}, 5, 10, 30, None, set[str]()),
        ({"iterations": 60}, 3, 6, 60, None, {"finished"}),  # those that were stopped stay so
        ({"concurrent": 2}, 3, 6, 30, 2, set[str]()),
    ],
)
def test_a_search_is_resumed_and_made_larger(
    tmp_path: Path,
    driven: list[tuple[Any, set[str]]],
    changes: dict[str, Any],
    samples: int,
    trials: int,
    budget: int,
    concurrent: int | None,
    more: set[str],
) -> None:
    tune.resume_search(str(tmp_path), None, **changes)
    ((resumed, again),) = driven
    assert again == {"pending", "running", "interrupted", "failed"} | more
    spec = resumed.spec
    assert (spec["samples"], spec["trials"], spec["concurrent"]) == (samples, trials, concurrent)
    assert resumed.space.samples == samples and tune.any_config(resumed.space).train.iterations == budget
    assert tune.any_config(resumed.space).seed == 5


def test_the_states_of_a_resumed_search_are_printed(
    tmp_path: Path, driven: list[tuple[Any, set[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    write_checkpoint(run_folder(str(tmp_path), "00000-1"), 20)
    write_checkpoint(run_folder(str(tmp_path), "00001-1"), 30)
    for name, last in (("00001-1", 30), ("00002-0", 10)):
        write_metrics(run_folder(str(tmp_path), name), [{"iteration": last}])
    write_failure(run_folder(str(tmp_path), "00001-0"), Failure("weights", final=False))
    write_failure(run_folder(str(tmp_path), "00002-1"), Failure("nan", final=True))
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": "0.0.1"}))
    for iterations in (None, 31):
        tune.resume_search(str(tmp_path), None, iterations=iterations)
        assert capsys.readouterr().out.splitlines() == [
            f"Note: this search was started by tune_ego 0.0.1, and this is {__version__}",
            "  00000-0: pending, starts from scratch",
            "  00000-1: interrupted, resumes from iteration 20",  # its driver is dead
            "  00001-0: interrupted, starts from scratch",
            "  00001-1: finished" + (", resumes from iteration 30" if iterations else ""),
            "  00002-0: stopped",
            "  00002-1: failed for good: nan",
        ]
        spec = driven[-1][0].spec
        assert (spec["version"], spec["resumed_with"]) == ("0.0.1", [__version__])
        assert describe_versions(spec) == f"tune_ego 0.0.1, then {__version__}; this is {__version__}"
    assert describe_versions(note_version({"version": __version__})) == describe_versions({}) == ""


def test_a_search_is_resumed_where_records_of_its_trials_are_cut_short(
    tmp_path: Path, driven: list[tuple[Any, set[str]]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A failure that cannot be read is none: the trial starts anew."""
    for name, last in (("00000-1", 20), ("00001-1", 30), ("00002-0", 10)):
        write_metrics(run_folder(str(tmp_path), name), [{"iteration": 10 * n} for n in range(1, last // 10 + 1)])
    write_failure(run_folder(str(tmp_path), "00002-1"), Failure("nan", final=True))
    metrics, failure = tmp_path / "runs/00000-1/metrics.jsonl", tmp_path / "runs/00002-1/failure.json"
    for file in (metrics, failure):
        file.write_bytes(file.read_bytes()[:-7])
    tune.resume_search(str(tmp_path), None)
    ((resumed, again),) = driven
    assert again == {"pending", "running", "interrupted", "failed"}
    assert [trial.id for trial in resumed.trials] == ["00000-0", "00001-0", "00001-1", "00002-0", "00002-1"]
    lines = capsys.readouterr().out.splitlines()
    assert f"{failure}: damaged, and ignored" in lines and "  00002-1: failed, starts from scratch" in lines
    assert lines[-1].startswith(f"  00000-1: its records are damaged: {metrics}: damaged: line 2: ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 3}, "--samples 3: the search has 3 already; it can only be raised"),
        ({"samples": 2}, "--samples 2: the search has 3 already; it can only be raised"),
        ({"iterations": 30}, "--iterations 30: the search has 30 already; it can only be raised"),
        ({"iterations": 29}, "--iterations 29: the search has 30 already; it can only be raised"),
    ],
)
def test_a_search_is_not_made_smaller(
    tmp_path: Path, driven: list[tuple[Any, set[str]]], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as caught:
        tune.resume_search(str(tmp_path), None, **changes)
    assert str(caught.value) == message and not driven


def test_a_search_is_not_resumed_on_other_shards(
    tmp_path: Path, driven: list[tuple[Any, set[str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    other = SimpleNamespace(info={"settings": {"flow": "tvl1"}}, root="/shards", fingerprint="2")
    monkeypatch.setattr(tune, "open_shards", lambda data: other)
    with pytest.raises(UserError, match="/shards has other settings than the shards it was started on"):
        tune.resume_search(str(tmp_path), None)  # a record of an earlier version has no fingerprint
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "data_fingerprint": "1"}))
    with pytest.raises(UserError, match="/shards is another data set than it was started on"):
        tune.resume_search(str(tmp_path), None)
    assert not driven


def test_a_resumed_search_decides_again_how_many_gpus_a_worker_has(
    tmp_path: Path,
    driven: list[tuple[Any, set[str]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It was started before a GPU node was up; the nodes that are told once are told from then on."""
    asked: list[Any] = []

    def nodes(address: str | None, node_types: Any) -> Nodes:
        asked.append((address, list(node_types)))
        return Nodes([{"CPU": 4.0}], [{"GPU": 1.0}] if node_types else [], False)

    monkeypatch.setattr(tune, "cluster_nodes", nodes)
    tune.resume_search(str(tmp_path), "auto", node_types=["GPU=1"])
    assert asked == [("auto", ["GPU=1"])]
    assert "Workers have 1 GPUs on this cluster; they had 0 before" in capsys.readouterr().out
    ((resumed, _),) = driven
    assert (resumed.spec["gpus_per_worker"], resumed.spec["node_types"]) == (1.0, ["GPU=1"])
    file = tmp_path / "experiment.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "node_types": ["GPU=1"]}))
    tune.resume_search(str(tmp_path), None)
    assert asked[1:] == [(None, ["GPU=1"])]


def test_a_search_is_resumed_with_its_shards_in_another_place(
    tmp_path: Path, driven: list[tuple[Any, set[str]]], shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "open_shards", open_shards)
    moved = str(shutil.copytree(shards, tmp_path / "moved"))
    file = tmp_path / "experiment.json"
    spec = {**json.loads(file.read_text()), "data": "/gone", "data_fingerprint": open_shards(shards).fingerprint}
    file.write_text(json.dumps(spec))
    with pytest.raises(UserError, match=rf"/gone.*if the shards were moved: tune-ego resume {tmp_path} --data NEW"):
        tune.resume_search(str(tmp_path), None)
    tune.resume_search(str(tmp_path), None, data=moved)
    ((resumed, _),) = driven
    assert resumed.spec["data"] == moved


def test_a_trial_resumes_with_the_configuration_that_it_was_started_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The defaults of another version are in its file; of the search only the iterations count."""
    jobs: list[Job] = []
    monkeypatch.setattr(tune, "fit", lambda job, callbacks: jobs.append(job))
    monkeypatch.setattr("ray.tune.integration.ray_train.TuneReportCallback", lambda: "callback")
    space = parse_space(SPACE, "t", {"seed": 5})
    run, sampled = run_folder(str(tmp_path), "00001-1"), {"model.stam_depth@0": 2}
    draw = {"trial": "00001-1", "repeat": 1, "sampled": sampled}
    drawn = space.config(sampled, 1)
    started = override_config(drawn, {"model.dropout": 0.25, "train.iterations": 20}, "")
    storage.write_text(f"{run}/config.yaml", dump_config(started))
    trial = tune._trainable(space, "/shards", str(tmp_path), 0, "")
    trial(draw)
    assert jobs[0].config == override_config(started, {"train.iterations": 30}, "")
    storage.write_text(f"{run}/config.yaml", dump_config(started) + "new_key: 1\n")
    trial(draw)
    failure = read_failure(run)
    assert len(jobs) == 1 and failure is not None and not failure.final
    assert failure.reason.startswith(f"{run}/config.yaml: unknown key 'new_key'")
