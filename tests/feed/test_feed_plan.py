"""The windows that each worker reads, item by item, on the made-up data set of `tests.handmade`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import cv2
import numpy as np
import pyarrow as pa
import pytest

from tests import handmade
from tests.conftest import tiny_config
from tune_ego.feed import feed_plan as plan_module
from tune_ego.feed.feed_plan import FeedPlan, read_items, read_packed
from tune_ego.feed.packing import Batch, unpack
from tune_ego.feed.sampling import Window

TRAINING, VALIDATION = [2, 3, 5, 8, 9], [0, 1, 4]
"""Indices in `handmade.CLIPS` of the clips of stratified fold 0 of split 1."""
SAMPLES = [  # (clip of TRAINING, start, top, left, flip) of seed 0; the rule is restated in test_windows
    (1, 0, 4, 16, True),
    (0, 8, 5, 2, True),
    (2, 12, 0, 1, True),
    (3, 0, 4, 11, True),
    (4, 0, 5, 14, True),
    (1, 0, 8, 3, True),
    (2, 8, 1, 14, False),
    (0, 10, 3, 8, False),
    (3, 0, 4, 3, False),
    (4, 12, 4, 2, False),
    (1, 0, 8, 1, True),
    (4, 15, 5, 12, True),
    (0, 8, 5, 13, True),
    (2, 11, 0, 14, False),
    (3, 0, 2, 9, False),
    (3, 0, 7, 12, True),
    (1, 0, 8, 5, False),
    (2, 13, 0, 11, False),
    (4, 0, 3, 0, True),
    (0, 10, 6, 13, False),
]
CENTRES = {  # windows a clip -> (clip of VALIDATION, start, top, left, flip); the clips have 17, 5 and 24 frames
    1: [(0, 0, 4, 8, False), (1, 0, 4, 8, False), (2, 4, 4, 8, False)],
    2: [(0, 0, 4, 8, False), (0, 1, 4, 8, False), (1, 0, 4, 8, False), (2, 2, 4, 8, False), (2, 6, 4, 8, False)],
}

ALONE = {"train__batch_size": 4, "train__accumulate": 2, "train__iterations": 5, "train__validate_every": 2}
PAIR = {**ALONE, "compute__workers": 2, "train__validation_windows": 2}
LARGE = {"train__batch_size": 8, "train__accumulate": 2, "train__iterations": 2, "train__validate_every": 1}
ELASTIC = {"train__batch_size": 4, "train__iterations": 2, "train__validate_every": 2}
PLANS = [  # settings, workers, rank, items: t and the numbers of SAMPLES, or v and those of CENTRES; - is padding
    (ALONE, 1, 0, "t0,1 t2,3 t4,5 t6,7 v0,1 v2,- t8,9 t10,11 t12,13 t14,15 v0,1 v2,- t16,17 t18,19 v0,1 v2,-"),
    (PAIR, 2, 0, "t0 t2 t4 t6 v0 v2 v4 t8 t10 t12 t14 v0 v2 v4 t16 t18 v0 v2 v4"),
    (PAIR, 2, 1, "t1 t3 t5 t7 v1 v3 v- t9 t11 t13 t15 v1 v3 v- t17 t19 v1 v3 v-"),
    ({**LARGE, "compute__workers": 2}, 2, 0, "t0,1 t4,5 v0,1 t8,9 t12,13 v0,1"),
    ({**LARGE, "compute__workers": 2}, 2, 1, "t2,3 t6,7 v2,- t10,11 t14,15 v2,-"),
    # Fewer workers than the most that may be: their passes stay those of four.
    ({**ELASTIC, "compute__workers": [1, 4]}, 3, 0, "t0 t3 t4 t7 v0"),
    ({**ELASTIC, "compute__workers": [1, 4]}, 3, 1, "t1 t5 v1"),
    ({**ELASTIC, "compute__workers": [1, 4]}, 3, 2, "t2 t6 v2"),
    ({**ELASTIC, "compute__workers": 4}, 4, 3, "t3 t7 v-"),
    # The last iteration validates once, also where it is a multiple of validate_every, or before the first one.
    ({**ELASTIC, "train__iterations": 1}, 1, 0, "t0,1,2,3 v0,1,2,-"),
    ({**ELASTIC, "train__validate_every": 100}, 1, 0, "t0,1,2,3 t4,5,6,7 v0,1,2,-"),
]


def make(
    root: str, settings: Mapping[str, object], workers: int = 1, rank: int = 0, *, encoded: bool = False
) -> FeedPlan:
    return FeedPlan.from_config(root, tiny_config(**settings), workers, rank, encoded=encoded)


@pytest.mark.parametrize(("settings", "workers", "rank", "items"), PLANS)
def test_every_item_of_a_worker(
    handmade_shards: str, settings: Mapping[str, object], workers: int, rank: int, items: str
) -> None:
    plan = make(handmade_shards, settings, workers, rank)
    centres = CENTRES[plan.validation_windows]
    expected = [
        (
            kind == "t",
            [None if n == "-" else Window(*(SAMPLES if kind == "t" else centres)[int(n)]) for n in numbers.split(",")],
        )
        for kind, numbers in ((item[0], item[1:]) for item in items.split())
    ]
    assert plan.item_count == len(expected)
    assert [plan.windows(item) for item in range(plan.item_count)] == expected


@pytest.mark.parametrize(
    ("settings", "workers", "rank", "first_items"),
    [
        (ALONE, 1, 0, {0: 0, 2: 6, 4: 12}),
        (PAIR, 2, 1, {0: 0, 2: 7, 4: 14}),
        ({**LARGE, "compute__workers": 2}, 2, 0, {0: 0, 1: 3, 2: 6}),
        ({**ELASTIC, "compute__workers": [1, 4]}, 3, 0, {0: 0, 2: 5}),
        ({**ELASTIC, "compute__workers": [1, 4]}, 3, 1, {0: 0, 2: 3}),
        (ALONE, 1, 0, {1: 2, 3: 8}),  # between two validations
    ],
)
def test_a_resumed_run_begins_behind_the_validation(
    handmade_shards: str, settings: Mapping[str, object], workers: int, rank: int, first_items: dict[int, int]
) -> None:
    plan = make(handmade_shards, settings, workers, rank)
    assert {iterations: plan.first_item(iterations) for iterations in first_items} == first_items


@pytest.mark.parametrize(
    ("iterations", "validate_every", "validations"),
    [(5, 2, [2, 4, 5]), (6, 2, [2, 4, 6]), (2, 3, [2]), (3, 1, [1, 2, 3]), (7, 3, [3, 6, 7])],
)
def test_validations_follow_every_so_many_iterations_and_the_last(
    iterations: int, validate_every: int, validations: list[int]
) -> None:
    plan = make("nowhere", {"train__iterations": iterations, "train__validate_every": validate_every})
    assert plan.validation_iterations == validations
    assert [n for n in range(1, iterations + 1) if plan.validates_after(n)] == validations


@pytest.mark.parametrize(
    ("passes", "workers", "own"),
    [(4, 1, [[0, 1, 2, 3]]), (4, 2, [[0, 2], [1, 3]]), (4, 3, [[0, 3], [1], [2]]), (2, 2, [[0], [1]])],
)
def test_workers_take_passes_in_turn(passes: int, workers: int, own: list[list[int]]) -> None:
    settings = {"train__batch_size": 4, "compute__workers": [1, passes]}
    assert [list(make("nowhere", settings, workers, rank).own_passes) for rank in range(workers)] == own


@pytest.mark.parametrize(
    ("windows", "batch", "workers", "items"),
    [(1, 4, 1, 1), (1, 3, 1, 1), (1, 2, 1, 2), (1, 1, 1, 3), (1, 2, 2, 2), (2, 2, 2, 3), (2, 4, 2, 2), (2, 12, 2, 1)],
)
def test_items_of_a_validation_are_as_many_for_every_worker(
    handmade_shards: str, windows: int, batch: int, workers: int, items: int
) -> None:
    """Three windows with one a clip, five with two; `batch` is shared by the workers."""
    settings = {"train__batch_size": batch, "train__validation_windows": windows, "compute__workers": workers}
    assert {make(handmade_shards, settings, workers, rank).validation_items for rank in range(workers)} == {items}


def test_a_plan_has_the_settings_of_its_configuration() -> None:
    config = tiny_config(
        **{**PAIR, "train__validation_windows": 3, "train__iterations": 9, "train__batch_size": 12},
        streams="flow",
        seed=5,
        data__split=2,
        data__fold=3,
        augment__scale=[0.5, 1.0],
    )
    plan = FeedPlan.from_config("root", config, 2, 1, encoded=True)
    assert plan == FeedPlan(
        root="root",
        data=config.data,
        augment=config.augment,
        streams=("flow",),
        seed=5,
        iterations=9,
        micro_batch=3,
        passes=4,
        validate_every=2,
        validation_windows=3,
        workers=2,
        rank=1,
        encoded=True,
    )
    assert not FeedPlan.from_config("root", config, 2, 1).encoded


def first_pixels(clip: int, window: Window) -> list[int]:
    """Flow, x, of the first row of a window's first frame."""
    row = handmade.flow_image(clip, window.start)[0, window.top, window.left : window.left + 32].tolist()
    return [255 - value for value in row[::-1]] if window.flip else row


