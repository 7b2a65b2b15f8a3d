from __future__ import annotations

import math

import pytest
import torch

from tune_ego.losses import gaze_loss, gaze_target
from tune_ego.metrics import ClipScores, accuracies, confusion, mean_class_accuracy, micro_accuracy
from tune_ego.model.stam import scale_attention


def random_gaze(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(5, 16, generator=generator) < 0.5
    valid[0, :8] = False
    valid[1] = False
    gaze = torch.rand(5, 16, 2, generator=generator) * 1.6 - 0.3
    gaze[~valid] = torch.nan
    return gaze, valid


def test_gaze_target_equals_its_formula() -> None:
    gaze, valid = random_gaze(0)
    target, has_target = gaze_target(gaze, valid, (2, 7, 7), sigma=3.0)
    for b in range(5):
        for t in range(2):
            frames = [f for f in range(8 * t, 8 * t + 8) if valid[b, f]]
            assert has_target[b, t] == bool(frames)
            if not frames:
                continue
            x = sum(gaze[b, f, 0].item() for f in frames) / len(frames)
            y = sum(gaze[b, f, 1].item() for f in frames) / len(frames)
            for i in range(7):
                for j in range(7):
                    expected = math.exp(-((j - 7 * x) ** 2 + (i - 7 * y) ** 2) / (2 * 3.0**2))
                    assert target[b, t, i, j].item() == pytest.approx(expected, rel=1e-5)


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


def test_attention_scaling() -> None:
    a = torch.tensor([[[[1.0, 3.0], [2.0, 5.0]]], [[[4.0, 4.0], [4.0, 4.0]]]], requires_grad=True)
    scaled = scale_attention(a, "min_max")
    assert scaled[0].flatten().tolist() == [0, 0.5, 0.25, 1]
    assert (scaled[1] == 0).all()
    scaled.square().sum().backward()
    assert a.grad is not None and a.grad.isfinite().all()
    assert scale_attention(a, "subtract_min")[0].flatten().tolist() == [0, 2, 1, 4]


def test_mean_class_accuracy_ignores_absent_classes() -> None:
    scores = torch.eye(4)[[0, 0, 1, 1, 2]]
    labels = torch.tensor([0, 0, 0, 1, 2])
    counts = confusion(scores, labels)
    assert counts[0].tolist() == [2, 1, 0, 0]
    assert micro_accuracy(counts) == pytest.approx(4 / 5)
    assert mean_class_accuracy(counts) == pytest.approx((2 / 3 + 1 + 1) / 3)


def test_clip_scores_average_windows_and_ignore_padding() -> None:
    scores = ClipScores(("rgb", "flow"), 2, 3, torch.device("cpu"))
    rgb, flow = torch.randn(4, 3), torch.randn(4, 3)
    clip, present = torch.tensor([0, 1, 1, 0]), torch.tensor([True, True, True, False])
    scores.add(clip[:2], {"rgb": rgb[:2], "flow": flow[:2]}, present[:2])
    scores.add(clip[2:], {"rgb": rgb[2:], "flow": flow[2:]}, present[2:])
    found = scores.reduce()
    expected = rgb.double().softmax(1)
    assert torch.allclose(found["rgb"][0], expected[0])
    assert torch.allclose(found["rgb"][1], (expected[1] + expected[2]) / 2)
    assert torch.allclose(found["fused"], (found["rgb"] + found["flow"]) / 2)
    assert accuracies(found, torch.tensor([0, 1])).keys() == {"rgb", "flow", "fused"}
