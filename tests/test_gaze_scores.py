from __future__ import annotations

import math

import pytest
import torch

from tests import literal
from tune_ego.gaze_scores import GAZE_RADIUS, RESOLUTION, GazeScores, auc, auc_judd, enlarge, nss, overlaps

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
        flat = image.flatten().tolist()
        mean = sum(flat) / len(flat)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in flat) / len(flat))
        expected = sum((image[i, j].item() - mean) / deviation for i, j in points) / len(points)
        assert saliency[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-6)


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
                hits = found = looked_at = 0
                for cell, value in enumerate(scaled.tolist()):
                    i, j = divmod(cell, RESOLUTION)
                    inside = (j + 0.5 - x) ** 2 + (i + 0.5 - y) ** 2 <= GAZE_RADIUS**2
                    hits += inside and value > threshold
                    found += value > threshold
                    looked_at += inside
                assert precision[s, f, k].item() == pytest.approx(hits / found, rel=1e-5)
                assert recall[s, f, k].item() == pytest.approx(hits / looked_at, rel=1e-5)


def scored(attention: torch.Tensor, gaze: torch.Tensor, valid: torch.Tensor) -> dict[str, float]:
    scores = GazeScores(CPU)
    for b in range(len(attention)):  # batches of one: means are over all maps
        scores.add(attention[b : b + 1], gaze[b : b + 1], valid[b : b + 1])
    found = scores.result()
    assert found is not None
    return found


def test_attention_at_the_gaze_beats_the_centre_and_the_centre_beats_noise() -> None:
    torch.manual_seed(0)
    gaze = (torch.randn(20, 2, 1, 2) / 6 + 0.5).clamp(0.05, 0.95).expand(20, 2, 8, 2).reshape(20, 16, 2)
    valid = torch.ones(20, 16, dtype=torch.bool)
    column = torch.arange(7) / 7  # where the gaze loss puts its target
    x, y = gaze[:, ::8, 0], gaze[:, ::8, 1]
    at_gaze = torch.exp(-((column - x[..., None])[:, :, None, :] ** 2 + (column - y[..., None])[..., None] ** 2) / 0.04)
    found = scored(at_gaze, gaze, valid)
    centre = GazeScores(CPU)
    centre.add_centre(at_gaze.shape, gaze, valid, 1.0)
    middle = centre.result()
    noise = scored(torch.rand(20, 2, 7, 7), gaze, valid)
    assert middle is not None and found["frames"] == middle["frames"] == 320 and found["maps"] == 40
    for key in ("auc_judd", "auc", "nss", "f1"):
        assert found[key] > middle[key] > noise[key]
    assert found["auc_judd"] > 0.95 and abs(noise["nss"]) < 0.5
    for value in (0.25, 0.3, 0.7):
        even = scored(torch.full((20, 2, 7, 7), value), gaze, valid)
        assert (even["nss"], even["auc_judd"], even["auc"], even["f1"]) == (0, 0.5, 0.5, 0)
    assert scored(torch.rand(20, 2, 1, 1), gaze, valid)["auc_judd"] == 0.5


def test_auc_by_hand() -> None:
    """Four cells, gaze at the second highest: Judd's curve goes by (1/3, 1), two of three others are lower."""
    maps, cells, valid = torch.tensor([[0.1, 0.8, 0.9, 0.2]]), torch.tensor([[1]]), torch.tensor([[True]])
    assert auc_judd(maps, cells, valid).item() == pytest.approx(1 - 1 / 3 / 2)
    assert auc(maps, cells, valid).item() == pytest.approx(2 / 3)


def test_f1_equals_its_formula() -> None:
    torch.manual_seed(0)
    attention, gaze, valid = torch.rand(3, 2, 3, 3), torch.rand(3, 4, 2), torch.rand(3, 4) < 0.7
    found = scored(attention, gaze, valid)
    maps = [one.reshape(RESOLUTION, RESOLUTION) for one in enlarge(attention)]
    points = [
        [(x, y) for (x, y), ok in zip(gaze[b, at : at + 2].tolist(), valid[b, at : at + 2]) if ok]
        for b in range(3)
        for at in (0, 2)
    ]
    assert found["f1"] == pytest.approx(literal.best_f1(maps, points, GAZE_RADIUS, 50), rel=1e-4)
    assert found["f1"] == pytest.approx(2 / (1 / found["precision"] + 1 / found["recall"]), rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_maps_that_are_not_finite_have_no_score(value: float) -> None:
    torch.manual_seed(0)
    attention, gaze, valid = torch.rand(3, 2, 7, 7), torch.rand(3, 16, 2), torch.ones(3, 16, dtype=torch.bool)
    attention[1, 0, 2, 2] = value
    spoilt = scored(attention, gaze, valid)
    assert all(math.isnan(spoilt[key]) for key in ("auc_judd", "auc", "nss", "f1", "precision", "recall"))
    valid[1, :8] = False  # nobody looks there
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
