"""The training loop without Ray."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.checkpoint import Origin, read_checkpoint, to_bytes
from tune_ego.config import Config
from tune_ego.dataset.shards import open_shards
from tune_ego.feed.batches import on_device
from tune_ego.feed.windows import FeedPlan, read_items
from tune_ego.train import METRIC, NonFiniteLoss, Trainer, autocast_dtype, train

CPU = torch.device("cpu")


def origin(shards: str) -> Origin:
    data = open_shards(shards)
    return Origin(data.actions, data.image_size, "dis")


def run(
    config: Config, shards: str, content: dict[str, Any] | None = None
) -> tuple[Trainer, list[dict[str, Any]], list[Any]]:
    """(trainer at the end, metrics, checkpoints as they were when reported)."""
    trainer = Trainer(config, origin(shards), CPU)
    if content is not None:
        trainer.load(content, "test")
    plan = FeedPlan.of(shards, config, 1, 0)
    lines, checkpoints = [], []

    def report(metrics: dict[str, Any], checkpoint: dict[str, Any] | None) -> None:
        lines.append({key: value for key, value in metrics.items() if key != "clips_per_second"})
        if checkpoint is not None:
            checkpoints.append(to_bytes(checkpoint))

    items = range(plan.first_item(trainer.iteration), plan.items)
    train(trainer, plan, on_device(read_items(plan, items), CPU), report)
    return trainer, lines, checkpoints


@pytest.mark.parametrize("schedule", ["plateau", "multistep"])
@pytest.mark.parametrize("optimizer", ["ranger", "sgd"])
def test_a_resumed_run_equals_one_that_was_not(
    shards: str, optimizer: str, schedule: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    config = tiny_config(optimizer__name=optimizer, schedule__name=schedule, train__accumulate=2)
    if schedule == "multistep":
        config = config.model_copy(update={"schedule": config.schedule.model_copy(update={"milestones": (3, 5)})})
    whole, lines, checkpoints = run(config, shards)
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["iteration"] for line in lines if METRIC in line] == [2, 4, 6]
    for place, content in enumerate(checkpoints):
        folder = tmp_path_factory.mktemp("checkpoint")
        (folder / "checkpoint.pt").write_bytes(content)
        resumed, more, _ = run(config, shards, read_checkpoint(str(folder)))
        assert more == lines[2 * (place + 1) :]
        state = resumed.model.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in whole.model.state_dict().items())


@pytest.mark.parametrize("optimizer", ["ranger", "sgd"])
def test_one_batch_is_learnt_by_heart(shards: str, optimizer: str) -> None:
    config = tiny_config(
        train__batch_size=8, model__width=0.15, model__dropout=0.0, optimizer__name=optimizer, optimizer__lr=0.01
    )
    trainer = Trainer(config, origin(shards), CPU)
    plan = FeedPlan.of(shards, config, 1, 0)
    batches = itertools.repeat(next(on_device(read_items(plan, [0]), CPU)))
    losses = [trainer.step(batches)[0].item() for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_the_best_validation_is_kept(shards: str) -> None:
    trainer, lines, _ = run(tiny_config(), shards)
    assert trainer.best[METRIC] == max(line[METRIC] for line in lines if METRIC in line)


def test_streams_train_alike_together_and_apart(shards: str) -> None:
    both = run(tiny_config(model__dropout=0.0), shards)[1]
    for modality in ("rgb", "flow"):
        alone = run(tiny_config(model__dropout=0.0, streams=modality), shards)[1]
        key = f"{METRIC}_{modality}"
        assert len([line for line in alone if key in line]) == 3
        if modality == "rgb":  # its initial weights are drawn first in both
            assert [line[key] for line in alone if key in line] == [line[key] for line in both if key in line]


def test_a_loss_that_is_not_finite_stops_before_the_step(shards: str) -> None:
    config = tiny_config()
    trainer = Trainer(config, origin(shards), CPU)
    with torch.no_grad():
        trainer.model["flow"].logits.conv3d.bias.fill_(torch.nan)  # type: ignore[union-attr,operator]
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    plan = FeedPlan.of(shards, config, 1, 0)
    with pytest.raises(NonFiniteLoss, match=r"iteration 1: action loss of the flow stream is nan"):
        trainer.step(on_device(read_items(plan, range(plan.items)), CPU))
    assert all(
        torch.equal(value, before[name]) or value.isnan().any() for name, value in trainer.model.named_parameters()
    )


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_mixed_precision_runs_and_learns(shards: str, precision: str) -> None:
    config = tiny_config(train__precision=precision, train__iterations=2)
    trainer, lines, _ = run(config, shards)
    assert trainer.dtype is not None
    assert all(line["train_loss"] > 0 for line in lines)
    assert trainer.scaler.is_enabled() == (precision == "fp16")


def test_an_overflow_skips_weights_and_schedule(shards: str) -> None:
    config = tiny_config(train__precision="fp16", schedule__name="multistep", schedule__milestones=[1])
    trainer = Trainer(config, origin(shards), CPU)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    before = {name: value.clone() for name, value in trainer.model.named_parameters()}
    rate = trainer.learning_rate
    plan = FeedPlan.of(shards, config, 1, 0)
    trainer.step(on_device(read_items(plan, range(plan.items)), CPU))
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.named_parameters())
    assert trainer.learning_rate == rate


def test_auto_precision_is_off_on_a_cpu() -> None:
    assert autocast_dtype("auto", CPU) is None
