"""One step of the trainer, on batches made here: no feed and no Ray."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests import literal
from tests.conftest import tiny_config
from tune_ego.feed.batches import ClipBatch
from tune_ego.results.experiment import METRIC
from tune_ego.training.checkpoint import Origin
from tune_ego.training.loop import train
from tune_ego.training.losses import gaze_target
from tune_ego.training.trainer import NonFiniteLoss, Trainer

CPU = torch.device("cpu")
ORIGIN = Origin(["a", "b", "c"], (36, 36), "dis")


def batch(seed: int, clips: int = 1) -> ClipBatch:
    """Windows of 36 x 36 noise: maps of 2 x 2 x 2 cells. Half of the frames have gaze."""
    generator = torch.Generator().manual_seed(seed)

    def image(*shape: int) -> torch.Tensor:
        return torch.randint(0, 256, (clips, 16, *shape), generator=generator, dtype=torch.uint8)

    valid = torch.rand(clips, 16, generator=generator) < 0.5
    gaze = torch.rand(clips, 16, 2, generator=generator).masked_fill(~valid[..., None], torch.nan)
    label = torch.randint(0, 3, (clips,), generator=generator)
    return ClipBatch(
        image(36, 36, 3), image(2, 36, 36), gaze, valid, label, torch.arange(clips), torch.ones(clips, dtype=torch.bool)
    )


def test_a_step_s_gradients_equal_autograd_on_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes: the mean of cross-entropy + weight x gaze loss, for each stream; in float64, where ReLU's kinks
    and BatchNorm over few values are no matter."""
    clips = ClipBatch.model_input
    monkeypatch.setattr(ClipBatch, "model_input", lambda batch: {name: x.double() for name, x in clips(batch).items()})
    weight, sigma = 0.7, 0.6
    config = tiny_config(
        loss__gaze_weight=weight,
        loss__gaze_sigma=sigma,
        model__dropout=0.0,
        model__width=0.06,
        train__accumulate=2,
        train__precision="off",
    )
    torch.manual_seed(0)
    trainer = Trainer(config, ORIGIN, CPU)
    trainer.model.double()
    for name, value in trainer.model.state_dict().items():
        if name.endswith("attention_pred.conv3d.weight"):
            value.abs_()  # else ReLU may leave nothing of the map
    states = {
        modality: {name: value.clone() for name, value in stream.state_dict().items()}
        for modality, stream in trainer.model.items()
    }
    found: dict[str, dict[str, torch.Tensor]] = {}
    for modality, moving in trainer.optimizers.items():

        def note(*_: Any, modality: str = modality) -> None:
            parameters = trainer.model[modality].named_parameters()
            found[modality] = {name: p.grad.clone() for name, p in parameters if p.grad is not None}

        moving.optimizer.register_step_pre_hook(note)
    passes = [batch(1, clips=2), batch(2, clips=2)]
    losses = trainer.step(iter(passes))
    for row, (modality, state) in zip(losses.tolist(), states.items()):
        learnt = {name: state[name].requires_grad_() for name, _ in trainer.model[modality].named_parameters()}
        totals, actions, gazes = [], [], []
        for one in passes:
            clip = one.rgb_BTHWC.permute(0, 4, 1, 2, 3) if modality == "rgb" else one.flow_BT2HW.permute(0, 2, 1, 3, 4)  # type: ignore[union-attr]
            logits, attention = literal.stream(state, clip.double() / 127.5 - 1, depth=1, training=True)
            assert attention is not None
            actions.append(literal.cross_entropy(logits, one.label_B.tolist()))
            gazes.append(literal.gaze_loss(attention, one.gaze_BT2, one.gaze_valid_BT, sigma))
            totals.append(actions[-1] + weight * gazes[-1])
        (sum(totals) / 2).backward()  # type: ignore[union-attr]
        assert row == pytest.approx([(sum(kind) / 2).item() for kind in (totals, actions, gazes)], rel=1e-4)  # type: ignore[union-attr]
        assert found[modality].keys() == learnt.keys()
        for name, p in learnt.items():
            assert p.grad is not None
            error = (found[modality][name] - p.grad).norm()
            assert error <= 1e-3 * p.grad.norm() + 1e-6, name  # the cross-entropy is float32's


