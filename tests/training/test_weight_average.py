"""The exponential moving average of weights (`train.ema`)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tests.training.test_two_workers import LABELS, WINDOWS
from tune_ego.errors import UserError
from tune_ego.training.trainer import Trainer


class Validation:
    """The part of a `FeedPlan` that a validation uses."""

    validation_items = 1
    validation_labels = LABELS[:1]


def test_the_average_is_its_recursion_and_training_is_as_without_it() -> None:
    """a <- d a + (1 - d) w, d = min(0.3, (1 + n) / (10 + n)): 0.1, 2 / 11, 0.25, 0.3, for weights and statistics."""
    plain, averaged = (Trainer(tiny_config(streams="rgb", train__ema=ema), ORIGIN, CPU) for ema in (0.0, 0.3))
    expected = {name: value.double() for name, value in plain.model.state_dict().items()}
    for number, decay in enumerate((0.1, 2 / 11, 0.25, 4 / 13, 0.3)):
        for trainer in (plain, averaged):
            trainer.step(iter([batch(number, clips=4)]))
        decay = min(decay, 0.3)
        expected = {
            name: decay * expected[name] + (1 - decay) * value.double()
            for name, value in plain.model.state_dict().items()
        }
    state = averaged.checkpoint()
    assert plain.averaged_model is plain.model and "training_weights" not in plain.checkpoint()
    for name, value in plain.model.state_dict().items():
        assert torch.equal(state["training_weights"][name], value), name
        if name.endswith("num_batches_tracked"):
            assert state["model"][name] == 5
        else:
            torch.testing.assert_close(state["model"][name].double(), expected[name], rtol=1e-5, atol=1e-6)


def test_a_validation_is_of_the_average() -> None:
    trainer = Trainer(tiny_config(train__ema=0.9), ORIGIN, CPU)
    for name, parameter in trainer.averaged_model.named_parameters():
        if name.endswith("logits.conv3d.bias"):
            parameter.data = torch.tensor([50.0, 0.0, 0.0])
    row = batch(100)._replace(clip_B=torch.tensor([WINDOWS[0]]))
    metrics = trainer.validate(iter([row]), Validation())  # type: ignore[arg-type]
    assert LABELS[0] == 0 and metrics["val_loss"] < 1e-6
    assert trainer.seen is not None and (trainer.seen[1]["rgb"].logits_BK[:, 0] > 40).all()


def test_a_checkpoint_without_the_training_weights_is_refused() -> None:
    config: dict[str, Any] = {"streams": "rgb"}
    content = Trainer(tiny_config(**config), ORIGIN, CPU).checkpoint()
    trainer = Trainer(tiny_config(train__ema=0.9, **config), ORIGIN, CPU)
    with pytest.raises(UserError, match="holds no state dict of a model"):
        trainer.load(content, "checkpoint")
