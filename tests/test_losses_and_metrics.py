from __future__ import annotations

import math

import pytest
import torch

from tests import literal
from tune_ego.evaluate import fusion_sweep
from tune_ego.losses import gaze_loss, gaze_target, stream_losses
from tune_ego.metrics import (
    ClipScores,
    accuracies,
    class_recall,
    confusion,
    cross_entropy,
    fuse,
    mean_class_accuracy,
    micro_accuracy,
)
from tune_ego.model import StreamOutput


def random_gaze(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(5, 16, generator=generator) < 0.5
    valid[0, :8] = False
    valid[1] = False
    gaze = torch.rand(5, 16, 2, generator=generator) * 1.6 - 0.3
    gaze[~valid] = torch.nan
    return gaze, valid


@pytest.mark.parametrize(("sizes", "sigma"), [((2, 7, 7), 3.0), ((4, 3, 5), 1.3), ((1, 8, 2), 0.7)])
def test_gaze_target_and_loss_equal_their_formulas(sizes: tuple[int, int, int], sigma: float) -> None:
    gaze, valid = random_gaze(0)
    expected = literal.gaze_target(gaze, valid, sizes, sigma)
    target, has_target = gaze_target(gaze, valid, sizes, sigma)
    assert not has_target.all() and has_target.any()
    for b in range(5):
        for t in range(sizes[0]):
            assert has_target[b, t] == (expected[b][t] is not None)
            if expected[b][t] is not None:
                torch.testing.assert_close(target[b, t], torch.tensor(expected[b][t]), rtol=1e-5, atol=0)
    attention = torch.rand(5, *sizes)
    loss = gaze_loss(attention, gaze, valid, sigma).item()
    assert loss == pytest.approx(literal.gaze_loss(attention, gaze, valid, sigma).item(), rel=1e-5)


def test_gaze_that_is_not_finite_is_no_gaze() -> None:
    gaze, valid = random_gaze(4)
    spoiled = valid | (torch.arange(16) % 3 == 0)  # says that there is gaze where it is NaN
    assert (spoiled & ~valid).any()
    expected, has_target = gaze_target(gaze, valid)
    target, found = gaze_target(gaze, spoiled)
    assert torch.equal(found, has_target) and torch.equal(target, expected)
    assert not gaze_target(torch.full_like(gaze, torch.inf), torch.ones_like(valid))[1].any()
    with pytest.raises(ValueError, match=r"valid_BT is of type torch\.float32"):
        gaze_target(gaze, valid.float())


def test_gradient_of_the_gaze_loss() -> None:
    gaze, valid = random_gaze(2)
    attention = torch.rand(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gaze_loss(a, gaze, valid, 2.0), attention)


def test_stream_losses_are_cross_entropy_and_weighted_gaze_loss() -> None:
    gaze, valid = random_gaze(3)
    logits, label, attention = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.rand(5, 2, 7, 7)
    action = -sum(math.log(math.exp(row[k]) / sum(map(math.exp, row))) for row, k in zip(logits.tolist(), label)) / 5
    found = stream_losses(StreamOutput(logits, attention), label, gaze, valid, 0.1, 3.0)
    assert found.action.item() == pytest.approx(action, rel=1e-5)
    taught = literal.gaze_loss(attention, gaze, valid, 3.0).item()
    assert found.total.item() == pytest.approx(action + 0.1 * taught, rel=1e-5)
    without = stream_losses(StreamOutput(logits, None), label, gaze, valid, 0.1, 3.0)
    assert without.total.item() == without.action.item() and without.gaze.item() == 0


def test_gaze_loss_leaves_out_slices_without_gaze() -> None:
    gaze, valid = random_gaze(1)
    attention = torch.rand(5, 2, 7, 7, requires_grad=True)
    loss = gaze_loss(attention, gaze, valid, sigma=3.0)
    target, has_target = gaze_target(gaze, valid)
    errors = [(attention[b, t] - target[b, t]).square().mean() for b in range(5) for t in range(2) if has_target[b, t]]
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-6)
    loss.backward()
    assert attention.grad is not None and attention.grad.isfinite().all()
    assert (attention.grad[1] == 0).all()
    assert gaze_loss(attention, gaze[1:2], valid[1:2].clone(), 3.0).item() == 0


