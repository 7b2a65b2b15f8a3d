"""Regions of images that are scaled to the crop: images, flow and gaze move together."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import handmade
from tests.conftest import tiny_config
from tune_ego.config import AugmentConfig
from tune_ego.dataset.shards import Clip, open_shards
from tune_ego.errors import UserError
from tune_ego.feed.augmentation import crop_gaze, place_region, scaled_flow
from tune_ego.feed.batches import to_device
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.feed.reader import WindowReader
from tune_ego.feed.sampling import Window, training_window
from tune_ego.training.losses import gaze_target

CLIPS = [Clip("clip", 0, 40, "", 0)]
SIZE = (320, 240)


def regions(augment: AugmentConfig, samples: int = 400) -> np.ndarray:
    """(width, height) of each sample's region; checks that it lies in the image."""
    found = []
    for sample in range(samples):
        window = training_window(CLIPS, 3, sample, SIZE, 200, "uniform", augment)
        assert window.region is not None
        width, height = window.region
        assert 0 <= window.left <= 320 - width and 0 <= window.top <= 240 - height
        found.append((width, height))
    return np.array(found)


def test_regions_have_the_range_of_sides_and_aspects() -> None:
    sides = regions(AugmentConfig(scale=(0.4, 0.9)))
    assert (sides[:, 0] == sides[:, 1]).all()
    assert sides.min() == pytest.approx(80, abs=2) and sides.max() == pytest.approx(180, abs=2)
    assert sides.mean() == pytest.approx(130, abs=4)
    wide = regions(AugmentConfig(scale=(0.5, 0.5), aspect=2.0))
    ratio = np.log2(wide[:, 0] / wide[:, 1])
    assert np.abs(ratio).max() == pytest.approx(1, abs=0.03) and ratio.mean() == pytest.approx(0, abs=0.08)
    assert np.sqrt(wide.prod(axis=1)) == pytest.approx(np.full(400, 100), abs=1)
    large = regions(AugmentConfig(scale=(1.5, 1.5)))
    assert set(map(tuple, large.tolist())) == {(300, 240)}  # at most the image


def test_without_scaling_a_sample_s_draws_are_those_of_before() -> None:
    plain = training_window(CLIPS, 3, 7, SIZE, 200)
    scaled = training_window(CLIPS, 3, 7, SIZE, 200, "uniform", AugmentConfig(scale=(0.5, 0.6)))
    assert plain.region is None and (scaled.clip, scaled.start) == (plain.clip, plain.start)
    assert training_window(CLIPS, 3, 7, SIZE, 200, "uniform", AugmentConfig(scale=(0.5, 0.6))) == scaled
    with pytest.raises(UserError, match=r"augment.*scale = \[0.9, 0.5\]: expected \[least, most\]"):
        tiny_config(augment__scale=[0.9, 0.5])


