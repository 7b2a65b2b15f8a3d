"""Training and hyper-parameter search of a gaze-supervised two-stream action recogniser on Ray.

The public names below are imported on first use, so that `import tune_ego` takes no time.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tune_ego.api import (
        Prediction,
        PredictionSettings,
        SegmentSettings,
        TrainedModel,
        WindowSettings,
        load_model,
        open_shards,
        read_experiment,
        train,
    )
    from tune_ego.config import Config
    from tune_ego.config_io import load_config
    from tune_ego.errors import UserError

os.environ["RAY_TRAIN_V2_ENABLED"] = "1"  # read when `ray.train` is imported; version 1 has other settings

__version__ = "0.2.0"
__all__ = [
    "Config",
    "Prediction",
    "PredictionSettings",
    "SegmentSettings",
    "TrainedModel",
    "UserError",
    "WindowSettings",
    "__version__",
    "load_config",
    "load_model",
    "open_shards",
    "read_experiment",
    "train",
]
_HOMES = {"Config": "tune_ego.config", "load_config": "tune_ego.config_io", "UserError": "tune_ego.errors"}
"""Name -> its module, where that is not `tune_ego.api`: these need no torch."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'tune_ego' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "tune_ego.api")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
