"""The checks before a run, and the outcome of one, without Ray: `trainer` stands for Ray's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ray.train import ControllerError

from tests.conftest import tiny_config
from tune_ego import ray_private
from tune_ego.config_io import load_config, override_config
from tune_ego.errors import Interrupted, UserError
from tune_ego.model import build_stream
from tune_ego.results import experiment
from tune_ego.results.checkpoint_files import CHECKPOINT_FILE, CHECKSUM_FILE, checkpoint_uri
from tune_ego.results.experiment import Failure, read_failure, write_failure
from tune_ego.runs.job import Job
from tune_ego.runs.launch import check_run, describe_micro_batches, fit, initial_weights, resolve_run, resolve_weights
from tune_ego.runs.placement import placement_group_prefix


def start(monkeypatch: pytest.MonkeyPatch, run: Path, work: Any = lambda: None, **changes: Any) -> dict[str, Any]:
    """Call `fit` with a trainer that does `work`; return what Ray's trainer was made with."""
    made: dict[str, Any] = {}

    class Trainer:
        def __init__(self, body: Any, **settings: Any) -> None:
            made.update(settings)

        def fit(self) -> None:
            work()

    def trainer_class(name: str, workers: int) -> Any:
        made.update(group_prefix=name, most_workers=workers)
        return Trainer

    monkeypatch.setattr(ray_private, "trainer_class", trainer_class)
    config = tiny_config(**changes)
    fit(Job(config, "shards", str(run), 0.5 if changes else 0, f"{run}/stop", final=False))
    return made


def saves(run: Path, iteration: int) -> Any:
    def work() -> None:
        for file in (CHECKPOINT_FILE, CHECKSUM_FILE):
            path = Path(checkpoint_uri(str(run), iteration, file))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    return work


def test_a_run_is_started_as_its_configuration_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run = tmp_path / "results" / "name"
    changes = {"compute__workers": [1, 2], "compute__max_failures": 7, "compute__readers": 2}
    made = start(monkeypatch, run, saves(run, 6), compute__cpus_per_worker=2.0, **changes)
    scaling, running = made["scaling_config"], made["run_config"]
    assert (scaling.num_workers, scaling.use_gpu) == ((1, 2), True)
    assert scaling.resources_per_worker == {"CPU": 2.5, "GPU": 0.5}  # two readers take a quarter of a CPU each
    assert (running.name, running.storage_path) == ("name", str(tmp_path / "results"))
    assert running.failure_config.max_failures == 7
    assert running.failure_config.max_preemption_failures == -1
    assert (made["group_prefix"], made["most_workers"]) == (placement_group_prefix(str(run)), 2)
    assert load_config(run / "config.yaml") == made["train_loop_config"]["job"].config


def test_a_run_without_its_last_checkpoint_was_interrupted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for iteration in (2, 5):
        with pytest.raises(Interrupted):
            start(monkeypatch, tmp_path, saves(tmp_path, iteration))
    start(monkeypatch, tmp_path, saves(tmp_path, 6))