def test_mean_class_accuracy_ignores_absent_classes() -> None:
    scores = torch.eye(4)[[0, 0, 1, 1, 2]]
    labels = torch.tensor([0, 0, 0, 1, 2])
    counts = confusion(scores, labels)
    assert counts[0].tolist() == [2, 1, 0, 0]
    assert micro_accuracy(counts) == pytest.approx(4 / 5)
    assert mean_class_accuracy(counts) == pytest.approx((2 / 3 + 1 + 1) / 3)


def test_accuracies_of_no_clips_are_nan() -> None:
    nothing = confusion(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(mean_class_accuracy(nothing)) and math.isnan(micro_accuracy(nothing))


def test_clip_scores_average_windows_and_ignore_padding() -> None:
    scores = ClipScores(("rgb", "flow"), 2, 3, torch.device("cpu"))
    rgb, flow = torch.randn(4, 3), torch.randn(4, 3)
    clip, present = torch.tensor([0, 1, 1, 0]), torch.tensor([True, True, True, False])
    scores.add(clip[:2], {"rgb": rgb[:2], "flow": flow[:2]}, present[:2])
    scores.add(clip[2:], {"rgb": rgb[2:], "flow": flow[2:]}, present[2:])
    found = scores.reduce(0.5)
    expected = rgb.double().softmax(1)
    assert torch.allclose(found["rgb"][0], expected[0])
    assert torch.allclose(found["rgb"][1], (expected[1] + expected[2]) / 2)
    assert torch.allclose(found["fused"], (found["rgb"] + found["flow"]) / 2)
    assert accuracies(found, torch.tensor([0, 1])).keys() == {"rgb", "flow", "fused"}


def test_accuracies_equal_their_formulas() -> None:
    torch.manual_seed(0)
    scores, label = torch.rand(300, 12), torch.randint(0, 9, (300,))
    predicted = [max(range(12), key=lambda k: row[k]) for row in scores.tolist()]
    found = accuracies({"rgb": scores}, label)["rgb"]
    assert found["mean_class_accuracy"] == pytest.approx(literal.mean_class_accuracy(predicted, label.tolist()))
    assert found["micro_accuracy"] == pytest.approx(sum(p == t for p, t in zip(predicted, label.tolist())) / 300)
    assert class_recall(confusion(scores, label))[9:] == [None] * 3


def test_fusion_is_a_weighted_mean_and_its_sweep_covers_all_weights() -> None:
    torch.manual_seed(0)
    scores = {name: torch.rand(50, 4).double() for name in ("rgb", "flow")}
    label = torch.randint(0, 4, (50,))
    assert torch.allclose(fuse(scores, 0.3), 0.3 * scores["rgb"] + 0.7 * scores["flow"])
    curve = fusion_sweep(scores, label)
    assert [point["rgb_weight"] for point in curve] == pytest.approx([step / 20 for step in range(21)])
    for point, name in ((curve[0], "flow"), (curve[-1], "rgb")):
        single = accuracies({name: scores[name]}, label)[name]
        assert {key: point[key] for key in single} == single


def test_the_validation_loss_is_the_cross_entropy_of_the_scores() -> None:
    scores = torch.rand(7, 4, dtype=torch.float64).softmax(dim=1)
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 2])
    expected = sum(-math.log(scores[n, label]) for n, label in enumerate(labels.tolist())) / 7
    assert cross_entropy(scores, labels) == pytest.approx(expected, rel=1e-12)
    scores[3, 3] = 0
    assert math.isfinite(cross_entropy(scores, labels))
