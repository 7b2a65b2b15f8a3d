"""Colour jitter and mixup of training batches."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.functional import adjust_brightness, adjust_contrast, adjust_saturation

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN, batch
from tune_ego.config import AugmentConfig
from tune_ego.errors import UserError
from tune_ego.training.augmentation import Mixing, augmented, draw, jitter_colours
from tune_ego.training.losses import gaze_loss, stream_losses
from tune_ego.training.trainer import Trainer

SEED = np.random.SeedSequence(5)


def test_colours_change_as_in_torchvision() -> None:
    """All frames of a window as one image: frames above each other have one mean grey."""
    x_BCTHW = torch.rand(2, 3, 4, 6, 5, generator=torch.Generator().manual_seed(0))
    factors = torch.tensor([[1.2, 0.7, 1.4], [0.8, 1.3, 0.5]])
    changed = (jitter_colours(2 * x_BCTHW - 1, factors) + 1) / 2
    for window, result, (brightness, contrast, saturation) in zip(x_BCTHW, changed, factors.tolist()):
        image = window.reshape(3, 24, 5)
        image = adjust_saturation(adjust_contrast(adjust_brightness(image, brightness), contrast), saturation)
        torch.testing.assert_close(result, image.reshape(3, 4, 6, 5), atol=2e-3, rtol=0)  # its grey is rounded


def test_a_window_has_one_draw_and_flow_keeps_its_values() -> None:
    draws = draw(AugmentConfig(colour=0.4), 5, SEED, CPU)
    assert draws.colour_B3 is not None and draws.colour_B3.shape == (5, 3) and draws.mixing is None
    assert draws.colour_B3.min() >= 0.6 and draws.colour_B3.max() <= 1.4 and draws.colour_B3.unique().numel() == 15
    clips = {"rgb": torch.rand(5, 3, 1, 4, 4).expand(-1, -1, 8, -1, -1) - 0.5, "flow": torch.rand(5, 2, 8, 4, 4)}
    changed = augmented(clips, draws)
    assert torch.equal(changed["flow"], clips["flow"])
    assert (changed["rgb"] - changed["rgb"][:, :, :1]).abs().max() == 0 and not torch.equal(
        changed["rgb"], clips["rgb"]
    )
    off = augmented(clips, draw(AugmentConfig(), 5, SEED, CPU))
    assert off is clips


def test_windows_are_mixed_with_the_one_before_by_their_share() -> None:
    mixing = Mixing(torch.tensor([1.0, 0.75, 0.5]))
    values = torch.tensor([[4.0, 0.0], [8.0, 1.0], [2.0, 3.0]])
    assert mixing(values).tolist() == [[4.0, 0.0], [7.0, 0.75], [5.0, 2.0]]
    draws = [draw(AugmentConfig(mixup=0.4, mixup_share=0.25), 1000, np.random.SeedSequence(n), CPU) for n in range(3)]
    for drawn in draws:
        assert drawn.mixing is not None
        own = drawn.mixing.own_B
        assert own.min() >= 0.5 and own.max() == 1 and (own < 1).float().mean() == pytest.approx(0.25, abs=0.05)
    everything = draw(AugmentConfig(mixup=1.0, mixup_share=1.0), 20000, SEED, CPU).mixing
    assert everything is not None
    # Beta(1, 1) is uniform: the larger part is uniform from a half to one.
    assert everything.own_B.mean().item() == pytest.approx(0.75, abs=0.01)
    assert everything.own_B.var().item() == pytest.approx(1 / 48, rel=0.05)


def test_a_mixed_step_s_losses_are_their_formula() -> None:
    """Inputs and cross-entropies are averaged with the weights; the gaze loss is that of the windows left whole."""
    config = tiny_config(
        augment__mixup=0.8, augment__mixup_share=0.5, loss__label_smoothing=0.1, model__dropout=0.0, streams="rgb"
    )
    trainer, one = Trainer(config, ORIGIN, CPU), batch(3, clips=4)
    one = one._replace(gaze_BT2=torch.rand(4, 16, 2), gaze_valid_BT=torch.ones(4, 16, dtype=torch.bool))
    one = one._replace(label_B=torch.tensor([0, 1, 2, 1]))  # no window has the label of the one before
    draws = draw(config.augment, 4, np.random.SeedSequence(0, spawn_key=(2, 0, 0)), CPU)
    assert draws.mixing is not None
    own = draws.mixing.own_B
    whole = own == 1
    assert 0 < whole.sum() < 4
    trainer.model.get_parameter("rgb.logits.conv3d.weight").data.mul_(30)  # so that the labels matter
    trainer.model.train()
    clip = one.model_input()["rgb"]
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    mixed = own.reshape(4, 1, 1, 1, 1) * clip + (1 - own.reshape(4, 1, 1, 1, 1)) * clip.roll(1, 0)
    output = trainer.forward(trainer.model, {"rgb": mixed}, None)["rgb"]
    trainer.model.load_state_dict(before)
    losses = [
        F.cross_entropy(output.logits_BK[n : n + 1], one.label_B[n : n + 1], label_smoothing=0.1) for n in range(4)
    ]
    others = [
        F.cross_entropy(output.logits_BK[n : n + 1], one.label_B[n - 1].reshape(1), label_smoothing=0.1)
        for n in range(4)
    ]
    mean = sum(w * a + (1 - w) * b for w, a, b in zip(own.tolist(), losses, others)) / 4
    action = float(torch.as_tensor(mean).detach())
    assert output.attention_BTHW is not None
    gaze = gaze_loss(output.attention_BTHW[whole], one.gaze_BT2[whole], one.gaze_valid_BT[whole], 3 / 7)
    (row,) = trainer.step(iter([one])).tolist()
    assert row[1] == pytest.approx(action, rel=1e-5) and row[2] == pytest.approx(gaze.item(), rel=1e-5)
    assert row[0] == pytest.approx(action + 0.1 * gaze.item(), rel=1e-5)
    plain = stream_losses(output, one.label_B, one.gaze_BT2, one.gaze_valid_BT, 0.1, 3 / 7)
    assert plain.action.item() != pytest.approx(row[1], rel=1e-3) and plain.gaze.item() != pytest.approx(
        row[2], rel=1e-3
    )


def test_every_pass_of_every_iteration_draws_other_numbers() -> None:
    trainer = Trainer(tiny_config(streams="rgb", augment__colour=0.4, augment__mixup=0.4), ORIGIN, CPU)
    drawn = []
    for trainer.iteration, number in ((0, 0), (0, 1), (1, 0), (2, 0)):
        draws = trainer._draw(batch(0, clips=4), number)[1]
        assert draws.colour_B3 is not None and draws.mixing is not None
        drawn.append((draws.colour_B3.flatten().tolist(), draws.mixing.own_B.tolist()))
    assert len({str(colours) for colours, _ in drawn}) == len({str(mixed) for _, mixed in drawn}) == 4


def test_mixup_needs_two_samples_in_a_pass() -> None:
    with pytest.raises(UserError, match=r"augment.mixup: a forward pass needs two samples; raise train.batch_size"):
        tiny_config(augment__mixup=0.4, train__accumulate=4)


def losses_of(trainer: Trainer, first: int, last: int) -> list[list[list[float]]]:
    return [trainer.step(iter([batch(number, clips=4)])).tolist() for number in range(first, last)]


def test_draws_depend_on_seed_and_iteration_and_not_on_the_streams() -> None:
    changes: dict[str, Any] = {"augment__colour": 0.4, "augment__mixup": 0.4}
    both = Trainer(tiny_config(**changes), ORIGIN, CPU)
    whole = losses_of(both, 0, 4)
    again = Trainer(tiny_config(**changes), ORIGIN, CPU)
    assert losses_of(again, 0, 2) == whole[:2]
    buffer = io.BytesIO()
    again.flush_status()
    torch.save(again.checkpoint(), buffer)
    buffer.seek(0)
    resumed = Trainer(tiny_config(**changes), ORIGIN, CPU)
    resumed.load(torch.load(buffer, weights_only=True), "checkpoint")
    assert losses_of(resumed, 2, 4) == whole[2:]
    alone = Trainer(tiny_config(streams="flow", **changes), ORIGIN, CPU)
    assert [row[0] for row in losses_of(alone, 0, 4)] == [row[1] for row in whole]
    assert losses_of(Trainer(tiny_config(), ORIGIN, CPU), 0, 1) != whole[:1]