def test_a_failure_that_is_final_is_not_tried_again_and_another_is(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_failure(str(tmp_path), Failure("the disk was full", final=False))
    start(monkeypatch, tmp_path, saves(tmp_path, 6))
    assert read_failure(str(tmp_path)) is None
    write_failure(str(tmp_path), Failure("iteration 3: a loss is nan", final=True))
    with pytest.raises(UserError, match="iteration 3: a loss is nan"):
        start(monkeypatch, tmp_path, lambda: pytest.fail("tried again"))


def test_a_failure_of_the_run_is_its_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whether Ray's trainer ends without an error or with one."""

    def fails(*, loudly: bool) -> None:
        write_failure(str(tmp_path), Failure("a shard is damaged", final=False))
        if loudly:
            raise ControllerError(RuntimeError("workers died"))

    for loudly in (False, True):
        with pytest.raises(UserError, match=r"^a shard is damaged$"):
            start(monkeypatch, tmp_path, lambda loudly=loudly: fails(loudly=loudly))


def test_another_error_of_ray_is_told_in_short_and_kept_in_full(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails() -> None:
        raise ControllerError(RuntimeError("the node is gone"))

    with pytest.raises(UserError, match=rf"^{tmp_path}: .*the node is gone.* \(all of it in error\.txt there\)"):
        start(monkeypatch, tmp_path, fails)
    assert "the node is gone" in (tmp_path / experiment.ERROR_FILE).read_text()


def weights(folder: Path, **about: Any) -> str:
    """A file of a flow stream's weights, of 4 classes."""
    state = build_stream("flow", 4, tiny_config().model).state_dict()
    torch.save({**about, "state_dict": state}, folder / "flow.pt")
    return str(folder / "flow.pt")


def test_only_the_streams_that_train_have_starting_weights() -> None:
    paths = {"init_from__rgb": "/a.pt", "init_from__flow": "/b.pt"}
    assert initial_weights(tiny_config(**paths)) == {"rgb": "/a.pt", "flow": "/b.pt"}
    assert initial_weights(tiny_config(**paths, streams="flow")) == {"flow": "/b.pt"}
    assert initial_weights(tiny_config(init_from__rgb="/a.pt")) == {"rgb": "/a.pt"}


def test_starting_weights_of_another_flow_are_refused(
    tmp_path: Path, handmade_shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that does not say which flow it is of is taken."""
    config = tiny_config(init_from__flow=weights(tmp_path, flow_method="tvl1"))
    with pytest.raises(UserError, match=r"flow\.pt: trained on tvl1 flow, .* has dis"):
        check_run(config, handmade_shards)
    for about in ({}, {"flow_method": "dis"}):
        check_run(tiny_config(init_from__flow=weights(tmp_path, **about)), handmade_shards)
        assert "flow starts from" in capsys.readouterr().out


def test_settings_that_this_torch_or_a_random_trunk_does_not_allow(
    tmp_path: Path, handmade_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = {"train__freeze_trunk_for": 5, "streams": "flow"}
    with pytest.raises(
        UserError, match=r"freeze_trunk_for: without starting weights the trunk of flow would be frozen"
    ):
        check_run(tiny_config(**frozen), handmade_shards)
    check_run(tiny_config(**frozen, init_from__flow=weights(tmp_path)), handmade_shards)
    check_run(tiny_config(optimizer__name="muon"), handmade_shards)
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"muon needs torch 2\.9"):
        check_run(tiny_config(optimizer__name="muon"), handmade_shards)


def test_starting_weights_are_absolute_files_and_a_folder_keeps_its_meaning(tmp_path: Path) -> None:
    """A run's folder means its final weights; of a run that resumes, the file that it meant at the first start."""
    run = tmp_path / "run"
    saved, final = run / "iteration-000002" / "checkpoint.pt", run / "final" / "model.pt"
    for file in (saved, final):
        file.parent.mkdir(parents=True)
        file.write_bytes(b"x")
    config = tiny_config(init_from__rgb=str(run))
    assert resolve_weights(config).init_from.rgb == str(final)
    before = tiny_config(init_from__rgb=str(saved))
    assert resolve_weights(config, before) == before
    other = tiny_config(init_from__rgb=str(tmp_path / "runs" / "checkpoint.pt"))
    assert resolve_weights(config, other).init_from.rgb == str(final)
    assert resolve_weights(tiny_config()) == tiny_config()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, ""),
        ({"compute__workers": 1, "train__batch_size": 48}, ""),
        (
            {"compute__workers": 4},
            "Note: 4 workers: 3 samples in a forward pass instead of 12, and BatchNorm",
        ),
        ({"compute__workers": 4}, "on GPUs model.sync_bn: true normalises over all workers"),
    ],
)
def test_smaller_passes_are_noted(changes: dict[str, Any], words: str) -> None:
    note = describe_micro_batches(
        tiny_config(train__batch_size=12), tiny_config(**{"train__batch_size": 12, **changes})
    )
    assert words in note and bool(words) == bool(note)


def test_the_setting_that_keeps_the_passes_is_named() -> None:
    before = tiny_config(train__batch_size=48, train__accumulate=4)
    note = describe_micro_batches(before, override_config(before, {"compute.workers": 2}, ""))
    assert note.endswith("To keep 12: --set train.accumulate=2")
    kept = override_config(before, {"compute.workers": 2, "train.accumulate": 2}, "")
    assert describe_micro_batches(before, kept) == ""


def test_a_resumed_run_does_not_need_its_starting_weights(handmade_shards: str, tmp_path: Path) -> None:
    config = tiny_config(init_from__rgb=str(tmp_path / "gone.pt"))
    with pytest.raises(UserError, match=r"gone\.pt"):
        resolve_run(config, handmade_shards)
    assert resolve_run(config, handmade_shards, before=config) == config
