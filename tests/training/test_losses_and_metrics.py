"""The gaze target, the losses and the metrics, against numbers worked out by hand and literal re-statements."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests import literal
from tune_ego.evaluation.evaluate import fusion_sweep
from tune_ego.model import StreamOutput
from tune_ego.training.losses import gaze_loss, gaze_target, stream_losses
from tune_ego.training.metrics import (
    ClipScores,
    accuracies,
    class_recall,
    confusion,
    cross_entropy,
    fuse,
    mean_class_accuracy,
    micro_accuracy,
)

CPU = torch.device("cpu")
NAN = math.nan
# exp(-d / 2) for the squared distances d = (column - 2)^2 + (row - 1)^2 of a map of 2 x 4 cells.
OF_THE_MIDDLE = [[0.082085, 0.367879, 0.606531, 0.367879], [0.135335, 0.606531, 1.0, 0.606531]]


def random_gaze(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    valid = torch.rand(5, 16, generator=generator) < 0.5
    valid[0, :8] = False
    valid[1] = False
    gaze = torch.rand(5, 16, 2, generator=generator) * 1.6 - 0.3
    gaze[~valid] = torch.nan
    return gaze, valid


@pytest.mark.parametrize(("sizes", "sigma"), [((2, 7, 7), 3 / 7), ((4, 3, 5), 0.43), ((1, 8, 2), 0.09)])
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


@pytest.mark.parametrize(
    ("points", "valid"),
    [
        ([(0.5, 0.5), (0.5, 0.5)], [True, True]),
        ([(0.25, 0.75), (0.75, 0.25)], [True, True]),  # their mean
        ([(0.5, 0.5), (0.9, 0.1)], [True, False]),  # a frame without gaze does not count
        ([(NAN, NAN), (0.5, 0.5)], [False, True]),
        ([(0.5, 0.5), (NAN, 0.3)], [True, True]),  # nor one whose gaze is not finite, whatever is said of it
        ([(0.5, 0.5), (0.3, math.inf)], [True, True]),
    ],
)
def test_the_target_is_a_gaussian_around_the_mean_of_the_gaze_points(
    points: list[tuple[float, float]], valid: list[bool]
) -> None:
    """Mean x = 0.5 of 4 columns is column 2, mean y = 0.5 of 2 rows is row 1; sigma is 1 cell."""
    target, has_target = gaze_target(torch.tensor([points]), torch.tensor([valid]), (1, 2, 4), sigma=1 / 2)
    assert has_target.tolist() == [[True]]
    torch.testing.assert_close(target[0, 0], torch.tensor(OF_THE_MIDDLE), rtol=0, atol=1e-6)


def test_the_target_of_7_x_7_cells_and_sigma_3_is_the_default() -> None:
    """x = 3 / 7 is column 3, y = 1 / 7 is row 1; 9 cells away, squared, are exp(-9 / 18) = 0.606531."""
    gaze = torch.tensor([3 / 7, 1 / 7]).repeat(1, 16, 1)
    target, has_target = gaze_target(gaze, torch.arange(16)[None] < 8)
    assert target.shape == (1, 2, 7, 7) and has_target.tolist() == [[True, False]]
    assert target[0, 0, 1, 3].item() == pytest.approx(1.0)
    assert [target[0, 0, 4, 3].item(), target[0, 0, 1, 0].item()] == pytest.approx([0.606531] * 2, abs=1e-6)
    assert target[0, 0, 6, 6].item() == pytest.approx(math.exp(-(25 + 9) / 18), abs=1e-6)


def test_gaze_that_is_nowhere_finite_is_no_target() -> None:
    assert not gaze_target(torch.full((2, 16, 2), math.inf), torch.ones(2, 16, dtype=torch.bool))[1].any()


def test_what_is_no_window_is_refused() -> None:
    gaze, valid = torch.zeros(1, 15, 2), torch.ones(1, 15, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"^15 frames do not divide into 2 slices$"):
        gaze_target(gaze, valid)
    with pytest.raises(ValueError, match=r"^valid_BT is of type torch\.float32: which frames have gaze is true or"):
        gaze_target(gaze, valid.float(), (3, 7, 7))


def test_the_gaze_loss_is_the_mean_over_the_slices_that_have_gaze() -> None:
    """Squares of `OF_THE_MIDDLE` are exp(-d): d = 5, 2, 1, 2, 4, 1, 0, 1; their sum is 2.399362, their mean 0.299920.

    An attention of ones there, on the second clip, has the error (1 - exp(-d / 2))^2 in its place: their mean is
    1 - 2 x 3.772771 / 8 + 0.299920. The other slices have no gaze, and what the attention is there does not count.
    """
    gaze = torch.full((2, 4, 2), 0.5)
    valid = torch.tensor([[True, True, False, False], [False, False, True, False]])
    attention = torch.zeros(2, 2, 2, 4)
    attention[0, 1] = 100.0
    attention[1, 0] = 100.0
    assert gaze_loss(attention[:1], gaze[:1], valid[:1], 0.5).item() == pytest.approx(0.299920, abs=1e-6)
    attention[1, 1] = 1.0
    second = 1 - 2 * 3.772771 / 8 + 0.299920
    loss = gaze_loss(attention, gaze, valid, 0.5)
    assert loss.item() == pytest.approx((0.299920 + second) / 2, abs=1e-6)


def test_slices_without_gaze_have_neither_loss_nor_gradient() -> None:
    gaze, valid = random_gaze(1)
    attention = torch.rand(5, 2, 7, 7, requires_grad=True)
    gaze_loss(attention, gaze, valid, sigma=3 / 7).backward()
    assert attention.grad is not None and attention.grad.isfinite().all()
    assert (attention.grad[1] == 0).all() and (attention.grad[0, 0] == 0).all() and (attention.grad[0, 1] != 0).any()
    assert gaze_loss(attention, gaze[1:2], valid[1:2].clone(), 0.4).item() == 0


def test_gradient_of_the_gaze_loss() -> None:
    gaze, valid = random_gaze(2)
    attention = torch.rand(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: gaze_loss(a, gaze, valid, 0.6), attention)


def test_stream_losses_are_cross_entropy_and_weighted_gaze_loss() -> None:
    gaze, valid = random_gaze(3)
    logits, label, attention = torch.randn(5, 4), torch.tensor([0, 1, 2, 3, 0]), torch.rand(5, 2, 7, 7)
    action = -sum(math.log(math.exp(row[k]) / sum(map(math.exp, row))) for row, k in zip(logits.tolist(), label)) / 5
    for weight, sigma in ((0.1, 3 / 7), (2.0, 0.2), (0.0, 3 / 7)):
        losses = stream_losses(StreamOutput(logits, attention), label, gaze, valid, weight, sigma)
        gaze_part = literal.gaze_loss(attention, gaze, valid, sigma).item()
        assert losses.action.item() == pytest.approx(action, rel=1e-5)
        assert losses.gaze.item() == pytest.approx(gaze_part, rel=1e-5)
        assert losses.total.item() == pytest.approx(action + weight * gaze_part, rel=1e-5)
    without = stream_losses(StreamOutput(logits, None), label, gaze, valid, 0.1, 3 / 7)
    assert [loss.item() for loss in without] == [pytest.approx(action, rel=1e-5), without.total.item(), 0.0]


def test_the_action_loss_of_scores_in_16_bits_is_computed_in_float32() -> None:
    """The loss of the first class, for scores of 0 and 12: log(1 + exp(12)) = 12.0000061, which float16 has as 12."""
    losses = stream_losses(
        StreamOutput(torch.tensor([[0.0, 12.0]]).half(), None),
        torch.tensor([0]),
        torch.zeros(1, 16, 2),
        torch.zeros(1, 16, dtype=torch.bool),
        0.1,
        3.0,
    )
    assert losses.action.dtype == torch.float32
    assert losses.action.item() == pytest.approx(12.0000061, abs=2e-6)


# Eight clips of four classes, of which the last has none: the predicted class of each, and its true one.
PREDICTED, TRUE = [0, 0, 1, 1, 1, 0, 3, 2], [0, 0, 0, 0, 1, 1, 2, 2]


def test_the_confusion_matrix_has_a_row_for_each_true_class() -> None:
    counts = confusion(torch.eye(4)[PREDICTED], torch.tensor(TRUE))
    assert counts.tolist() == [[2, 2, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 0, 0]]


def test_accuracies_by_hand() -> None:
    """4 of 8 clips are right; recalls are 2 / 4, 1 / 2, 1 / 2 and, of the class without clips, none.

    Of the second entry all clips are taken for class 0: 4 of 8, and recalls of 1, 0, 0.
    """
    scores = {"rgb": torch.eye(4)[PREDICTED], "flow": torch.eye(4)[[0] * 8]}
    counts = confusion(scores["rgb"], torch.tensor(TRUE))
    assert class_recall(counts) == [0.5, 0.5, 0.5, None]
    assert (micro_accuracy(counts), mean_class_accuracy(counts)) == (0.5, 0.5)
    assert accuracies(scores, torch.tensor(TRUE)) == {
        "rgb": {"micro_accuracy": 0.5, "mean_class_accuracy": 0.5},
        "flow": {"micro_accuracy": 0.5, "mean_class_accuracy": pytest.approx(1 / 3)},
    }
    uneven = confusion(torch.eye(4)[[0, 0, 1, 1, 2]], torch.tensor([0, 0, 0, 1, 2]))
    assert micro_accuracy(uneven) == pytest.approx(4 / 5)
    assert mean_class_accuracy(uneven) == pytest.approx((2 / 3 + 1 + 1) / 3)


def test_accuracies_of_no_clips_are_nan() -> None:
    nothing = confusion(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
    assert math.isnan(mean_class_accuracy(nothing)) and math.isnan(micro_accuracy(nothing))
    assert class_recall(nothing) == [None] * 4


def test_accuracies_equal_their_formulas() -> None:
    torch.manual_seed(0)
    scores, label = torch.rand(300, 12), torch.randint(0, 9, (300,))
    predicted = [max(range(12), key=lambda k: row[k]) for row in scores.tolist()]
    rgb = accuracies({"rgb": scores}, label)["rgb"]
    assert rgb["mean_class_accuracy"] == pytest.approx(literal.mean_class_accuracy(predicted, label.tolist()))
    assert rgb["micro_accuracy"] == pytest.approx(sum(p == t for p, t in zip(predicted, label.tolist())) / 300)


# Windows: their clip, whether they are there at all, and each stream's scores of three classes.
WINDOWS = [
    (0, True, [0.8, 0.1, 0.1], [0.2, 0.2, 0.6]),
    (1, True, [0.1, 0.7, 0.2], [0.3, 0.6, 0.1]),
    (1, True, [0.5, 0.1, 0.4], [0.5, 0.2, 0.3]),
    (0, False, [0.1, 0.1, 0.8], [0.8, 0.1, 0.1]),
    (1, True, [0.3, 0.1, 0.6], [0.1, 0.1, 0.8]),
]
# The means over a clip's windows: clip 1 has three. Clip 2 has none.
MEAN_SCORES = {
    "rgb": [[0.8, 0.1, 0.1], [0.3, 0.3, 0.4], [0.0, 0.0, 0.0]],
    "flow": [[0.2, 0.2, 0.6], [0.3, 0.3, 0.4], [0.0, 0.0, 0.0]],
}


def windows(rows: list[tuple[int, bool, list[float], list[float]]]) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The arguments of `ClipScores.add`: logits are logarithms, plus what a softmax does not see."""
    clip, present, rgb, flow = zip(*rows)
    logits = {"rgb": torch.tensor(rgb).log() + 3, "flow": torch.tensor(flow).log() - 2}
    return torch.tensor(clip), logits, torch.tensor(present)


