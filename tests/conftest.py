"""Shared data: one small synthetic EGTEA, its shards, and one Ray instance for the whole session."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.drivers import reset_ignored_signals
from tests.handmade import write_handmade
from tune_ego.cluster import ray_session
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.dataset.prepare import Settings, ShardResult, ShardTask, prepare, write_task
from tune_ego.dataset.synthetic import synthesize

if TYPE_CHECKING:
    from tests.searches import KnownSearch

SHARED = Path(__file__).resolve().parents[2] / "shared"
COMMAND = "import sys; from tune_ego.cli import main; sys.argv = ['tune-ego', *sys.argv[1:]]; main()"
"""`tune-ego`, for `python -c`."""
TINY = {
    "data.crop": 32,
    "model.width": 0.05,
    "model.bn_momentum": 0.1,
    "train.batch_size": 4,
    "train.iterations": 6,
    "train.validate_every": 2,
    "train.log_every": 1,
}


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real annotations, gaze and videos, where they are."""
    if not (SHARED / "egtea").is_dir():
        pytest.skip("no real EGTEA annotations here")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def signals_not_ignored() -> None:
    reset_ignored_signals()


@pytest.fixture(scope="session")
def egtea(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 clips of 4 classes in two sessions, one of each gaze layout."""
    root = tmp_path_factory.mktemp("synthetic") / "egtea"
    synthesize(root, verbs=2, nouns=2, clips=40, seconds=0.8, size=(96, 72), seed=3)
    return root


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """Ray on this machine, started once; never a cluster that the environment points to."""
    os.environ.pop("RAY_ADDRESS", None)
    with ray_session():
        yield


@pytest.fixture(scope="session")
def shards(egtea: Path, ray_cluster: None) -> str:
    out = egtea.parent / "shards"
    prepare(str(egtea), str(out), Settings((48, 36)))
    return str(out)


@pytest.fixture(scope="session")
def known_search(tmp_path_factory: pytest.TempPathFactory, shards: str) -> KnownSearch:
    """A search that has ended: one trial finished, one stopped, one failed. Tests that change it copy it."""
    from tests.searches import run_known_search

    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("MLFLOW_TRACKING_URI", raising=False)
        return run_known_search(tmp_path_factory.mktemp("known"), shards)


@pytest.fixture(scope="session")
def handmade_shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten clips whose images say which frame they show (`tests.handmade`); made without Ray."""
    return write_handmade(tmp_path_factory.mktemp("handmade"))


@contextmanager
def no_ray(address: str | None) -> Iterator[None]:
    yield


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let `prepare` make its shards in this process, without Ray; the names of those that it makes."""
    names: list[str] = []

    def run(tasks: list[ShardTask], out: str, settings: Settings, jobs: int | None) -> Iterator[ShardResult]:
        for task in tasks:
            names.append(task.shard)
            yield write_task(task, out, settings)

    monkeypatch.setattr("tune_ego.dataset.prepare.ray_session", no_ray)
    monkeypatch.setattr("tune_ego.dataset.prepare._run", run)
    return names


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """The models here are tiny: two threads would wait for each other."""
    torch.set_num_threads(1)


def tiny_config(**changes: object) -> Config:
    """Seconds of training on a CPU; keyword `train__iterations` is the key `train.iterations`."""
    dotted = {key.replace("__", "."): value for key, value in changes.items()}
    return override_config(Config(), {**TINY, **dotted}, "test")
