"""Two training processes (gloo, no Ray): what they share, and what each does alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from tests import literal
from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tune_ego.feed.batches import ClipBatch
from tune_ego.results.experiment import METRIC
from tune_ego.training.trainer import NonFiniteLoss, Signal, Trainer

CHANGES = {"train__precision": "off", "model__attention_scale": "subtract_min", "optimizer__lr": 1e-3}
CONFIG = tiny_config(compute__workers=2, **CHANGES)
"""Two passes of two clips in an iteration, one for each worker."""
ITERATIONS = 3
LABELS = [0, 1, 2, 0, 1, 2, 2]
"""The validation clips' labels. Clip n has one window, but clip 0 has two: the 8 rows of `WINDOWS`."""
WINDOWS = [0, 1, 2, 3, 4, 5, 6, 0]
"""Clip of each validation window. Worker 0 takes rows 0, 1, 4, 5 and worker 1 takes rows 2, 3, 6, 7."""


class Validation:
    """The part of a `FeedPlan` that a validation uses."""

    validation_items = 2
    validation_labels = LABELS


def training_batch(iteration: int, worker: int) -> ClipBatch:
    return batch(10 * iteration + worker, clips=2)


def validation_row(row: int) -> ClipBatch:
    return batch(100 + row)._replace(clip_B=torch.tensor([WINDOWS[row]]))


def validation_batches(rank: int) -> Iterator[ClipBatch]:
    for item in range(2):
        first, second = (validation_row(4 * item + 2 * rank + place) for place in range(2))
        yield ClipBatch(*(torch.cat([a, b]) for a, b in zip(first, second) if a is not None and b is not None))


@contextmanager
def double_precision() -> Iterator[None]:
    """Models and clips in float64: rounding would grow over the steps of so small a net."""
    single = ClipBatch.model_input

    def double(batch: ClipBatch) -> dict[str, torch.Tensor]:
        return {name: clip.double() for name, clip in single(batch).items()}

    ClipBatch.model_input = double  # type: ignore[method-assign,assignment]
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        ClipBatch.model_input = single  # type: ignore[method-assign]
        torch.set_default_dtype(torch.float32)


def work(rank: int, folder: str) -> None:
    """Body of a worker: writes `<rank>.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with double_precision():
            torch.save(results(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def sensitive(trainer: Trainer) -> Trainer:
    """Make the classifiers' weights so large that small changes of what comes before are seen in the scores."""
    for modality in ("rgb", "flow"):
        trainer.model.get_parameter(f"{modality}.logits.conv3d.weight").data.mul_(30)
    return trainer


def results(rank: int) -> dict[str, Any]:
    trainer = sensitive(Trainer(CONFIG, ORIGIN, CPU, rank))
    signals, own = [], []
    for iteration in range(ITERATIONS):
        sent = Signal.STOP if rank == 0 and iteration == 1 else Signal.NONE
        own.append(trainer.step(iter([training_batch(iteration, rank)]), sent))
        signals.append(trainer.signal)
    mean_losses = trainer.reduce_losses()
    metrics = trainer.validate(validation_batches(rank), Validation())  # type: ignore[arg-type]
    model = {name: value.clone() for name, value in trainer.checkpoint()["model"].items()}
    spoilt = training_batch(9, rank)
    if rank == 1:
        trainer.model.get_parameter("flow.logits.conv3d.bias").data[0] = torch.nan
    before = [parameter.detach().nan_to_num() for parameter in trainer.model.parameters()]
    try:
        trainer.step(iter([spoilt]))
        reason = "no error"
    except NonFiniteLoss as error:
        reason = str(error)
    after = [parameter.detach().nan_to_num() for parameter in trainer.model.parameters()]
    parallel: Any = trainer.parallel
    return {
        "settings": (parallel.broadcast_buffers, parallel.gradient_as_bucket_view),
        "signals": signals,
        "own": own,
        "mean": mean_losses,
        "metrics": metrics,
        "best": trainer.best,
        "model": model,
        "reason": reason,
        "unmoved": all(map(torch.equal, before, after)),
    }