def test_clip_scores_are_means_of_softmax_scores_without_padding() -> None:
    scores = ClipScores(("rgb", "flow"), 3, 3, CPU)
    scores.add(*windows(WINDOWS[:2]))
    scores.add(*windows(WINDOWS[2:]))
    means = scores.reduce(0.25)
    assert list(means) == ["rgb", "flow", "fused"]
    for name, rows in MEAN_SCORES.items():
        assert means[name].dtype == torch.float64
        torch.testing.assert_close(means[name], torch.tensor(rows).double(), rtol=0, atol=1e-6)
    # 0.25 x 0.8 + 0.75 x 0.2 = 0.35; 0.25 x 0.1 + 0.75 x 0.6 = 0.475
    torch.testing.assert_close(means["fused"][0], torch.tensor([0.35, 0.175, 0.475]).double(), rtol=0, atol=1e-6)


def test_one_stream_alone_has_no_fused_scores() -> None:
    scores = ClipScores(("flow",), 3, 3, CPU)
    clip, logits, present = windows(WINDOWS)
    scores.add(clip, {"flow": logits["flow"]}, present)
    assert list(scores.reduce(0.5)) == ["flow"]


def test_every_sum_is_reduced_over_the_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stood in for: the other worker has as many windows, with other scores. So the counts are reduced too."""
    mine, other = (ClipScores(("rgb", "flow"), 3, 3, CPU) for _ in range(2))
    mine.add(*windows([(0, True, [0.8, 0.1, 0.1], [0.2, 0.2, 0.6])]))
    other.add(*windows([(0, True, [0.4, 0.5, 0.1], [0.4, 0.4, 0.2])]))
    theirs = [*other._sums.values(), other._windows]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(theirs.pop(0)))
    means = mine.reduce(0.25)
    assert not theirs
    assert means["rgb"][0].tolist() == pytest.approx([0.6, 0.3, 0.1], abs=1e-6)
    assert means["flow"][0].tolist() == pytest.approx([0.3, 0.3, 0.4], abs=1e-6)


_WORKER = """
import json, sys
import torch
import torch.distributed as dist
from tune_ego.training.metrics import ClipScores

