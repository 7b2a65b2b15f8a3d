"""Final runs with real Ray: several workers, as many as there are, averaged weights, the test at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.conftest import tiny_config
from tests.test_search import assert_nothing_is_left
from tune_ego.checkpoint import mean_weights, read_checkpoint
from tune_ego.errors import UserError
from tune_ego.evaluate import evaluate
from tune_ego.experiment import METRIC, checkpoint_iterations, checkpoint_uri, read_metrics
from tune_ego.feed.batches import READER_CPUS
from tune_ego.final import train_final


def test_the_batch_is_the_same_however_many_workers_there_are(tmp_path: Path, shards: str, ray_cluster: None) -> None:
    """Two workers on all CPUs, one after the other's share in one worker, and one where one or two were asked for."""
    fixed = {"compute__workers": 2, "compute__cpus_per_worker": 1 - READER_CPUS}  # nothing is left for other tasks
    alone = {"train__accumulate": 2}
    elastic = {"compute__workers": [1, 2], "compute__cpus_per_worker": 1.0}  # no room for two and readers
    losses = []
    for name, changes in (("fixed", fixed), ("alone", alone), ("elastic", elastic)):
        run = str(tmp_path / name)
        train_final(tiny_config(train__iterations=3, train__validate_every=3, **changes), shards, run, None)
        lines = read_metrics(run)
        assert [line["iteration"] for line in lines] == [1, 2, 3]
        assert METRIC in lines[-1]
        losses.append([line["train_loss"] for line in lines])
        assert_nothing_is_left()
    assert losses[2] == losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


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