def assert_reads(batch: Batch, windows: list[tuple[int, int, int, int, bool] | None], clips: list[int]) -> None:
    for place, values in enumerate(windows):
        assert batch["present"][place] == (values is not None)
        if values is not None:
            window = Window(*values)
            assert batch["clip"][place] == window.clip
            assert batch["label"][place] == handmade.CLIPS[clips[window.clip]].action
            assert batch["flow"][place, 0, 0, 0].tolist() == first_pixels(clips[window.clip], window)


def test_batches_hold_the_windows_of_their_item(handmade_shards: str) -> None:
    plan = make(handmade_shards, ALONE)
    assert_reads(plan.read(0), [SAMPLES[0], SAMPLES[1]], TRAINING)
    assert_reads(plan.read(9), [SAMPLES[14], SAMPLES[15]], TRAINING)
    assert_reads(plan.read(4), [CENTRES[1][0], CENTRES[1][1]], VALIDATION)
    assert_reads(plan.read(5), [CENTRES[1][2], None], VALIDATION)
    assert plan.read(5)["rgb"].shape == (2, 16, 32, 32, 3) and not plan.read(5)["flow"][1].any()
    assert plan.validation_labels == [0, 1, 1]


def test_clips_and_crop_are_those_of_the_configuration(handmade_shards: str) -> None:
    """Split 2, session fold 1: clips 4 and 6 validate; a crop of 36 lies at 2, 6."""
    settings = {**ALONE, "data__split": 2, "data__fold": 1, "data__validation": "by_session", "data__crop": 36}
    plan = make(handmade_shards, {**settings, "streams": "flow"})
    assert plan.windows(4) == (False, [Window(0, 4, 2, 6, False), Window(1, 0, 2, 6, False)])
    assert plan.validation_labels == [1, 3]
    batch = plan.read(4)
    assert "rgb" not in batch and batch["flow"].shape == (2, 16, 2, 36, 36)
    assert batch["label"].tolist() == [1, 3]