def moving_dot(x: float, y: float, step: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """An image of 320 x 240 with a bright disc at (x, y), the flow levels of a disc that moves by `step` pixels along x
    and half as much along y, and its gaze point in [0, 1]."""
    rows, columns = np.mgrid[:240, :320]
    inside = (columns - x) ** 2 + (rows - y) ** 2 < 12**2
    image = np.where(inside, 250, 20).astype(np.uint8)
    levels = np.rint(127.5 + np.where(inside, step, 0) * 255 / 40)
    half = np.rint(127.5 + np.where(inside, step / 2, 0) * 255 / 40)
    return (
        np.repeat(image[..., None], 3, axis=2),
        np.stack([levels, half]).astype(np.uint8),
        np.array([x / 320, y / 240]),
    )


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("region", [(90, 90), (120, 60), (200, 230), None])
def test_the_gaze_target_lies_on_the_object(region: tuple[int, int] | None, flip: bool) -> None:
    """A disc at pixel (150, 130), with gaze on it. The brightest cell of the scaled image has the highest target."""
    image, _, gaze = moving_dot(150, 130, 0)
    crop = 112
    window = Window(0, 0, 95, 60 if region is None else 100 - region[0] // 4, flip, region)
    if region == (200, 230):
        window = window._replace(top=5)
    width, height = region or (crop, crop)
    target = np.empty((crop, crop, 3), np.uint8)
    rows, columns = slice(window.top, window.top + height), slice(window.left, window.left + width)
    place_region(target, image[rows, columns], flip)
    points = crop_gaze(np.tile(gaze, (16, 1)), SIZE, window, crop)
    cells = 28  # of 4 x 4 pixels; a cell's target is that of its upper left corner
    map_BTHW, has_gaze = gaze_target(
        torch.tensor(points, dtype=torch.float32)[None], torch.ones(1, 16, dtype=torch.bool), (2, cells, cells), 0.1
    )
    assert has_gaze.all()
    row, column = divmod(int(map_BTHW[0, 0].argmax()), cells)
    brightness = target[..., 0].astype(float)
    assert brightness.max() > 200
    inside = np.argwhere(brightness > 135)
    middle_row, middle_column = inside.mean(axis=0) / 4
    assert row == pytest.approx(middle_row, abs=1.5) and column == pytest.approx(middle_column, abs=1.5)


@pytest.mark.parametrize("encoded", [False, True])
def test_flow_is_scaled_as_the_image(handmade_shards: str, encoded: bool) -> None:
    """A region of 16 x 32 pixels becomes 32 x 32: x motion doubles, y motion stays. A block of 8 x 8 has one motion."""
    shards = open_shards(handmade_shards)
    clips = [shards.clip(row) for row in shards.table.to_pylist()]
    reader = WindowReader(clips, ("flow",), (48, 40), 32)
    windows: list[Window | None] = [Window(4, 8, 8, 16, False, (16, 32)), Window(4, 8, 8, 16, True, (16, 32))]
    batch = reader.read_encoded(windows) if encoded else reader.read_batch(windows)
    flow = to_device(batch, torch.device("cpu")).flow_BT2HW
    assert flow is not None
    for t in (0, 15):
        x, y = handmade.flow_image(4, 8 + t)[:, 8:40, 16:32].astype(float)
        for row in (4, 12, 20, 28):
            for column in (4, 12):
                expected_x = min(max(127.5 + 2 * (x[row, column] - 127.5), 0), 255)
                assert flow[0, t, 0, row, 2 * column].item() == pytest.approx(expected_x, abs=1)
                assert flow[0, t, 1, row, 2 * column].item() == pytest.approx(y[row, column], abs=1)
                assert flow[1, t, 0, row, 31 - 2 * column].item() == pytest.approx(255 - expected_x, abs=1)
    assert scaled_flow(np.array([0.0, 127.5, 255.0]), 3.0).tolist() == [0, 127.5, 255]


@pytest.mark.parametrize("flip", [False, True])
def test_reader_and_device_scale_a_region_alike(handmade_shards: str, flip: bool) -> None:
    """The reader's images, flow and gaze against those that the device scales; and a region of the crop's own size."""
    shards = open_shards(handmade_shards)
    clips = [shards.clip(row) for row in shards.table.to_pylist()]
    reader = WindowReader(clips, ("rgb", "flow"), (48, 40), 32)
    windows: list[Window | None] = [Window(4, 8, 3, 5, flip, (24, 30)), Window(2, 19, 0, 1, flip, (32, 32))]
    read = reader.read_batch(windows)
    decoded = to_device(reader.read_encoded(windows), torch.device("cpu"))
    assert decoded.rgb_BTHWC is not None and decoded.flow_BT2HW is not None
    rgb, flow = read["rgb"].astype(int), read["flow"].astype(int)
    assert np.abs(decoded.rgb_BTHWC.numpy() - rgb)[0].mean() < 1.5
    assert np.abs(decoded.flow_BT2HW.numpy() - flow)[0].mean() < 1.5
    plain = reader.read_batch([Window(2, 19, 0, 1, flip)])
    assert np.abs(rgb[1] - plain["rgb"][0]).max() <= 1
    assert np.abs(flow[1] - plain["flow"][0]).max() <= 1
    np.testing.assert_allclose(read["gaze"][1], plain["gaze"][0], atol=1e-6)
    np.testing.assert_allclose(read["gaze"], decoded.gaze_BT2.numpy())


def test_a_plan_s_training_windows_are_scaled_and_its_validation_windows_are_not(handmade_shards: Path) -> None:
    config = tiny_config(augment__scale=[0.5, 0.8], train__batch_size=2, train__iterations=2, data__crop=32)
    plan = FeedPlan.from_config(str(handmade_shards), config, 1, 0)
    for item in range(plan.item_count):
        training, windows = plan.windows(item)
        assert all((window.region is not None) == training for window in windows if window is not None)
        assert plan.read(item)["rgb"].shape == (2, 16, 32, 32, 3)
