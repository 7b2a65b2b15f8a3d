"""Final runs with real Ray: several workers, as many as there are, averaged weights, the test at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import torch

from tests.conftest import tiny_config
from tests.test_search import assert_nothing_is_left
from tune_ego import storage
from tune_ego.checkpoint import mean_weights, read_checkpoint
from tune_ego.checkpoint_files import checkpoint_iterations, checkpoint_uri
from tune_ego.driver import stop_uri
from tune_ego.errors import Interrupted, UserError
from tune_ego.evaluate import evaluate
from tune_ego.experiment import METRIC, read_metrics
from tune_ego.final import train_final
from tune_ego.launch import Job, fit
from tune_ego.placement import READER_CPUS


def test_the_batch_is_the_same_however_many_workers_there_are(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    """Two workers on all CPUs, nothing left for other tasks; one for both; and one or two, without and with room."""
    half = ray.cluster_resources()["CPU"] / 2 - READER_CPUS
    wide = {"compute__workers": 2, "compute__cpus_per_worker": half}
    alone = {"train__accumulate": 2}
    elastic = {"compute__workers": [1, 2]}
    narrow = {**elastic, "compute__cpus_per_worker": half + 0.1}
    losses = []
    for name, changes in (("wide", wide), ("alone", alone), ("narrow", narrow), ("elastic", {**wide, **elastic})):
        run = str(tmp_path / name)
        train_final(tiny_config(train__iterations=3, train__validate_every=3, **changes), shards, run, None)
        lines = read_metrics(run)
        assert [line["iteration"] for line in lines] == [1, 2, 3]
        assert METRIC in lines[-1]
        losses.append([line["train_loss"] for line in lines])
        assert_nothing_is_left()
    wide_losses, alone_losses, narrow_losses, elastic_losses = losses
    assert narrow_losses == alone_losses
    assert elastic_losses == wide_losses
    assert wide_losses == pytest.approx(alone_losses, rel=1e-5)


def test_two_workers_stop_together_also_where_spot_notices_are_watched(
    tmp_path: Path, shards: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    assert_nothing_is_left()


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