folder, rank, rows = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
scores = ClipScores(("rgb", "flow"), 3, 3, torch.device("cpu"))
for clip, present, rgb, flow in rows[rank::2]:
    logits = {"rgb": torch.tensor([rgb]).log(), "flow": torch.tensor([flow]).log()}
    scores.add(torch.tensor([clip]), logits, torch.tensor([present]))
means = scores.reduce(0.25)
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump({name: mean.tolist() for name, mean in means.items()}, file)
dist.destroy_process_group()
"""


def test_clip_scores_of_two_workers_are_means_over_the_windows_of_both(tmp_path: Path) -> None:
    """Worker 0 has one window of clip 0 and two of clip 1, worker 1 one of clip 1 and the padding."""
    root = Path(__file__).parents[2]
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    arguments = [sys.executable, "-c", _WORKER, str(tmp_path)]
    workers = [
        subprocess.Popen([*arguments, str(rank), json.dumps(WINDOWS)], cwd=root, env=environment) for rank in range(2)
    ]
    assert [worker.wait(120) for worker in workers] == [0, 0]
    for rank in range(2):
        means = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, rows in MEAN_SCORES.items():
            for mean, row in zip(means[name], rows, strict=True):
                assert mean == pytest.approx(row, abs=1e-6)
        assert means["fused"][0] == pytest.approx([0.35, 0.175, 0.475], abs=1e-6)


def test_fused_scores_are_the_weighted_mean_with_the_weight_on_rgb() -> None:
    scores = {"rgb": torch.tensor([[0.9, 0.1]]), "flow": torch.tensor([[0.3, 0.7]])}
    for weight, expected in ((0.0, [0.3, 0.7]), (0.25, [0.45, 0.55]), (1.0, [0.9, 0.1])):
        assert fuse(scores, weight)[0].tolist() == pytest.approx(expected)


def test_the_fusion_sweep_goes_from_flow_alone_to_rgb_alone() -> None:
    """RGB has the first two clips right, flow the last two.

    With RGB's weight w the first clip is right where 0.9 w + 0.32 (1 - w) > 0.5, from w = 0.35 on; the second where
    0.7 w + 0.42 (1 - w) > 0.5, from 0.3 on; the third, of class 1, where 0.4 w + 0.9 (1 - w) > 0.5, up to 0.75; the
    last, of class 1 too, where 0.1 w + 0.58 (1 - w) > 0.5, up to 0.15.
    """
    first = {"rgb": [0.9, 0.7, 0.6, 0.9], "flow": [0.32, 0.42, 0.1, 0.42]}  # the score of class 0
    scores = {name: torch.tensor([[score, 1 - score] for score in column]).double() for name, column in first.items()}
    curve = fusion_sweep(scores, torch.tensor([0, 0, 1, 1]))
    assert [point["rgb_weight"] for point in curve] == pytest.approx([step / 20 for step in range(21)])
    right = [2] * 4 + [1] * 2 + [2] + [3] * 9 + [2] * 5
    assert [point["micro_accuracy"] for point in curve] == [count / 4 for count in right]
    assert [point["mean_class_accuracy"] for point in curve] == [count / 4 for count in right]
    uneven = fusion_sweep(scores, torch.tensor([0, 1, 1, 1]))
    assert uneven[0] == {"rgb_weight": 0.0, "micro_accuracy": 3 / 4, "mean_class_accuracy": 0.5}
    assert uneven[-1] == {"rgb_weight": 1.0, "micro_accuracy": 1 / 4, "mean_class_accuracy": 0.5}


def test_the_validation_loss_is_the_cross_entropy_of_the_scores() -> None:
    """-(log 0.5 + log 0.25 + log 0.2) / 3 = -log(0.025) / 3."""
    scores = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.25, 0.25], [0.2, 0.3, 0.5]]).double()
    labels = torch.tensor([0, 1, 0])
    assert cross_entropy(scores, labels) == pytest.approx(-math.log(0.025) / 3, rel=1e-6)
    scores[2, 0] = 0  # counts as the smallest normal number of float64, 2^-1022
    assert cross_entropy(scores, labels) == pytest.approx((-math.log(0.125) + 1022 * math.log(2)) / 3, rel=1e-6)
