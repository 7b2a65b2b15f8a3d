"""Signals that reach a worker between two iterations, and the size of what it reads ahead. No Ray is started."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tests.drivers import write_driver
from tests.training.test_step import ORIGIN, batch
from tune_ego.dataset.shards import open_shards
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.results.driver import is_taken_over, stop_uri
from tune_ego.runs import worker
from tune_ego.runs.job import Job
from tune_ego.runs.preemption import watch_signals
from tune_ego.runs.worker import describe_failure
from tune_ego.training.trainer import Signal, Trainer


class Preemption:
    """Ray's train context, as far as a worker looks at it."""

    def __init__(self) -> None:
        self.preemption_context: Any = SimpleNamespace(preemption_info=None)


@pytest.fixture
def preemption(monkeypatch: pytest.MonkeyPatch) -> Any:
    context = Preemption()
    monkeypatch.setattr("ray.train.v2._internal.execution.context.get_train_context", lambda: context)
    monkeypatch.setattr("tune_ego.runs.preemption._STOP_EVERY", 0.01)
    return context.preemption_context


def job(root: Path) -> Job:
    return Job(tiny_config(), "", str(root), 0, stop_uri(str(root)), final=False, claim="ours")


def wait_for(notice: Callable[[], Signal], expected: Signal) -> None:
    end = time.monotonic() + 10
    while notice() != expected:
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("sampling", "power"), [("uniform", 1.0), ("square_root", 0.5)])
def test_the_loss_knows_the_share_of_each_class(handmade_shards: str, sampling: str, power: float) -> None:
    """At equal scores the loss is the negative logarithm of the class's share to the power of tau, normalised."""
    config = tiny_config(data__sampling=sampling, data__crop=32, loss__logit_adjustment=0.5, streams="rgb")
    data = open_shards(handmade_shards)
    counts = [sum(clip.label == label for clip in data.train(config.data)) for label in range(4)]
    assert len(set(counts)) > 1 and min(counts) > 0
    plan = FeedPlan.from_config(handmade_shards, config, 1, 0)
    task = Job(config, handmade_shards, "", 0, "", final=False)
    trainer = worker._trainer(task, plan, data, torch.device("cpu"), 0, resume=False)
    weights = [math.sqrt(count**power) for count in counts]  # tau of a half is a power of a half of the shares
    loss = trainer.action_loss(torch.zeros(1, 4), torch.tensor([3]))
    assert loss.item() == pytest.approx(-math.log(weights[3] / sum(weights)), rel=1e-5)


def test_the_final_weights_are_the_moving_average(tmp_path: Path) -> None:
    config = tiny_config(train__ema=0.5, streams="rgb", train__precision="off")
    trainer = Trainer(config, ORIGIN, torch.device("cpu"))
    trainer.step(iter([batch(0, clips=4)]))
    task = Job(config, "", str(tmp_path), 0, "", final=True)
    weights = worker._final_weights(task, FeedPlan.from_config("", config, 1, 0), trainer)
    trained = trainer.model.state_dict()
    assert all(torch.equal(value, trainer.averaged_model.state_dict()[name]) for name, value in weights.items())
    assert any(not torch.equal(value, trained[name]) for name, value in weights.items())


def test_a_stop_file_stops_a_run_and_stays_a_reason_to(tmp_path: Path, preemption: Any) -> None:
    stop = tmp_path / "stop"
    with watch_signals(job(tmp_path), 0) as notice:
        time.sleep(0.05)
        assert notice() == Signal.NONE
        stop.write_text("")
        wait_for(notice, Signal.STOP)
        stop.unlink()
        preemption.preemption_info = "node 1 at 12:00"
        assert [notice() for _ in range(3)] == [Signal.STOP] * 3


def test_each_spot_notice_asks_for_one_checkpoint(tmp_path: Path, preemption: Any) -> None:
    """A second machine's notice is another one."""
    with watch_signals(job(tmp_path), 0) as notice:
        sent = [notice()]
        for info in ("node 1 at 12:00", "node 1 at 12:00", "node 2 at 12:01"):
            preemption.preemption_info = info
            sent += [notice(), notice()]
    assert sent == [0, 1, 0, 0, 0, 1, 0]


def test_only_the_first_worker_looks(tmp_path: Path, preemption: Any) -> None:
    (tmp_path / "stop").write_text("")
    preemption.preemption_info = "node 1 at 12:00"
    with watch_signals(job(tmp_path), 1) as notice:
        time.sleep(0.05)
        assert notice() == Signal.NONE


def test_an_object_store_that_does_not_answer_is_looked_at_again(
    tmp_path: Path, preemption: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def exists(uri: str) -> bool:
        looks.append(uri)
        if len(looks) < 3:
            raise OSError("503")
        return len(looks) > 3

    monkeypatch.setattr("tune_ego.runs.preemption.storage.exists", exists)
    with watch_signals(job(tmp_path), 0) as notice:
        wait_for(notice, Signal.STOP)


@pytest.mark.parametrize(("there", "ends"), [("other", True), ("ours", False), (None, False)])
def test_a_worker_of_a_driver_that_was_replaced_ends_at_once(
    tmp_path: Path, preemption: Any, there: str | None, ends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No record: the driver is about to end."""
    ended: list[int] = []
    monkeypatch.setattr("tune_ego.runs.preemption.os._exit", ended.append)
    monkeypatch.setattr("tune_ego.runs.preemption._DRIVER_EVERY", 2)
    if there is not None:
        write_driver(tmp_path, id=there)
    assert is_taken_over(str(tmp_path), "ours") is ends and not is_taken_over(str(tmp_path), "")
    with watch_signals(job(tmp_path), 0):
        end = time.monotonic() + (10 if ends else 0.2)
        while not ended and time.monotonic() < end:
            time.sleep(0.01)
    assert ended[:1] == ([1] if ends else [])


@pytest.mark.parametrize(
    ("streams", "encoded", "expected"),
    [
        ("both", False, 4 * 16 * 32 * 32 * 5),  # windows, frames, pixels, channels: 3 of rgb and 2 of flow
        ("rgb", False, 4 * 16 * 32 * 32 * 3),
        ("flow", False, 4 * 16 * 32 * 32 * 2),
        ("both", True, 4 * 1024 * 1024),
    ],
)
def test_the_bytes_of_a_batch(streams: str, encoded: bool, expected: int) -> None:
    for frames in (16, 32):
        config = tiny_config(streams=streams, data__window_frames=frames)
        plan = FeedPlan.from_config("", config, 1, 0, encoded=encoded)
        assert worker._batch_bytes(plan) == expected * frames // 16


def test_a_lack_of_gpu_memory_comes_with_advice() -> None:
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ...")
    reason = describe_failure(error)
    assert reason.startswith("the GPU's memory is not enough (CUDA out of memory); raise train.accumulate, lower")
    assert "train.activation_checkpointing: true" in reason
    assert describe_failure(error, "s3d").endswith("lower train.batch_size")  # checkpointing is for I3D alone
    assert describe_failure(ValueError("other. And more")) == "other. And more"