def test_a_worker_without_clips_reads_one_and_counts_it_out(handmade_shards: str) -> None:
    """Its batch has images, which keep BatchNorm and gaze finite, and no row that counts."""
    plan = make(handmade_shards, {**PAIR, "train__batch_size": 8}, 2, 1)
    assert plan.windows(5) == (False, [None, None])
    for encoded in (False, True):
        batch = make(handmade_shards, {**PAIR, "train__batch_size": 8}, 2, 1, encoded=encoded).read(5)
        assert batch["present"].tolist() == [False, False] and batch["present"].dtype == bool
        assert batch["clip"].tolist() == [0, 0] and batch["gaze_valid"][:, 0].all()
    assert plan.read(5)["flow"][1, 0, 0, 0].tolist() == first_pixels(0, Window(*CENTRES[2][0]))


def test_encoded_plans_read_images_as_they_are(handmade_shards: str) -> None:
    batch = make(handmade_shards, ALONE, encoded=True).read(0)
    assert "rgb" not in batch and {"rgb_jpeg", "flow_jpeg"} < batch.keys()
    assert batch["place"].tolist() == [[4, 16, 32, 32, 32, 1], [5, 2, 32, 32, 32, 1]]
    assert batch["label"].tolist() == [0, 2]


def test_shards_of_an_object_store_are_copied_where_the_configuration_says(
    handmade_shards: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    plan = make(f"file://{handmade_shards}", {**ALONE, "data__cache_dir": str(cache), "data__cache_gb": 1.0})
    plan.read(4)
    assert len(list(cache.iterdir())) == 1  # both validation clips are in one shard
    plan.read(0)
    assert len(list(cache.iterdir())) == 2  # and so are the two training clips of this item


def test_a_reader_packs_its_items_in_order(handmade_shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(plan_module, "keep_freed_memory", lambda: calls.append("keep"))
    plan = make(handmade_shards, ALONE)
    blocks = list(read_packed(pa.table({"item": [3, 4, 5, 6, 7]}), plan, items_per_block=2))
    assert calls == ["keep"]
    assert [block.num_rows for block in blocks] == [2, 2, 1]
    batches = [batch for block in blocks for batch in unpack(block)]
    assert [batch["clip"].tolist() for batch in batches] == [[2, 0], [0, 1], [2, 0], [3, 4], [1, 4]]
    assert_reads(batches[0], [SAMPLES[6], SAMPLES[7]], TRAINING)
    assert_reads(batches[2], [CENTRES[1][2], None], VALIDATION)


def test_items_are_read_one_after_another_in_this_process(
    handmade_shards: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []
    monkeypatch.setattr(cv2, "setNumThreads", threads.append)
    plan = make(handmade_shards, ALONE)
    batches = list(read_items(plan, np.arange(4, 7)))
    assert [batch["clip"].tolist() for batch in batches] == [[0, 1], [2, 0], [3, 4]]
    assert [batch["present"].tolist() for batch in batches] == [[True, True], [True, False], [True, True]]
    assert threads == [1]
