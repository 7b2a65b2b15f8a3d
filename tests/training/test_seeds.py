"""The numbers behind first weights and dropout: a stored checkpoint resumes with the same ones in a later version."""

from __future__ import annotations

import pytest

from tests.conftest import tiny_config
from tests.training.test_step import CPU, ORIGIN
from tune_ego.training.trainer import Trainer

WEIGHTS, DROPOUT = 0, 1


@pytest.mark.parametrize(
    ("seed", "place", "rgb", "flow"),
    [
        (0, (WEIGHTS,), 4088532484, 3953331965),
        (0, (DROPOUT, 0, 0), 2150671595, 403051660),
        (0, (DROPOUT, 3, 2), 1550425521, 1368463905),
        (7, (WEIGHTS,), 393969088, 75971499),
        (7, (DROPOUT, 3, 2), 3105892555, 882249621),
    ],
)
def test_the_numbers_of_a_seed(seed: int, place: tuple[int, ...], rgb: int, flow: int) -> None:
    """`SeedSequence(seed, spawn_key=(stream, *place))`: the place is (weights) or (dropout, iteration, pass)."""
    trainer = Trainer(tiny_config(seed=seed), ORIGIN, CPU)
    assert trainer._seeds(*place) == {"rgb": rgb, "flow": flow}


@pytest.mark.parametrize(("stream", "total"), [("rgb", 0.899801), ("flow", -1.024343)])
def test_the_first_weights_of_seed_0(stream: str, total: float) -> None:
    """The sum of the classifier's weights."""
    trainer = Trainer(tiny_config(streams=stream), ORIGIN, CPU)
    weight = trainer.model.get_parameter(f"{stream}.logits.conv3d.weight")
    assert weight.double().sum().item() == pytest.approx(total, abs=1e-5)
