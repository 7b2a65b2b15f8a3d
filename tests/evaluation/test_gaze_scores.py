from __future__ import annotations

import math

import pytest
import torch

from tests import literal
from tune_ego.evaluation.gaze_scores import GAZE_RADIUS, RESOLUTION, GazeScores, auc, auc_judd, enlarge, nss, overlaps

CPU = torch.device("cpu")


def random_fixations(seed: int, maps: int, side: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Maps with ties, gaze cells of which some repeat, and a map without gaze."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 40, (maps, side * side), generator=generator) / 40
    cells = torch.randint(0, side * side, (maps, 8), generator=generator)
    cells[0, 3] = cells[0, 5]
    valid = torch.rand(maps, 8, generator=generator) < 0.7
    valid[0] = True
    valid[1] = False
    return values, cells, valid


def test_auc_and_nss_equal_their_formulas() -> None:
    maps, cells, valid = random_fixations(0, 20, 9)
    pairs, judd, saliency = (score(maps, cells, valid) for score in (auc, auc_judd, nss))
    assert not torch.allclose(pairs[2:], judd[2:], atol=0.01)
    for index in range(20):
        points = [divmod(int(cell), 9) for cell, ok in zip(cells[index], valid[index]) if ok]
        if not points:
            assert pairs[index].isnan() and judd[index].isnan() and saliency[index].isnan()
            continue
        image = maps[index].reshape(9, 9)
        assert pairs[index].item() == pytest.approx(literal.auc(image, points), rel=1e-5)
        assert judd[index].item() == pytest.approx(literal.auc_judd(image, points), rel=1e-5)
        assert saliency[index].item() == pytest.approx(literal.nss(image, points), rel=1e-4, abs=1e-6)


def test_precision_and_recall_equal_their_formulas() -> None:
    torch.manual_seed(0)
    maps = torch.rand(2, RESOLUTION**2)
    points = torch.rand(2, 3, 2)
    thresholds = torch.tensor([0.0, 0.4, 0.9])
    precision, recall = overlaps(maps, points, thresholds)
    for s in range(2):
        scaled = (maps[s] - maps[s].min()) / (maps[s].max() - maps[s].min())
        for f in range(3):
            x, y = (points[s, f] * RESOLUTION).tolist()
            for k, threshold in enumerate(thresholds.tolist()):
                hits = above = looked_at = 0
                for cell, value in enumerate(scaled.tolist()):
                    i, j = divmod(cell, RESOLUTION)
                    inside = (j + 0.5 - x) ** 2 + (i + 0.5 - y) ** 2 <= GAZE_RADIUS**2
                    hits += inside and value > threshold
                    above += value > threshold
                    looked_at += inside
                assert precision[s, f, k].item() == pytest.approx(hits / above, rel=1e-5)
                assert recall[s, f, k].item() == pytest.approx(hits / looked_at, rel=1e-5)


def scored(attention: torch.Tensor, gaze: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    scores = GazeScores(CPU)
    for b in range(len(attention)):  # batches of one: means are over all maps
        scores.add(attention[b : b + 1], gaze[b : b + 1], valid[b : b + 1])
    result = scores.result()
    assert result is not None
    return result


def test_attention_at_the_gaze_beats_the_centre_and_the_centre_beats_noise() -> None:
    torch.manual_seed(0)
    gaze = (torch.randn(20, 2, 1, 2) / 6 + 0.5).clamp(0.05, 0.95).expand(20, 2, 8, 2).reshape(20, 16, 2)
    valid = torch.ones(20, 16, dtype=torch.bool)
    column = torch.arange(7) / 7  # where the gaze loss puts its target
    x, y = gaze[:, ::8, 0], gaze[:, ::8, 1]
    at_gaze = torch.exp(-((column - x[..., None])[:, :, None, :] ** 2 + (column - y[..., None])[..., None] ** 2) / 0.04)
    result = scored(at_gaze, gaze, valid)
    centre = GazeScores(CPU)
    centre.add_centre(at_gaze.shape, gaze, valid, 1.0)
    middle = centre.result()
    noise = scored(torch.rand(20, 2, 7, 7), gaze, valid)
    assert middle is not None and result["frames"] == middle["frames"] == 320 and result["maps"] == 40
    for key in ("auc_judd", "auc", "nss", "f1"):
        assert result[key] > middle[key] > noise[key]
    assert result["auc_judd"] > 0.95 and abs(noise["nss"]) < 0.5
    for value in (0.25, 0.3, 0.7):
        even = scored(torch.full((20, 2, 7, 7), value), gaze, valid)
        assert (even["nss"], even["auc_judd"], even["auc"], even["f1"]) == (0, 0.5, 0.5, 0)
    assert scored(torch.rand(20, 2, 1, 1), gaze, valid)["auc_judd"] == 0.5


def test_auc_by_hand() -> None:
    """Four cells, gaze at the second highest: Judd's curve goes by (1/3, 1), two of three others are lower."""
    maps, cells, valid = torch.tensor([[0.1, 0.8, 0.9, 0.2]]), torch.tensor([[1]]), torch.tensor([[True]])
    assert auc_judd(maps, cells, valid).item() == pytest.approx(1 - 1 / 3 / 2)
    assert auc(maps, cells, valid).item() == pytest.approx(2 / 3)


def test_f1_and_the_centre_equal_their_formulas() -> None:
    """Maps of 4 x 6 cells in two slices, two frames each, some without gaze."""
    torch.manual_seed(0)
    gaze, valid = torch.rand(3, 4, 2), torch.rand(3, 4) < 0.7
    valid[0] = torch.tensor([True, True, False, False])
    middle = torch.tensor(
        [[math.exp(-((j - 3) ** 2 + (i - 2) ** 2) / (2 * 1.3**2)) for j in range(6)] for i in range(4)]
    )
    points = [
        [(x, y) for (x, y), ok in zip(gaze[b, at : at + 2].tolist(), valid[b, at : at + 2]) if ok]
        for b in range(3)
        for at in (0, 2)
    ]
    attention = torch.rand(3, 2, 4, 6)
    centre = GazeScores(CPU)
    centre.add_centre(attention.shape, gaze, valid, 1.3 / 4)
    for result, smalls in (
        (scored(attention, gaze, valid), [*attention.flatten(0, 1)]),
        (centre.result(), [middle] * 6),
    ):
        assert result is not None
        maps = [literal.enlarged(small, RESOLUTION) for small in smalls]
        best = literal.best_f1(maps, points, GAZE_RADIUS, 50)
        for key in ("f1", "precision", "recall", "threshold"):
            assert result[key] == pytest.approx(getattr(best, key), rel=1e-4), key
        cells = [[(int(y * RESOLUTION), int(x * RESOLUTION)) for x, y in of_map] for of_map in points]
        looked_at = [(one, where) for one, where in zip(maps, cells) if where]
        assert result["maps"] == len(looked_at) == 5 and result["frames"] == sum(map(len, points))
        pairs = {"auc": literal.auc, "auc_judd": literal.auc_judd, "nss": literal.nss}
        for key, score in pairs.items():
            mean = sum(score(one, where) for one, where in looked_at) / len(looked_at)
            assert result[key] == pytest.approx(mean, rel=2e-3), key  # rounding parts what is symmetric


# A map of 1 x 2 cells, 0 and 1: enlarged, its columns k = 0 to 31 are (2 k + 1) / 64 and the other 32 are 1.
TO_THE_RIGHT = [[0.0, 1.0]]
# With the gaze at x = 3 / 4, y = 1 / 4, where the map is 1:
#   ties are halves: (2048 + 2047 / 2) / 4095; thresholds: 1 - 2047 / 4095 / 2, the same
#   mean 0.75, variance (4095 / 3 / 4096 + 1) / 2 - 0.75^2 = 0.104126
#   a disc of radius 7.5 has 172 cells: 2 x (14 + 14 + 14 + 14 + 12 + 10 + 8)
#   scaled, column k is 2 k / 63: 33 columns of 64 cells are above the thresholds 0.96 and 0.98, and all of the disc;
#   of thresholds that are as good the lowest
AT_THE_GAZE = {
    "auc_judd": 0.750061,
    "auc": 0.750061,
    "nss": 0.25 / math.sqrt(0.104126),
    "f1": 2 * 172 / (172 + 33 * 64),
    "precision": 172 / (33 * 64),
    "recall": 1.0,
    "threshold": 0.96,
}
NONE = (0.1, 0.1, False)


@pytest.mark.parametrize(
    ("maps", "points", "counts"),
    [
        ([TO_THE_RIGHT], [(0.75, 0.25, True)] * 2, (1, 2)),
        ([[[0.0], [1.0]]], [(0.25, 0.75, True), (0.25, 0.75, True)], (1, 2)),  # y, down the rows
        ([TO_THE_RIGHT], [NONE, (0.75, 0.25, True)], (1, 1)),
        ([TO_THE_RIGHT], [(0.75, 0.25, True), (1.0, 0.5, True)], (1, 1)),  # 1 is outside
        ([TO_THE_RIGHT], [(0.75, 0.25, True), (0.5, -0.01, True)], (1, 1)),
        ([TO_THE_RIGHT], [(0.75, 0.25, True), (math.nan, math.nan, True)], (1, 1)),
        ([TO_THE_RIGHT, [[1.0, 0.0]]], [(0.75, 0.25, True), (0.75, 0.25, True), NONE, NONE], (1, 2)),
        ([[[1.0, 0.0]], TO_THE_RIGHT], [NONE, NONE, (0.75, 0.25, True), (0.75, 0.25, True)], (1, 2)),
        ([TO_THE_RIGHT, TO_THE_RIGHT], [(0.75, 0.25, True)] * 2, (2, 2)),
    ],
)
def test_scores_by_hand(
    maps: list[list[list[float]]], points: list[tuple[float, float, bool]], counts: tuple[int, int]
) -> None:
    """The slices of one window, and its frames with their gaze points."""
    gaze = torch.tensor([[x, y] for x, y, _ in points])[None]
    result = scored(torch.tensor(maps)[None], gaze, torch.tensor([[valid for *_, valid in points]]))
    assert (result["maps"], result["frames"]) == counts
    assert {key: result[key] for key in AT_THE_GAZE} == pytest.approx(AT_THE_GAZE, rel=1e-5)


def test_windows_add_up_to_means_over_maps_and_over_frames() -> None:
    """A map with three frames at the gaze, and one with one frame at the other end: (0, 0) is inside the crop.

    Of that one the AUCs are 63 x 1 / 2 / 4095, for 63 cells are as low, and NSS (1 / 64 - 0.75) / 0.322686. Precision
    and recall are means over four frames: no cell of the last one's disc is above 0.96.
    """
    gaze = torch.tensor([[[0.75, 0.25]] * 3 + [[0.5, 2.0]], [[0.0, 0.0]] + [[0.5, 0.5]] * 3])
    valid = torch.tensor([[True] * 4, [True] + [False] * 3])
    result = scored(torch.tensor([[TO_THE_RIGHT]] * 2), gaze, valid)
    low = 63 / 2 / 4095
    deviation = math.sqrt(0.104126)
    assert result["maps"] == 2 and result["frames"] == 4
    assert result["auc"] == pytest.approx((0.750061 + low) / 2, rel=1e-5)
    assert result["auc_judd"] == pytest.approx((0.750061 + 1 - (4095 / 4095) / 2) / 2, rel=1e-5)
    assert result["nss"] == pytest.approx((0.25 + 1 / 64 - 0.75) / 2 / deviation, rel=1e-4)
    precision, recall = 3 / 4 * 172 / (33 * 64), 3 / 4
    assert result["threshold"] == pytest.approx(0.96)
    assert (result["precision"], result["recall"]) == pytest.approx((precision, recall))
    assert result["f1"] == pytest.approx(2 * precision * recall / (precision + recall))


def test_precision_and_recall_by_hand() -> None:
    """Half of the disc, 86 of its 172 cells, lies in the left half of the map, 2,048 cells that are 1.

    Of the disc around the corner a quarter, 43 cells, lies in the map, all of it in the left half. Nothing is above a
    threshold of 1: precision 0.
    """
    maps = torch.zeros(64, 64)
    maps[:, :32] = 5.0
    precision, recall = overlaps(
        maps.reshape(1, -1), torch.tensor([[[0.5, 0.5], [0.0, 0.0]]]), torch.tensor([0.0, 1.0])
    )
    assert precision.tolist() == [[pytest.approx([86 / 2048, 0.0]), pytest.approx([43 / 2048, 0.0])]]
    assert recall.tolist() == [[[0.5, 0.0], [1.0, 0.0]]]


@pytest.mark.parametrize(("low", "high", "even"), [(0.3, 0.3, True), (1.0, 1.0000005, True), (1.0, 1.00001, False)])
def test_a_map_that_is_even_becomes_0(low: float, high: float, even: bool) -> None:
    """But for rounding: differences up to a millionth of its largest value."""
    attention = torch.full((1, 2, 3, 3), low)
    attention[0, 0, 1, 2] = high
    attention[0, 1] = torch.rand(3, 3)
    large = enlarge(attention)
    assert large.shape == (2, 64 * 64) and large.dtype == torch.float32
    assert bool((large[0] == 0).all()) == even
    assert large[1].max() > large[1].min()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_maps_that_are_not_finite_have_no_score(value: float) -> None:
    torch.manual_seed(0)
    attention, gaze, valid = torch.rand(3, 2, 7, 7), torch.rand(3, 16, 2), torch.ones(3, 16, dtype=torch.bool)
    attention[1, 0, 2, 2] = value
    spoilt = scored(attention, gaze, valid)
    assert all(math.isnan(spoilt[key]) for key in ("auc_judd", "auc", "nss", "f1", "precision", "recall"))
    valid[1, :8] = False  # no gaze there
    assert all(math.isfinite(score) for score in scored(attention, gaze, valid).values())


def test_maps_are_enlarged_on_the_grid_of_the_gaze_loss() -> None:
    """Cell j stands for x = j / W: between cells the map is linear, beyond the last one it stays."""
    attention = torch.rand(1, 1, 3, 5)
    enlarged = enlarge(attention).reshape(RESOLUTION, RESOLUTION)
    for i, j in [(0, 0), (10, 33), (63, 5), (40, 63), (20, 52)]:
        row, column = (min((place + 0.5) / RESOLUTION * side, side - 1) for place, side in ((i, 3), (j, 5)))
        top, left = int(row), int(column)
        expected = sum(
            abs(1 - abs(row - y)) * abs(1 - abs(column - x)) * attention[0, 0, y, x].item()
            for y in {top, min(top + 1, 2)}
            for x in {left, min(left + 1, 4)}
        )
        assert enlarged[i, j].item() == pytest.approx(expected, rel=1e-4)


def test_gaze_outside_the_crop_or_absent_does_not_count() -> None:
    torch.manual_seed(0)
    attention, gaze = torch.rand(3, 2, 7, 7), torch.rand(3, 16, 2)
    valid = torch.rand(3, 16) < 0.5
    valid[0] = False
    expected = scored(attention, gaze, valid)
    spoiled = torch.where(valid[..., None], gaze, torch.nan)
    assert scored(attention, spoiled, valid) == expected
    spoiled[~valid] = torch.tensor([1.2, 0.5])
    assert scored(attention, spoiled, torch.ones_like(valid)) == expected
    nothing = GazeScores(CPU)
    nothing.add(attention, gaze, torch.zeros_like(valid))
    assert nothing.result() is None