def test_every_pass_of_every_iteration_draws_other_masks() -> None:
    trainer = Trainer(tiny_config(train__accumulate=2), ORIGIN, CPU)
    seeds: list[int] = []
    trainer.model.register_forward_pre_hook(lambda _, arguments: seeds.extend(arguments[1].values()))
    for iteration in range(2):
        trainer.step(iter([batch(2 * iteration), batch(2 * iteration + 1)]))
    assert len(seeds) == len(set(seeds)) == 8  # 2 iterations, 2 passes, 2 streams


def test_gradients_that_are_not_finite_end_the_run_before_its_validation() -> None:
    """The loss is finite, and there is no loss scaler to look at the gradients: the scores show what they did."""
    config = tiny_config(train__precision="off", train__iterations=2)
    trainer = Trainer(config, ORIGIN, CPU)
    trainer.model.get_parameter("flow.logits.conv3d.weight").register_hook(lambda gradient: gradient * math.nan)
    validation = [batch(5), batch(6)._replace(clip_B=torch.ones(1, dtype=torch.int64))]
    plan: Any = TwoValidations([label for one in validation for label in one.label_B.tolist()])
    reported: list[Any] = []

    def report(*line: Any) -> None:
        reported.append(line)

    with pytest.raises(NonFiniteLoss, match="iteration 1: the validation scores of the flow stream are not finite"):
        train(trainer, plan, iter([batch(1), *validation]), report)
    assert not reported and not trainer.best
    train(Trainer(config, ORIGIN, CPU), plan, iter([batch(1), *validation, batch(2), *validation]), report)
    assert len(reported) == 2 and METRIC in reported[0][0]


class TwoValidations:
    """The part of a `FeedPlan` that the loop uses: two iterations, each with a validation of two batches after it."""

    iterations = validation_items = 2

    def __init__(self, labels: list[int]) -> None:
        self.validation_labels = labels

    def validates_after(self, iteration: int) -> bool:
        return True


def test_the_gaze_loss_is_a_mean_over_the_slices_of_the_whole_batch() -> None:
    """Of the first pass one slice has gaze, of the second all four: each slice counts a fifth, and not a half or an
    eighth. Two passes have the gaze loss of one pass with both batches."""
    config = tiny_config(streams="rgb", model__dropout=0.0, train__accumulate=2, train__precision="off")
    first, second = batch(1, clips=2), batch(2, clips=2)
    valid = torch.zeros_like(first.gaze_valid_BT)
    valid[0, :8] = True
    gaze = torch.rand(2, 16, 2, generator=torch.Generator().manual_seed(0))
    first = first._replace(gaze_BT2=gaze, gaze_valid_BT=valid)
    second = second._replace(gaze_BT2=gaze, gaze_valid_BT=torch.ones_like(valid))
    trainer = Trainer(config, ORIGIN, CPU)
    errors = []
    for one in (first, second):
        with torch.no_grad():
            trainer.model.train()
            attention = trainer.forward(trainer.model, one.model_input(), None)["rgb"].attention_BTHW
        assert attention is not None
        target, has_gaze = gaze_target(one.gaze_BT2, one.gaze_valid_BT, tuple(attention.shape[1:]), 3 / 7)  # type: ignore[arg-type]
        errors += (attention - target).square().mean(dim=(2, 3))[has_gaze].tolist()
    assert len(errors) == 5
    losses = Trainer(config, ORIGIN, CPU).step(iter([first, second]))
    assert losses[0, 2].item() == pytest.approx(sum(errors) / 5, rel=1e-5)
