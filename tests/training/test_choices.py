"""Choices of the configuration that the code does not know: each raises instead of taking another one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.config import ModelConfig
from tune_ego.model.i3d import Unit3D
from tune_ego.model.stam import scale_attention, stam
from tune_ego.search.scheduler import _scheduler_of_ray
from tune_ego.training.hardware import autocast_dtype
from tune_ego.training.optim import build_optimizer, schedule_factor

UNKNOWN_SPACE: Any = SimpleNamespace(scheduler=SimpleNamespace(name="new"))
UNKNOWN: Any = SimpleNamespace(name="new", lr=0.1, warmup=0, k=6)


@pytest.mark.parametrize(
    "choose",
    [
        lambda: build_optimizer(tiny_config().model_copy(update={"optimizer": UNKNOWN}), [torch.zeros(1)]),
        lambda: schedule_factor(UNKNOWN, 1, 10),
        lambda: stam(8, ModelConfig(width=0.05).model_copy(update={"stam_block": "new"})),
        lambda: scale_attention(torch.rand(1, 2, 2, 2), "new"),
        lambda: autocast_dtype("new", torch.device("cpu")),
        lambda: _scheduler_of_ray(UNKNOWN_SPACE, 10),
        lambda: Unit3D(1, 1, activation="new"),
    ],
    ids=["optimizer", "schedule", "stam_block", "attention_scale", "precision", "scheduler", "activation"],
)
def test_an_unknown_choice_raises(choose: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, KeyError), match="new"):
        choose()
