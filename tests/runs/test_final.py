"""Final runs with real Ray: several workers, as many as there are, averaged weights, the test at the end."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import ray
import torch

from tests.conftest import tiny_config
from tests.search.test_search import assert_nothing_is_left
from tune_ego import __version__, storage
from tune_ego.config import Config
from tune_ego.config_io import dump_config
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import Interrupted, UserError
from tune_ego.evaluation.evaluate import evaluate
from tune_ego.feed.batches import batches_to_device
from tune_ego.feed.feed_plan import FeedPlan, read_items
from tune_ego.results.checkpoint_files import checkpoint_iterations, checkpoint_uri
from tune_ego.results.driver import stop_uri
from tune_ego.results.experiment import METRIC, read_metrics
from tune_ego.runs import final
from tune_ego.runs.final import train_final
from tune_ego.runs.job import Job
from tune_ego.runs.launch import fit
from tune_ego.runs.placement import READER_CPUS
from tune_ego.training.checkpoint import Origin, mean_weights, read_checkpoint
from tune_ego.training.trainer import Trainer


@pytest.mark.slow
def test_the_batch_is_the_same_however_many_workers_there_are(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    """One or two workers: with room for two, two; else one makes both passes. The losses are those of a loop without
    Ray that makes both passes of each iteration. The final weights are the moving average of the last checkpoint."""
    half = ray.cluster_resources()["CPU"] / 2 - READER_CPUS
    changes = {"train__iterations": 3, "train__validate_every": 3, "optimizer__lr": 1e-6}  # rounding does not grow
    changes["train__ema"] = 0.5
    alone = tiny_config(train__accumulate=2, **changes)
    plan, trainer = FeedPlan.from_config(shards, alone, 1, 0), trainer_for(alone, shards)
    losses = []
    batches = batches_to_device(read_items(plan, range(plan.item_count)), torch.device("cpu"))
    for _ in range(3):
        losses.append(trainer.step(batches)[:, 0].sum().item())
    for name, cpus in (("wide", half), ("narrow", half + 0.1)):
        run = str(tmp_path / name)
        elastic = tiny_config(compute__workers=[1, 2], compute__cpus_per_worker=cpus, **changes)
        train_final(elastic, shards, run, None)
        lines = read_metrics(run)
        assert [line["iteration"] for line in lines] == [1, 2, 3]
        assert METRIC in lines[-1]
        assert [line["train_loss"] for line in lines] == pytest.approx(losses, rel=1e-5)
        last = read_checkpoint(checkpoint_uri(run, 3))
        weights = torch.load(f"{run}/final/model.pt", weights_only=True)
        assert all(torch.equal(weights[name], value) for name, value in last["model"].items())
        assert any(not torch.equal(weights[name], value) for name, value in last["training_weights"].items())
        assert_nothing_is_left()


def trainer_for(config: Config, shards: str) -> Trainer:
    data = open_shards(shards)
    return Trainer(config, Origin(data.actions, data.image_size, "dis"), torch.device("cpu"))


def test_two_workers_stop_together_also_where_spot_notices_are_watched(
    tmp_path: Path, shards: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that was stopped before its end has a checkpoint and no final weights."""
    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    config = tiny_config(
        compute__workers=2, compute__cpus_per_worker=0.5, train__iterations=2000, train__validate_every=2000
    )
    run = str(tmp_path / "run")
    storage.write_text(stop_uri(run), "")
    with pytest.raises(Interrupted):
        fit(Job(config, shards, run, 0, stop_uri(run), final=True))
    (saved,) = checkpoint_iterations(run)
    assert 0 < saved < 2000
    assert not storage.exists(storage.join(run, "final"))
    assert_nothing_is_left()


def started_run(folder: Path, shards: str, config: Config) -> str:
    """A run that was started on these shards, as `train` leaves it after a kill."""
    storage.write_text(str(folder / "run" / "config.yaml"), dump_config(config))
    storage.write_json(str(folder / "run" / "run.json"), {"data": shards, "version": "0"})
    return str(folder / "run")


