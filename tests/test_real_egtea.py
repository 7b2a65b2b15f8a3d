"""The whole path on real annotations and gaze: 106 classes, both gaze layouts, real clip lengths."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.assemble_egtea import assemble
from tests.conftest import tiny_config
from tests.test_search import write_space
from tune_ego.config import load_config, override_config
from tune_ego.dataset.gaze import Gaze, read_gaze
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import open_shards
from tune_ego.evaluate import evaluate
from tune_ego.experiment import read_metrics
from tune_ego.export import export_best
from tune_ego.feed.windows import FeedPlan
from tune_ego.final import train_final
from tune_ego.tune import start_search


@pytest.mark.slow
def test_real_annotations_from_clips_to_test_result(shared: Path, tmp_path: Path, ray_cluster: None) -> None:
    names = assemble(shared, tmp_path / "egtea", every=4)
    info = prepare(str(tmp_path / "egtea"), str(tmp_path / "shards"), Settings((48, 36)))
    assert (info["clips"], len(info["actions"])) == (len(names), 106)
    assert all(problem["kept"] and problem["stage"] in ("gaze", "frames") for problem in info["problems"])

    data = open_shards(str(tmp_path / "shards"))
    sessions: dict[str, Gaze] = {}
    for row in data.table.to_pylist():
        first, last = (int(part[1:]) for part in row["clip"].split("-")[-2:])
        assert row["frames"] == last - first
        path = shared / "egtea" / "gaze_data" / f"{row['session']}.txt"
        session = sessions.setdefault(row["session"], read_gaze(path))
        assert row["gaze_frames"] == np.count_nonzero(session.frames(first, row["frames"]).valid)
    assert len(sessions) == 5
    without = sum(row["gaze_frames"] == 0 for row in data.table.to_pylist())
    assert without == sum(problem["stage"] == "gaze" for problem in info["problems"])
    assert FeedPlan.of(data.root, tiny_config(), 1, 0).read(0)["gaze_valid"].any()

    found = start_search(write_space(tmp_path), data.root, str(tmp_path / "search"), {}, 0, None, None)
    assert found.trials[0].state == "finished"
    export_best(found.root, str(tmp_path / "best.yaml"))
    config = override_config(load_config(tmp_path / "best.yaml"), {"train.iterations": 4}, "t")
    train_final(config, data.root, str(tmp_path / "final"), None)
    assert read_metrics(str(tmp_path / "final"))[-1]["iteration"] == 4
    result = evaluate(str(tmp_path / "final"), data.root, 1)
    assert result["clips"] == len(data.test(1))
    assert result["chance"] == 1 / 106
