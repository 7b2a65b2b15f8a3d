"""Choices of the configuration that the code does not know: each raises instead of taking another one."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.conftest import tiny_config
from tune_ego.config import ModelConfig, TrainConfig
from tune_ego.model.i3d import Unit3D
from tune_ego.model.stam import scale_attention, stam, trunk_activation
from tune_ego.runs.placement import decodes_on_gpu
from tune_ego.search.scheduler import _scheduler_of_ray
from tune_ego.search.searcher import TrialSource
from tune_ego.training.hardware import autocast_dtype, compiles
from tune_ego.training.optim import build_optimizer, schedule_factor

UNKNOWN_SPACE: Any = SimpleNamespace(scheduler=SimpleNamespace(name="new"))
UNKNOWN: Any = SimpleNamespace(name="new", lr=0.1, warmup=0, k=6)
WARMING_UP: Any = SimpleNamespace(name="new", warmup=5)
NO_RECORDS: Any = type("Records", (dict,), {"draws": lambda self: []})()
UNKNOWN_SEARCHER: Any = SimpleNamespace(searcher="new", configurations=1, repeats=1, trials=1)


@pytest.mark.parametrize(
    "choose",
    [
        pytest.param(
            lambda: build_optimizer(tiny_config().model_copy(update={"optimizer": UNKNOWN}), []),
            id="optimizer",
        ),
        pytest.param(lambda: schedule_factor(UNKNOWN, 1, 10), id="schedule"),
        pytest.param(
            lambda: stam(8, ModelConfig(width=0.05).model_copy(update={"stam_block": "new"}), non_negative=True),
            id="stam_block",
        ),
        pytest.param(lambda: scale_attention(torch.rand(1, 2, 2, 2), "new"), id="attention_scale"),
        pytest.param(lambda: autocast_dtype("new", torch.device("cpu")), id="precision"),
        pytest.param(lambda: _scheduler_of_ray(UNKNOWN_SPACE, 10), id="scheduler"),
        pytest.param(lambda: Unit3D(1, 1, activation="new"), id="activation"),
        pytest.param(lambda: schedule_factor(WARMING_UP, 1, 10), id="schedule, warming up"),
        pytest.param(
            lambda: decodes_on_gpu(tiny_config().model_copy(update={"data": SimpleNamespace(decode="new")}), 1),
            id="decode",
        ),
        pytest.param(
            lambda: trunk_activation(ModelConfig().model_copy(update={"activation_scope": "new"})),
            id="activation_scope",
        ),
        pytest.param(
            lambda: compiles(
                tiny_config().model_copy(
                    update={"train": TrainConfig(activation_checkpointing=False).model_copy(update={"compile": "new"})}
                ),
                torch.device("cuda"),
                final=True,
            ),
            id="compile",
        ),
        pytest.param(lambda: TrialSource("", UNKNOWN_SEARCHER, 0, NO_RECORDS, 1, bool).suggest("t"), id="searcher"),
    ],
)
def test_an_unknown_choice_raises(choose: Callable[[], Any]) -> None:
    with pytest.raises((ValueError, KeyError), match="new"):
        choose()
