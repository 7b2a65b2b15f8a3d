"""A search with real Ray whose outcome is known beforehand, for all tests that need one that has ended."""

from __future__ import annotations

import contextlib
import io
import shutil
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
import torch
import yaml

from tests.conftest import TINY, tiny_config
from tune_ego.dataset.shards import open_shards
from tune_ego.model import build_stream
from tune_ego.results.experiment import Experiment
from tune_ego.results.reading import read_experiment
from tune_ego.search.tune import start_search


class KnownSearch(NamedTuple):
    """A search of three trials, one after another, of 6 iterations with a validation after every second one.

    The RGB stream of trials 00000 and 00002 starts from weights that answer a class of the validation clips whatever
    they see; that of 00001 from weights that answer a class of none of them. The learning rate is too small to change
    that, and 00002's is so large that its first step spoils the weights. So 00000 finishes, ASHA stops 00001 at
    its first rung, iteration 2, and 00002 fails.
    """

    root: Path
    output: str
    """All that the command printed."""
    labels: list[int]
    """Labels of the validation clips: split 1, stratified fold 0."""
    right: int
    """The class that 00000 answers."""

    @property
    def accuracy(self) -> float:
        """Mean class accuracy of 00000: all clips of one class are right, and none of the others."""
        return 1 / len(set(self.labels))

    def copy(self, folder: Path) -> str:
        """Copy the experiment, for a test that changes it; return the new root."""
        return str(shutil.copytree(self.root, folder / "search"))

    def read(self) -> Experiment:
        return read_experiment(str(self.root))


def run_known_search(folder: Path, shards: str) -> KnownSearch:
    """Run it, with both trackers that keep files; about half a minute."""
    rows = pq.read_table(f"{shards}/clips.parquet").to_pylist()
    labels = [row["action"] for row in rows if row["split1"] == "train" and row["stratified_fold"] == 0]
    right, wrong = labels[0], min({row["action"] for row in rows} - set(labels))
    for name, label in (("right", right), ("wrong", wrong)):
        weights = build_stream("rgb", len(open_shards(shards).actions), tiny_config().model).state_dict()
        weights["logits.conv3d.bias"][label] = 1000
        torch.save(weights, folder / f"{name}.pt")
    base: dict[str, dict[str, object]] = {}
    for key, value in TINY.items():
        part, leaf = key.split(".")
        base.setdefault(part, {})[leaf] = value
    starts = [str(folder / "right.pt"), str(folder / "wrong.pt")]
    space = {
        "base": {**base, "optimizer": {"name": "sgd"}},
        "space": {
            "label": {"grid": ["right", "wrong", "diverges"]},
            "init_from.rgb": [{"when": {"label": "wrong"}, "value": starts[1]}, {"value": starts[0]}],
            "optimizer.lr": [{"when": {"label": "diverges"}, "value": 1e30}, {"value": 1e-12}],
        },
        "scheduler": {"grace": 2, "reduction": 2},
    }
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    root, output = folder / "search", io.StringIO()
    with contextlib.redirect_stdout(output):
        start_search(str(folder / "space.yaml"), shards, str(root), {}, 0, 1, None, track=["mlflow", "tensorboard"])
    return KnownSearch(root, output.getvalue(), labels, right)
