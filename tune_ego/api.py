"""The Python interface: the functions and classes that `import tune_ego` offers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.dataset import shards
from tune_ego.prediction.predict import PredictionSettings as PredictionSettings
from tune_ego.prediction.predict import WindowSettings as WindowSettings
from tune_ego.prediction.segments import SegmentSettings as SegmentSettings
from tune_ego.prediction.trained_model import Prediction as Prediction
from tune_ego.prediction.trained_model import TrainedModel as TrainedModel
from tune_ego.prediction.trained_model import load_model as load_model
from tune_ego.results import experiment, reading


def open_shards(uri: str | Path) -> shards.Shards:
    """Open the shards that `tune-ego prepare` wrote. Raises `UserError` where they are absent or unfinished."""
    return shards.open_shards(storage.absolute(uri))


def read_experiment(uri: str | Path) -> experiment.Experiment:
    """Read the files of a search, running or not: its `trials`, its `best` configuration, `to_arrow()`, `to_pandas()`.

    Raises `UserError` where the folder or URI holds no search.
    """
    return reading.read_experiment(storage.absolute(uri))


def train(
    config: Config,
    data: str | Path,
    run: str | Path,
    *,
    address: str | None = None,
    test: bool = True,
    track: Sequence[str] = (),
) -> str:
    """Train one configuration on Ray, as `tune-ego train` does; the same call resumes an interrupted run.

    Args:
        config: The run's configuration, from `load_config` or `Config()`.
        data: Folder or URI of the shards.
        run: Folder or URI of the run: checkpoints, metrics and final weights.
        address: Ray cluster to join, e.g. `auto`; by default `RAY_ADDRESS`, else one is started on this machine.
        test: Test the final weights on the test clips of the split, and write `evaluation.json`.
        track: Names of trackers: `tensorboard`, `mlflow`, `wandb`.

    Returns:
        The URI of the final weights.

    Raises:
        UserError: The configuration and the shards do not fit, or the folder holds another run.
        SystemExit: Interrupted by a signal (code 130), after checkpoints were written or 60 s have passed.
    """
    from tune_ego.runs.final import train_final  # Ray: seconds to import

    return train_final(config, storage.absolute(data), storage.absolute(run), address, test=test, track=track)
