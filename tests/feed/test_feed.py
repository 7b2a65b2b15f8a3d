"""The feed through Ray Data."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import tiny_config
from tune_ego.errors import UserError, user_error_in
from tune_ego.feed import batches as batches_module
from tune_ego.feed.batches import ray_batches
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.ray_private import throttling_callback
from tune_ego.runs.placement import Nodes, decodes_on_gpu, gpus_per_worker


def plan(shards: str, *, encoded: bool = False, iterations: int = 7) -> FeedPlan:
    config = tiny_config(train__iterations=iterations, train__validate_every=3, train__accumulate=2)
    return FeedPlan.from_config(shards, config, 1, 0, encoded=encoded)


def test_ray_reads_the_same_batches_in_the_same_order(handmade_shards: str, ray_cluster: None) -> None:
    """The batches of a plan have their expected values in test_feed_plan."""
    whole = plan(handmade_shards)
    batches = list(ray_batches(whole, 3, readers=2, batch_bytes=1 << 20, throttle=throttling_callback))
    assert len(batches) == whole.item_count - 3
    for item, batch in enumerate(batches, start=3):
        expected = whole.read(item)
        assert batch.keys() == expected.keys()
        assert all(np.array_equal(batch[name], expected[name], equal_nan=name == "gaze") for name in expected)


def test_a_mistake_inside_a_ray_task_is_still_the_users(
    handmade_shards: str, ray_cluster: None, tmp_path: Path
) -> None:
    shutil.copytree(handmade_shards, tmp_path / "shards")
    for path in (tmp_path / "shards" / "frames").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Exception, match="parquet") as caught:
        list(ray_batches(plan(str(tmp_path / "shards")), 0, 1, 1 << 20, throttling_callback))
    mistake = user_error_in(caught.value)
    assert mistake is not None
    assert "run prepare again" in str(mistake)
    assert "Traceback" not in str(mistake)


@pytest.mark.parametrize("estimate", [0.3, 3.0])
def test_whatever_the_blocks_and_their_estimated_size_the_order_stays(
    handmade_shards: str, ray_cluster: None, monkeypatch: pytest.MonkeyPatch, estimate: float
) -> None:
    """Two tasks of several blocks of several batches each."""
    whole = plan(handmade_shards, iterations=70)
    size = sum(value.nbytes for value in whole.read(0).values())
    monkeypatch.setattr(batches_module, "MOST_TASKS", 2)
    monkeypatch.setattr(batches_module, "BLOCK_BYTES", int(3 * size * estimate))
    batches = list(ray_batches(whole, 1, readers=2, batch_bytes=int(size * estimate), throttle=throttling_callback))
    assert len(batches) == whole.item_count - 1
    for item, batch in enumerate(batches, start=1):
        for name, value in whole.read(item).items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_where_images_are_decoded_is_known_before_a_run_starts() -> None:
    for asked, gpus, expected in (("cpu", 1, False), ("auto", 1, True), ("auto", 0, False), ("gpu", 0.5, True)):
        config = tiny_config(data__decode=asked, compute__gpus_per_worker=float(gpus))
        assert decodes_on_gpu(config, gpus_per_worker(config, Nodes([], [], may_grow=False))) == expected
    with pytest.raises(UserError, match=r"data.decode: gpu needs a GPU"):
        gpus_per_worker(tiny_config(data__decode="gpu"), Nodes([{"CPU": 4}], [], may_grow=False))


def test_encoded_batches_travel_through_ray(handmade_shards: str, ray_cluster: None) -> None:
    encoded = plan(handmade_shards, encoded=True)
    batches = list(ray_batches(encoded, 0, readers=1, batch_bytes=1 << 16, throttle=throttling_callback))
    assert len(batches) == encoded.item_count
    for item, batch in enumerate(batches):
        expected = encoded.read(item)
        assert "rgb_jpeg" in expected
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)
