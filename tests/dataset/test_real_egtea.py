"""The whole path on real annotations and gaze: 106 classes, both gaze layouts, real clip lengths.

All clips of the five sessions whose gaze is there, from small stand-in videos: labels, splits, lengths and the gaze of
every frame are compared with the files.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.assemble_egtea import assemble
from tests.conftest import tiny_config
from tests.dataset.test_gaze import literal
from tests.search.test_search import write_space
from tune_ego.config_io import load_config, override_config
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import Shards, open_shards
from tune_ego.evaluation.evaluate import evaluate
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.results.experiment import read_metrics
from tune_ego.runs.final import train_final
from tune_ego.search.export import export_best
from tune_ego.search.tune import start_search


def check_every_clip(data: Shards, egtea: Path) -> list[str]:
    """Frame count, labels, splits and every frame's gaze against the files themselves; the clips without gaze.

    Nothing of the package reads the files here.
    """
    labels: dict[str, list[str]] = {}
    roles: dict[str, dict[int, str]] = {}
    for split, role in product((1, 2, 3), ("train", "test")):
        for line in (egtea / "action_annotation" / f"{role}_split{split}.txt").read_text().splitlines():
            clip, *labels[clip] = line.split()
            roles.setdefault(clip, {})[split] = role
    gaze = {path.stem: literal(path) for path in (egtea / "gaze_data").rglob("*.txt")}
    rows = data.table.to_pylist()
    assert sorted(row["clip"] for row in rows) == sorted(clip for clip in labels if clip.rsplit("-", 4)[0] in gaze)
    for row in rows:
        first, last = (int(part[1:]) for part in row["clip"].split("-")[-2:])
        action, verb, *nouns = (int(number) - 1 for number in labels[row["clip"]])
        assert (row["action"], row["verb"], row["nouns"]) == (action, verb, nouns)
        assert [row[f"split{split}"] for split in (1, 2, 3)] == [roles[row["clip"]][split] for split in (1, 2, 3)]
        frames = pq.read_table(
            f"{data.root}/{row['shard']}",
            columns=["frame", "gaze_x", "gaze_y", "gaze_valid"],
            filters=[("clip", "=", row["clip"])],
            partitioning=None,
        ).to_pylist()
        assert [frame["frame"] for frame in frames] == list(range(row["frames"])) == list(range(last - first))
        points = [gaze[row["session"]].get(first + place) for place in range(row["frames"])]
        assert [frame["gaze_valid"] for frame in frames] == [point is not None for point in points]
        stored = [(frame["gaze_x"], frame["gaze_y"]) for frame in frames]
        assert all(found == (None, None) for found, point in zip(stored, points) if point is None)
        pairs = [(found, point) for found, point in zip(stored, points) if point is not None]
        if pairs:
            found, expected = (np.array(side) for side in zip(*pairs))
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
        assert row["gaze_frames"] == len(pairs)
    return [row["clip"] for row in rows if not row["gaze_frames"]]


@pytest.mark.slow
def test_real_annotations_from_clips_to_test_result(shared: Path, tmp_path: Path, ray_cluster: None) -> None:
    names = assemble(shared, tmp_path / "egtea")
    info = prepare(str(tmp_path / "egtea"), str(tmp_path / "shards"), Settings((48, 36)))
    assert (info["clips"], len(info["actions"])) == (len(names), 106)
    assert len(names) > 400
    data = open_shards(str(tmp_path / "shards"))
    without = check_every_clip(data, shared / "egtea")
    assert info["clips_without_gaze"] == len(without)
    assert {(problem["clip"], problem["stage"]) for problem in info["problems"]} == {(clip, "gaze") for clip in without}
    assert FeedPlan.from_config(data.root, tiny_config(), 1, 0).read(0)["gaze_valid"].any()

    found = start_search(write_space(tmp_path), data.root, str(tmp_path / "search"), {}, 0, None, None)
    assert found.trials[0].state == "finished"
    export_best(found.root, str(tmp_path / "best.yaml"))
    config = override_config(load_config(tmp_path / "best.yaml"), {"train.iterations": 4}, "t")
    train_final(config, data.root, str(tmp_path / "final"), None)
    assert read_metrics(str(tmp_path / "final"))[-1]["iteration"] == 4
    result = evaluate(str(tmp_path / "final"), data.root, 1)
    assert result["clips"] == len(data.test(1))
    assert result["chance"] == 1 / 106