TUNED = {
    "optimizer__name": "adamw",
    "train__clip_norm": 0.05,
    "train__freeze_trunk_for": 1,
    "train__ema": 0.5,
    "model__freeze_trunk_norms": True,
}


def work_tuned(rank: int, folder: str) -> None:
    """Body of a worker with clipped gradients, a frozen trunk and a moving average: writes `<rank>.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        with double_precision():
            trainer = sensitive(Trainer(tiny_config(compute__workers=2, **CHANGES, **TUNED), ORIGIN, CPU, rank))
            for iteration in range(ITERATIONS):
                trainer.step(iter([training_batch(iteration, rank)]))
            trainer.flush_status()
            torch.save(trainer.checkpoint(), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """`results` of the two workers."""
    folder = tmp_path_factory.mktemp("workers")
    spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def test_they_step_together_as_one_worker_with_both_batches(both: list[dict[str, Any]]) -> None:
    """One worker that makes both passes of an iteration itself has the same losses and the same weights."""
    with double_precision():
        alone = sensitive(Trainer(tiny_config(train__accumulate=2, **CHANGES), ORIGIN, CPU))
        batches = [[training_batch(iteration, worker) for worker in range(2)] for iteration in range(ITERATIONS)]
        losses = [alone.step(iter(passes)) for passes in batches]
    for iteration, loss in enumerate(losses):
        of_workers = [worker["own"][iteration] for worker in both]
        torch.testing.assert_close((of_workers[0] + of_workers[1]) / 2, loss, rtol=1e-5, atol=1e-7)
        for worker in both:
            torch.testing.assert_close(worker["mean"][iteration], loss, rtol=1e-5, atol=1e-7)
    for name, value in alone.model.named_parameters():
        assert torch.equal(both[0]["model"][name], both[1]["model"][name]), name
        torch.testing.assert_close(both[0]["model"][name], value, rtol=1e-4, atol=1e-6)
    # The running statistics differ by terms of the second order in the momentum, 0.1. Those of a worker whose momentum
    # is not adjusted to its passes would have kept 0.9^3 of their start, 1, instead of 0.9^6.
    for name, buffer in alone.model.named_buffers():
        if name.endswith("running_var"):
            assert both[0]["model"][name].mean() == pytest.approx(buffer.mean().item(), rel=0.05), name


def test_no_worker_s_buffers_are_broadcast_and_gradients_are_not_copied(both: list[dict[str, Any]]) -> None:
    """Broadcast buffers would hide that statistics differ: those of worker 0 would win."""
    assert both[0]["settings"] == both[1]["settings"] == (False, True)


def test_each_loss_is_of_the_worker_s_own_batch(both: list[dict[str, Any]]) -> None:
    """Before the first step, when nothing has been trained: the literal losses of each worker's clips."""
    with double_precision():
        start = Trainer(CONFIG, ORIGIN, CPU, 0)
        batches = [training_batch(0, worker) for worker in range(2)]  # their gaze depends on the default type
    states = {name: dict(stream.state_dict()) for name, stream in start.model.items()}
    for rank, worker in enumerate(both):
        one = batches[rank]
        for row, (modality, state) in zip(worker["own"][0].tolist(), states.items()):
            clip = clips_of(one)[modality]
            _, attention = literal.stream(state, clip, 1, how="subtract_min", training=True)
            assert attention is not None
            gaze = literal.gaze_loss(attention, one.gaze_BT2, one.gaze_valid_BT, CONFIG.loss.gaze_sigma)
            assert row[2] == pytest.approx(gaze.item(), rel=1e-5)
            assert row[0] == pytest.approx(row[1] + 0.1 * row[2], rel=1e-5)


def clips_of(one: ClipBatch) -> dict[str, torch.Tensor]:
    assert one.rgb_BTHWC is not None and one.flow_BT2HW is not None
    rgb, flow = one.rgb_BTHWC.permute(0, 4, 1, 2, 3), one.flow_BT2HW.permute(0, 2, 1, 3, 4)
    return {"rgb": rgb.double() / 127.5 - 1, "flow": flow.double() / 127.5 - 1}