def test_a_run_resumes_on_the_same_shards_in_another_place(tmp_path: Path, shards: str, handmade_shards: str) -> None:
    """Compared is the content of the data set; the new place is on record."""
    config = tiny_config()
    run = started_run(tmp_path, shards, config)
    record = {"data": shards, "data_fingerprint": open_shards(shards).fingerprint, "version": "0"}
    storage.write_json(f"{run}/run.json", record)
    moved = str(shutil.copytree(shards, tmp_path / "moved"))
    with pytest.raises(UserError, match=f"{run}: {handmade_shards} is another data set than it was started on"):
        final._check_same_run(config, handmade_shards, run)
    final._check_same_run(tiny_config(compute__readers=3, data__cache_gb=1.0), moved, run)
    final._write_record(run, moved)
    assert storage.read_json(f"{run}/run.json") == {**record, "data": moved, "resumed_with": [__version__]}


@pytest.mark.parametrize("change", ["settings", "classes", "clips"])
def test_a_fingerprint_is_that_of_the_content(change: str, shards: str, tmp_path: Path) -> None:
    data = open_shards(shards)
    moved = open_shards(str(shutil.copytree(shards, tmp_path / "moved")))
    assert moved.fingerprint == data.fingerprint
    info = json.loads(json.dumps(moved.info))
    if change == "settings":
        info["settings"]["flow"] = "tvl1"
    elif change == "classes":
        info["actions"] = info["actions"][::-1]
    table = moved.table.slice(1) if change == "clips" else moved.table
    assert dataclasses.replace(moved, info=info, table=table).fingerprint != data.fingerprint


def test_a_run_does_not_go_on_with_other_shards_or_another_configuration(tmp_path: Path, shards: str) -> None:
    other = shutil.copytree(shards, tmp_path / "other")
    config = tiny_config()
    run = started_run(tmp_path, shards, config)
    before = {path: path.read_bytes() for path in Path(run).iterdir()}
    with pytest.raises(UserError, match=rf"started on the shards {shards}, not {other}"):
        train_final(config, str(other), run, None)
    with pytest.raises(UserError, match=r"already used by a run of another configuration \(optimizer.lr\)"):
        train_final(tiny_config(optimizer__lr=0.5, compute__readers=2), shards, run, None)
    assert {path: path.read_bytes() for path in Path(run).iterdir()} == before
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "file").write_text("")
    with pytest.raises(UserError, match="not empty and holds no run"):
        train_final(config, shards, str(tmp_path / "foreign"), None)


def test_averaged_weights_are_tested_at_the_end(
    tmp_path: Path, shards: str, ray_cluster: None, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config(train__iterations=8, train__average_checkpoints=3, streams="rgb")
    run = str(tmp_path / "run")
    weights = torch.load(train_final(config, shards, run, None, test=True), weights_only=True)
    assert {4, 6, 8} <= set(checkpoint_iterations(run))
    states = [read_checkpoint(checkpoint_uri(run, iteration))["model"] for iteration in (4, 6, 8)]
    name = "rgb.Mixed_5c.b0.conv3d.weight"
    torch.testing.assert_close(weights[name], (states[0][name] + states[1][name] + states[2][name]) / 3)
    assert not torch.equal(weights[name], states[2][name])
    assert_nothing_is_left()

    assert "Test of split 1" in capsys.readouterr().out
    written = (tmp_path / "run" / "evaluation.json").read_bytes()
    assert evaluate(run, shards)["checkpoint"].endswith("final/model.pt")
    assert (tmp_path / "run" / "evaluation.json").read_bytes() == written
    last = evaluate(f"{run}/iteration-000008", shards, out=str(tmp_path / "last.json"))
    assert last["checkpoint"].endswith("iteration-000008/checkpoint.pt")
    assert mean_weights(run, [8]).keys() == weights.keys()
    train_final(config, shards, run, None, test=True)
    assert "finished already" in capsys.readouterr().out


def test_elastic_workers_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(UserError, match=r"compute.workers = \[3, 2\]: expected \[least, most\]"):
        tiny_config(compute__workers=[3, 2])
