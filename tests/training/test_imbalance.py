"""Losses for classes of unequal size, against their equations."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tune_ego.config import LossConfig
from tune_ego.training.losses import ActionLoss, stream_losses
from tune_ego.training.trainer import Trainer

SAMPLES = [10.0, 0.0, 30.0, 160.0]
LOGITS = torch.tensor([[0.3, -1.2, 0.9, 2.0], [1.5, 0.1, -0.7, 0.4], [-2.0, 0.6, 0.2, 0.8]])
LABELS = [0, 3, 2]


def action_loss(samples: list[float] = SAMPLES, **settings: Any) -> ActionLoss:
    return ActionLoss(LossConfig(**settings), samples, CPU)


def losses_by_hand(offsets: list[float], smoothing: float = 0.0) -> list[float]:
    """Cross-entropy of each row, with the softmax written out."""
    result = []
    for row, label in zip(LOGITS.tolist(), LABELS):
        scores = [math.exp(value + offset) for value, offset in zip(row, offsets)]
        logs = [math.log(score / sum(scores)) for score in scores]
        result.append(-(1 - smoothing) * logs[label] - smoothing * sum(logs) / 4)
    return result


def test_logit_adjustment_is_its_equation() -> None:
    """-log(p_y^tau e^f_y / sum_k p_k^tau e^f_k); the class without samples counts as one with a single sample."""
    for tau in (0.5, 1.0):
        offsets = [tau * math.log(max(count, 1) / 200) for count in SAMPLES]
        loss = action_loss(logit_adjustment=tau)(LOGITS, torch.tensor(LABELS))
        assert loss.item() == pytest.approx(sum(losses_by_hand(offsets)) / 3, rel=1e-5)


def test_class_weights_by_hand() -> None:
    """`inverse`: 200 / (3 n), as three classes have samples. The mean over a batch is over its samples."""
    plain = losses_by_hand([0.0] * 4)
    inverse = {label: 200 / (3 * SAMPLES[label]) for label in (0, 2, 3)}
    effective = {label: (1 - 0.9) / (1 - 0.9 ** SAMPLES[label]) for label in (0, 2, 3)}
    scale = 200 / sum(effective[label] * SAMPLES[label] for label in effective)
    for settings, weights in (
        ({"class_weights": "inverse"}, inverse),
        ({"class_weights": "effective", "effective_beta": 0.9}, {k: w * scale for k, w in effective.items()}),
    ):
        assert sum(weights[label] * SAMPLES[label] for label in weights) == pytest.approx(200)
        loss = action_loss(**settings)(LOGITS, torch.tensor(LABELS))
        expected = sum(weights[label] * value for label, value in zip(LABELS, plain)) / 3
        assert loss.item() == pytest.approx(expected, rel=1e-5)
    near_inverse = action_loss(class_weights="effective", effective_beta=1 - 1e-9)(LOGITS, torch.tensor(LABELS))
    assert near_inverse.item() == pytest.approx(
        action_loss(class_weights="inverse")(LOGITS, torch.tensor(LABELS)).item(), rel=1e-4
    )


@pytest.mark.parametrize("weights", ["none", "inverse"])
def test_label_smoothing_is_its_formula(weights: str) -> None:
    loss = action_loss([50.0] * 4, label_smoothing=0.2, class_weights=weights)(LOGITS, torch.tensor(LABELS))
    assert loss.item() == pytest.approx(sum(losses_by_hand([0.0] * 4, 0.2)) / 3, rel=1e-5)


def test_without_corrections_the_loss_is_cross_entropy_to_the_bit() -> None:
    random = torch.randn(64, 106), torch.randint(0, 106, (64,))
    assert action_loss([])(*random).equal(torch.nn.functional.cross_entropy(*random))


def test_classes_of_equal_size_need_no_correction() -> None:
    equal, labels = [7.0] * 4, torch.tensor(LABELS)
    plain = action_loss(equal)(LOGITS, labels)
    for settings in ({"logit_adjustment": 1.0}, {"class_weights": "inverse"}, {"class_weights": "effective"}):
        torch.testing.assert_close(action_loss(equal, **settings)(LOGITS, labels), plain)


@pytest.mark.parametrize("settings", [{"logit_adjustment": 0.5}, {"class_weights": "inverse"}])
def test_a_correction_needs_the_classes(settings: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        action_loss([], **settings)


def test_a_step_has_the_configured_loss() -> None:
    settings = {"logit_adjustment": 0.7, "class_weights": "inverse", "label_smoothing": 0.1, "gaze_weight": 0.5}
    config = tiny_config(**{f"loss__{key}": value for key, value in settings.items()}, model__dropout=0.0)
    samples = [5.0, 20.0, 75.0]
    trainer, clips = Trainer(config, ORIGIN, CPU, class_samples=samples), batch(1, 4)
    trainer.model.train()
    outputs = trainer.forward(trainer.model, clips.model_input(), None)
    loss = ActionLoss(config.loss, samples, CPU)
    expected = [
        stream_losses(output, clips.label_B, clips.gaze_BT2, clips.gaze_valid_BT, 0.5, config.loss.gaze_sigma)._replace(
            action=loss(output.logits_BK, clips.label_B)
        )
        for output in outputs.values()
    ]
    losses = Trainer(config, ORIGIN, CPU, class_samples=samples).step(iter([clips]))
    for row, stream in zip(losses.tolist(), expected):
        action, gaze = stream.action.item(), stream.gaze.item()
        assert row == pytest.approx([action + 0.5 * gaze, action, gaze], rel=1e-4)