def test_a_validation_is_over_all_windows_with_the_weights_that_are_saved(both: list[dict[str, Any]]) -> None:
    """BatchNorm statistics of both workers; the mean over a clip's windows, then over clips and classes."""
    assert both[0]["model"].keys() == both[1]["model"].keys()
    scores: dict[str, torch.Tensor] = {}
    for modality in ("rgb", "flow"):
        prefix = f"{modality}."
        state = {k.removeprefix(prefix): v for k, v in both[0]["model"].items() if k.startswith(prefix)}
        sums = torch.zeros(len(LABELS), 3, dtype=torch.float64)
        for row, clip in enumerate(WINDOWS):
            logits, _ = literal.stream(state, clips_of(validation_row(row))[modality], 1, how="subtract_min")
            sums[clip] += torch.softmax(logits[0].double(), 0) / WINDOWS.count(clip)
        scores[modality] = sums
    scores["fused"] = (scores["rgb"] + scores["flow"]) / 2
    expected = {
        f"{METRIC}_{name}": literal.mean_class_accuracy(value.argmax(1).tolist(), LABELS)
        for name, value in scores.items()
    }
    predicted = scores["fused"].argmax(1).tolist()
    expected[METRIC] = expected[f"{METRIC}_fused"]
    expected["val_micro_accuracy"] = sum(p == t for p, t in zip(predicted, LABELS)) / len(LABELS)
    own = [[scores[name][clip, label].log().item() for clip, label in enumerate(LABELS)] for name in ("rgb", "flow")]
    expected["val_loss"] = -sum(map(sum, own)) / len(LABELS)
    for worker in both:
        assert worker["metrics"] == pytest.approx(expected, rel=1e-5)
        assert worker["best"] == {"iteration": ITERATIONS, METRIC: expected[METRIC]}
    buffers = [name for name in both[0]["model"] if name.endswith("running_mean")]
    assert buffers and all(torch.equal(both[0]["model"][name], both[1]["model"][name]) for name in buffers)


def test_a_stop_signal_of_one_worker_reaches_the_other(both: list[dict[str, Any]]) -> None:
    assert [worker["signals"] for worker in both] == [[0, 2, 0], [0, 2, 0]]


def test_a_loss_of_one_worker_that_is_not_finite_ends_both_before_their_step(both: list[dict[str, Any]]) -> None:
    assert both[0]["reason"] == "" and both[0]["unmoved"] and both[1]["unmoved"]
    assert both[1]["reason"] == "iteration 4: action loss of the flow stream is nan; a lower optimizer.lr may help"


def test_clipping_freezing_and_averaging_are_those_of_one_worker(tmp_path: Path) -> None:
    """Gradients are clipped after their mean over the workers, and a trunk without gradients does not hang them."""
    spawn(work_tuned, (str(tmp_path),), nprocs=2)
    ours = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    with double_precision():
        alone = sensitive(Trainer(tiny_config(train__accumulate=2, **CHANGES, **TUNED), ORIGIN, CPU))
        start = {name: value.clone() for name, value in alone.model.named_parameters()}
        for iteration in range(ITERATIONS):
            alone.step(iter([training_batch(iteration, worker) for worker in range(2)]))
    average = dict(alone.averaged_model.named_parameters())
    for name, value in alone.model.named_parameters():
        for one in ours:
            torch.testing.assert_close(one["training_weights"][name], value, rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(one["model"][name], average[name].detach(), rtol=1e-4, atol=1e-6)
    moved = {
        name.split(".")[1] for name, value in alone.model.named_parameters() if not torch.equal(value, start[name])
    }
    assert {"Mixed_5c", "attention_pred", "logits"} <= moved
    statistics = ours[0]["training_weights"]["rgb.Mixed_5c.b0.bn.running_mean"]
    assert not statistics.any() and ours[0]["training_weights"]["rgb.attention_pred.bn.running_mean"].any()
