"""Faults inside a search or run: other trials go on, the fault is reported, and nothing is left behind."""

from __future__ import annotations

import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import tiny_config
from tests.search.test_search import assert_it_went_on, assert_nothing_is_left, live_actors, write_space
from tune_ego.errors import UserError
from tune_ego.results.checkpoint_files import checkpoint_iterations
from tune_ego.results.driver import stop_uri
from tune_ego.results.experiment import read_failure, read_metrics
from tune_ego.results.trial_records import run_folder
from tune_ego.runs.job import Job
from tune_ego.runs.launch import fit
from tune_ego.search.export import export_best
from tune_ego.search.tune import resume_search, start_search

FAULTS = {
    "worker": "RayTrainWorker",
    "controller": "TrainController",
    "trial": "ImplicitFunc",
    "out of memory": "RayTrainWorker",
}
"""Whom it strikes: how the class of its actor ends; Tune's name for a trainable made from a function is the third."""


Lines = list[dict[str, Any]]


def strike_once(root: Path, fault: str) -> tuple[threading.Thread, Lines]:
    """Kill such a process of the first trial, or leave it without memory, when that has a checkpoint.

    Also returns what will be the lines of its metrics up to that.
    """
    run, before = run_folder(str(root), "00000"), Lines()

    def work() -> None:
        end = time.monotonic() + 120
        while not checkpoint_iterations(run):
            assert time.monotonic() < end, "no checkpoint"
            time.sleep(0.05)
        saved = checkpoint_iterations(run)[-1]
        before.extend(line for line in read_metrics(run) if line["iteration"] <= saved)
        (actor,) = [actor for actor in live_actors() if actor["ActorClassName"].endswith(FAULTS[fault])]
        if fault == "out of memory":
            resource.prlimit(actor["Pid"], resource.RLIMIT_AS, (1 << 20, 1 << 20))
        else:
            os.kill(actor["Pid"], signal.SIGKILL)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, before


LONG = {"train.iterations": 120, "train.validate_every": 20, "train.log_every": 1}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_trial_goes_on_when_one_of_its_processes_dies(
    tmp_path: Path, shards: str, ray_cluster: None, fault: str
) -> None:
    striker, before = strike_once(tmp_path / "search", fault)
    found = start_search(one_by_one(tmp_path, {}, **LONG), shards, str(tmp_path / "search"), {}, 0, 1, None)
    striker.join()
    assert [trial.state for trial in found.trials] == ["finished", "finished"]
    for trial in found.trials:
        assert [line["iteration"] for line in trial.metrics] == list(range(1, 121))
    assert_it_went_on(before, found.trials[0].metrics)
    assert_nothing_is_left()


@pytest.mark.slow
def test_a_trial_that_may_not_fail_again_has_failed_with_its_reason(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    striker, before = strike_once(tmp_path / "search", "worker")
    space = one_by_one(tmp_path, {}, **LONG, **{"compute.max_failures": 0})
    found = start_search(space, shards, str(tmp_path / "search"), {}, 0, 1, None)
    striker.join()
    assert [trial.state for trial in found.trials] == ["failed", "finished"]
    assert "died" in found.trials[0].reason or "failed" in found.trials[0].reason
    export_best(found.root, str(tmp_path / "best.yaml"))
    provenance = yaml.safe_load((tmp_path / "best.yaml").read_text())["provenance"]
    assert provenance["failed"] == {"00000": found.trials[0].reason}
    capsys.readouterr()
    resumed = resume_search(found.root, None)
    assert [trial.state for trial in resumed.trials] == ["finished", "finished"]
    assert_it_went_on(before, resumed.trials[0].metrics)
    assert "00000: failed, resumes from iteration" in capsys.readouterr().out
    assert_nothing_is_left()


def test_a_lack_of_gpu_memory_ends_a_run_at_its_first_start(
    tmp_path: Path, shards: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other errors of a worker are tried again. The step that lacks memory is replaced in the worker's process."""
    starts = tmp_path / "starts"

    def work(settings: dict[str, Any]) -> None:
        from tune_ego.runs import worker
        from tune_ego.training.trainer import Trainer

        def step(*_: Any) -> Any:
            with starts.open("a") as file:
                file.write("started\n")
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of ...")

        Trainer.step = step  # type: ignore[assignment, method-assign]
        worker.work(settings["job"])

    monkeypatch.setattr("tune_ego.runs.launch._work", work)
    config, run = tiny_config(streams="rgb", compute__max_failures=3), str(tmp_path / "run")
    reason = r"the GPU's memory is not enough \(CUDA out of memory\); raise train.accumulate, lower"
    with pytest.raises(UserError, match=reason) as caught:
        fit(Job(config, shards, run, 0, stop_uri(run), final=False))
    assert starts.read_text() == "started\n"
    assert read_failure(run) == (str(caught.value), False)
    assert_nothing_is_left()


def one_by_one(folder: Path, space: dict[str, Any], **changes: Any) -> str:
    """A search space without early stopping; `space` replaces what it searches."""
    path = Path(write_space(folder, **changes))
    content = yaml.safe_load(path.read_text())
    content["scheduler"] = {"name": "fifo"}
    path.write_text(yaml.safe_dump({**content, "space": space or content["space"]}, sort_keys=False))
    return str(path)
