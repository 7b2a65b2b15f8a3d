"""Windows of clips, and reading them, on the made-up data set of `tests.handmade`."""

from __future__ import annotations

import random
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import handmade
from tests.conftest import tiny_config
from tune_ego.dataset.shards import Clip, open_shards
from tune_ego.errors import UserError
from tune_ego.feed import reader as reader_module
from tune_ego.feed.cache import ShardCache
from tune_ego.feed.reader import WindowReader, check_fits, close_shards
from tune_ego.feed.sampling import Window, centre_window, dense_starts, spread_starts, training_window

SIZE, CROP = (48, 40), 32
FRAMES = [35, 16, 33, 9, 31]
CLIPS = [Clip(f"clip {number}", 0, frames, "", 0) for number, frames in enumerate(FRAMES)]
TWO_EPOCHS = {  # seed -> (clip, start, top, left, flip) of the samples 0 to 9, five an epoch
    0: [
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
    ],
    7: [
        (3, 0, 6, 10, True),
        (2, 12, 4, 16, True),
        (0, 11, 4, 5, False),
        (4, 7, 2, 12, False),
        (1, 0, 3, 16, True),
        (2, 1, 6, 6, True),
        (3, 0, 0, 1, True),
        (4, 0, 0, 5, False),
        (0, 5, 0, 7, False),
        (1, 0, 4, 2, True),
    ],
}


def literal_training_window(seed: int, sample: int) -> Window:
    """The rule: a permutation seeded by (seed, epoch), and a draw seeded by (seed, sample)."""
    epoch, place = divmod(sample, 5)
    order = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0, epoch))).permutation(5)
    clip = int(order[place])
    draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1, sample)))
    start = draw.integers(0, max(FRAMES[clip] - 16, 0) + 1)
    top, left = draw.integers(0, 40 - 32 + 1), draw.integers(0, 48 - 32 + 1)
    return Window(clip, int(start), int(top), int(left), draw.integers(0, 2) == 1)


@pytest.mark.parametrize("seed", [0, 7])
def test_samples_of_two_epochs(seed: int) -> None:
    """NumPy's draws have changed where the second assertion alone fails."""
    backwards = [training_window(CLIPS, seed, sample, SIZE, CROP) for sample in reversed(range(10))]
    assert backwards[::-1] == [literal_training_window(seed, sample) for sample in range(10)]
    assert backwards[::-1] == [Window(*values) for values in TWO_EPOCHS[seed]]
    assert all(type(value) in (int, bool) for window in backwards for value in window[:5])


@pytest.mark.parametrize(
    ("size", "crop", "top", "left"),
    [((48, 40), 32, 4, 8), ((320, 240), 224, 8, 48), ((340, 256), 225, 15, 57), ((32, 32), 32, 0, 0)],
)
def test_the_centre_window_lies_in_the_middle(size: tuple[int, int], crop: int, top: int, left: int) -> None:
    assert centre_window(7, 3, size, crop) == Window(7, 3, top, left, False)


@pytest.mark.parametrize(
    ("frames", "starts"),
    [
        (1, [0]),
        (10, [0]),
        (16, [0]),
        (17, [0, 1]),
        (23, [0, 7]),
        (24, [0, 8]),
        (25, [0, 8, 9]),
        (32, [0, 8, 16]),
        (35, [0, 8, 16, 19]),
    ],
)
def test_evaluation_windows_lie_every_eighth_frame_and_at_the_end(frames: int, starts: list[int]) -> None:
    assert dense_starts(frames) == starts


@pytest.mark.parametrize(
    ("frames", "count", "starts"),
    [  # places 0 to frames - 16, cut into `count` equal parts: the middle of each, halves to the even number
        (10, 1, [0]),
        (10, 3, [0]),
        (16, 2, [0]),
        (17, 2, [0, 1]),  # 1/4, 3/4
        (17, 3, [0, 1]),  # 1/6, 1/2, 5/6
        (36, 1, [10]),
        (36, 2, [5, 15]),
        (36, 3, [3, 10, 17]),  # 20/6, 60/6, 100/6
        (56, 4, [5, 15, 25, 35]),
        (18, 1, [1]),
        (19, 1, [2]),  # 1.5
    ],
)
def test_validation_windows_are_evenly_spaced(frames: int, count: int, starts: list[int]) -> None:
    assert spread_starts(frames, count) == starts


@pytest.fixture
def clips(handmade_shards: str) -> list[Clip]:
    """All clips of the made-up data set, in its order."""
    shards = open_shards(handmade_shards)
    return [shards.clip(row) for row in shards.table.to_pylist()]


def read(
    clips: list[Clip], *windows: Window | None, streams: tuple[str, ...] = ("rgb", "flow")
) -> dict[str, np.ndarray]:
    return WindowReader(clips, streams, SIZE, CROP).read_batch(list(windows))


def expected_rgb(clip: int, frame: int, window: Window) -> np.ndarray:
    image = handmade.rgb_image(clip, frame)[window.top : window.top + 32, window.left : window.left + 32]
    return image[:, ::-1] if window.flip else image


def expected_flow(clip: int, frame: int, window: Window) -> np.ndarray:
    x, y = handmade.flow_image(clip, frame)[:, window.top : window.top + 32, window.left : window.left + 32]
    return np.stack([255 - x[:, ::-1], y[:, ::-1]] if window.flip else [x, y])


def assert_rgb(images: np.ndarray, expected: list[np.ndarray]) -> None:
    assert images.dtype == np.uint8 and images.shape == (len(expected), 32, 32, 3)
    difference = np.abs(images.astype(int) - np.stack(expected))
    assert difference.max() <= handmade.RGB_TOLERANCE


WINDOWS = [  # each with the frames it shows
    (Window(2, 19, 3, 5, False), range(19, 35)),  # ends with its clip
    (Window(2, 19, 3, 5, True), range(19, 35)),
    (Window(2, 16, 8, 0, True), range(16, 32)),  # one row group, not the first
    (Window(0, 1, 0, 16, False), range(1, 17)),
    (Window(9, 15, 8, 16, True), range(15, 31)),  # behind another clip in its shard
    (Window(3, 0, 1, 2, False), range(16)),
    (Window(1, 0, 2, 7, True), [0, 1, 2, 3, *[4] * 12]),  # of 5 frames: the last is repeated
    (Window(8, 0, 4, 8, False), [0, 1, 2, 3, 4, 5, 6, 7, *[8] * 8]),
    (Window(6, 3, 4, 8, False), [3, 4, 5, 6, 7, 8, *[9] * 10]),
]


@pytest.mark.parametrize(("window", "frames"), WINDOWS)
def test_images_are_those_of_the_window(clips: list[Clip], window: Window, frames: list[int]) -> None:
    batch = read(clips, window)
    assert_rgb(batch["rgb"][0], [expected_rgb(window.clip, frame, window) for frame in frames])
    expected = np.stack([expected_flow(window.clip, frame, window) for frame in frames])
    np.testing.assert_array_equal(batch["flow"][0], expected, strict=True)


@pytest.mark.parametrize(("window", "frames"), WINDOWS)
def test_gaze_is_that_of_the_window_in_its_crop(clips: list[Clip], window: Window, frames: list[int]) -> None:
    batch = read(clips, window, streams=("flow",))
    assert batch["gaze"].dtype == np.float32 and batch["gaze_valid"].dtype == bool
    points = [handmade.gaze_pixel(window.clip, frame) for frame in frames]
    assert batch["gaze_valid"][0].tolist() == [point is not None for point in points]
    for gaze, point in zip(batch["gaze"][0].tolist(), points):
        if point is None:
            assert np.isnan(gaze).all()
            continue
        x, y = (point[0] - window.left) / 32, (point[1] - window.top) / 32
        assert gaze == pytest.approx([1 - x if window.flip else x, y], abs=1e-5)


def test_gaze_of_one_frame_by_hand(clips: list[Clip]) -> None:
    """Clip 2, frame 20: pixel (26, 15) of 48 x 40; the crop begins at x 5, y 3 and is 32 wide."""
    plain, mirrored = read(clips, Window(2, 19, 3, 5, False), Window(2, 19, 3, 5, True), streams=("rgb",))["gaze"]
    assert plain[1].tolist() == pytest.approx([0.65625, 0.375], abs=1e-6)
    assert mirrored[1].tolist() == pytest.approx([0.34375, 0.375], abs=1e-6)


def test_a_batch_names_its_clips_and_leaves_padding_empty(clips: list[Clip]) -> None:
    windows = [Window(5, 2, 0, 0, False), None, Window(6, 0, 8, 16, True), Window(8, 0, 1, 1, False), None]
    batch = read(clips, *windows)
    assert list(batch) == ["rgb", "flow", "gaze", "gaze_valid", "clip", "label", "present"]
    assert batch["clip"].tolist() == [5, 0, 6, 8, 0] and batch["clip"].dtype == np.int64
    assert batch["label"].tolist() == [2, 0, 3, 3, 0] and batch["label"].dtype == np.int64
    assert batch["present"].tolist() == [True, False, True, True, False]
    assert batch["rgb"].shape == (5, 16, 32, 32, 3) and batch["flow"].shape == (5, 16, 2, 32, 32)
    assert batch["gaze"].shape == (5, 16, 2) and batch["gaze_valid"].shape == (5, 16)
    for name in ("rgb", "flow", "gaze", "gaze_valid"):
        assert not batch[name][1].any() and not batch[name][4].any(), name
    for place, window in enumerate(windows):
        if window is not None:
            np.testing.assert_array_equal(batch["flow"][place, 0], expected_flow(window.clip, window.start, window))


def test_padding_is_empty_even_where_memory_is_not(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, 77, dtype))
    batch = read(clips, None, None)
    assert not any(value.any() for value in batch.values())


@pytest.mark.parametrize("streams", [("rgb",), ("flow",)])
def test_only_the_streams_of_the_run_are_read(clips: list[Clip], streams: tuple[str, ...]) -> None:
    window = Window(4, 3, 2, 9, True)
    batch = read(clips, window, streams=streams)
    assert [name for name in batch if name in ("rgb", "flow")] == list(streams)
    both = read(clips, window)
    np.testing.assert_array_equal(batch[streams[0]], both[streams[0]])


def test_encoded_batches_hold_the_images_of_the_shards(clips: list[Clip]) -> None:
    """The images of each frame, one after another, decoded here: whole, and not mirrored."""
    import simplejpeg

    windows = [Window(2, 19, 3, 5, True), None, Window(6, 3, 8, 16, False)]
    frames = [(2, frame) for frame in range(19, 35)] + [(6, frame) for frame in [3, 4, 5, 6, 7, 8, *[9] * 10]]
    batch = WindowReader(clips, ("rgb", "flow"), SIZE, CROP).read_encoded(windows)
    plain = read(clips, *windows)
    assert set(batch) == {*plain, "rgb_jpeg", "rgb_bytes", "flow_jpeg", "flow_bytes", "place"} - {"rgb", "flow"}
    for name in ("gaze", "gaze_valid", "clip", "label", "present"):
        np.testing.assert_array_equal(batch[name], plain[name], strict=True)
    assert batch["place"].tolist() == [[3, 5, 32, 32, 32, 1], [0, 0, 32, 32, 32, 0], [8, 16, 32, 32, 32, 0]]
    assert batch["place"].dtype == np.int64
    for name, colours in (("rgb", "RGB"), ("flow", "GRAY")):
        sizes = batch[f"{name}_bytes"]
        assert sizes.shape == (3, 16) and sizes.dtype == np.int64 and batch[f"{name}_jpeg"].dtype == np.uint8
        assert not sizes[1].any()
        files = np.split(batch[f"{name}_jpeg"], np.cumsum(sizes[[0, 2]].ravel())[:-1])
        for file, (clip, frame) in zip(files, frames, strict=True):
            image = simplejpeg.decode_jpeg(file.tobytes(), colours)
            if name == "flow":
                np.testing.assert_array_equal(image.reshape(2, 40, 48), handmade.flow_image(clip, frame))
            else:
                difference = np.abs(image.astype(int) - handmade.rgb_image(clip, frame))
                assert difference.max() <= handmade.RGB_TOLERANCE


def test_encoded_padding_alone_has_no_bytes(clips: list[Clip]) -> None:
    batch = WindowReader(clips, ("flow",), SIZE, CROP).read_encoded([None, None])
    assert batch["flow_jpeg"].shape == (0,) and batch["flow_bytes"].tolist() == [[0] * 16] * 2
    assert batch["present"].tolist() == [False, False]


@pytest.mark.parametrize("stream", ["rgb", "flow"])
@pytest.mark.parametrize("encoded", [False, True])
def test_an_image_of_another_size_is_named(clips: list[Clip], stream: str, encoded: bool) -> None:
    height = 40 if stream == "rgb" else 80
    for size in ((48, 42), (52, 40), (40, 48)):
        reader = WindowReader(clips, (stream,), size, CROP)
        message = f"{clips[4].shard}: {clips[4].name} holds a damaged {stream} image (of 48 x {height} pixels); delete"
        with pytest.raises(UserError, match=re.escape(message)):
            (reader.read_encoded if encoded else reader.read_batch)([Window(4, 0, 0, 0, False)])


@pytest.mark.parametrize("damage", ["one bit of an image", "cut off", "not there"])
def test_a_damaged_shard_is_named(clips: list[Clip], tmp_path: Path, damage: str) -> None:
    raw = bytearray(Path(clips[4].shard).read_bytes())
    if damage == "cut off":
        del raw[-100:]
    else:
        image = raw.index(b"\xff\xd8\xff")
        raw[image + 500] ^= 4  # any JPEG decoder makes something of it
    damaged = tmp_path / "part.parquet"
    if damage != "not there":
        damaged.write_bytes(raw)
    with pytest.raises(UserError) as caught:
        read([replace(clips[4], shard=str(damaged))], Window(0, 0, 0, 0, False))
    assert str(caught.value).startswith(f"{damaged}: {clips[4].name} cannot be read (")
    assert str(caught.value).endswith("; delete this file and run prepare again")


def test_damage_in_a_shard_of_an_object_store_may_be_its_copy_s(clips: list[Clip], tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path / "cache"), 10**9)
    for shard, named in ((f"file://{tmp_path}/gone.parquet", True), (f"{tmp_path}/gone.parquet", False)):
        reader = WindowReader([replace(clips[4], shard=shard)], ("rgb",), SIZE, CROP, cache)
        with pytest.raises(UserError) as caught:
            reader.read_batch([Window(0, 0, 0, 0, False)])
        remedy = f" (the damage may be in its copy in {tmp_path}/cache: empty that folder first)"
        assert str(caught.value).endswith(remedy) == named


@pytest.mark.parametrize(
    ("row_group", "frames", "start", "problem"),
    [  # of the first clip, whose shard has row groups 0 and 1 for it, and 2 for the second clip
        (2, 17, 0, f"row group 2 holds frames of {handmade.CLIPS[1].name} from 0 on"),
        (1, 17, 0, f"row group 1 holds frames of {handmade.CLIPS[0].name} from 16 on"),
        (1, 17, 1, f"row group 1 holds frames of {handmade.CLIPS[0].name} from 16 on"),
        (0, 40, 20, f"row group 2 holds frames of {handmade.CLIPS[1].name} from 0 on"),
        (3, 17, 0, "there is no row group 3"),
    ],
)
def test_rows_of_another_clip_are_refused(
    clips: list[Clip], row_group: int, frames: int, start: int, problem: str
) -> None:
    clip = replace(clips[0], row_group=row_group, frames=frames)
    with pytest.raises(UserError) as caught:
        read([clip], Window(0, start, 0, 0, False))
    assert str(caught.value) == f"{clip.shard}: {clip.name} should be there, but {problem}; run prepare again"


def test_threads_may_share_a_reader(clips: list[Clip]) -> None:
    reader = WindowReader(clips, ("rgb", "flow"), SIZE, CROP)
    windows = [Window(index % 10, 0, 0, 0, False) for index in range(120)]
    with ThreadPoolExecutor(8) as pool:
        for window, batch in zip(windows, pool.map(lambda window: reader.read_batch([window]), windows)):
            np.testing.assert_array_equal(batch["flow"][0, 0], expected_flow(window.clip, 0, window))


def test_a_shard_is_opened_once_until_readers_are_closed(clips: list[Clip], tmp_path: Path) -> None:
    moved = tmp_path / "part.parquet"
    shutil.copy(clips[4].shard, moved)
    window, clip = Window(0, 8, 0, 0, False), replace(clips[4], shard=str(moved))
    read([clip], window)
    moved.unlink()
    np.testing.assert_array_equal(read([clip], window)["flow"][0, 15], expected_flow(4, 23, window))
    close_shards()
    with pytest.raises(UserError, match="cannot be read"):
        read([clip], window)


def test_shards_of_an_object_store_are_read_from_the_cache(clips: list[Clip], tmp_path: Path) -> None:
    """Those on the machine's own disk are not copied."""
    order = random.Random(0).sample(range(10), 10)
    windows: list[Window | None] = [Window(index, 0, 0, 0, False) for index in order]
    cache = ShardCache(str(tmp_path / "cache"), 10**9)
    WindowReader(clips, ("flow",), SIZE, CROP, cache).read_batch(windows)
    assert not (tmp_path / "cache").exists()
    remote = [replace(clip, shard=f"file://{clip.shard}") for clip in clips]
    batch = WindowReader(remote, ("flow",), SIZE, CROP, cache).read_batch(windows)
    assert len(list((tmp_path / "cache").iterdir())) == 7
    for place, index in enumerate(order):
        np.testing.assert_array_equal(batch["flow"][place, 0], expected_flow(index, 0, Window(0, 0, 0, 0, False)))


def test_a_crop_fits_up_to_the_smaller_side_of_the_images(handmade_shards: str) -> None:
    shards = open_shards(handmade_shards)
    check_fits(shards, tiny_config(data__crop=40))
    with pytest.raises(UserError, match=r"^data\.crop = 41 does not fit into the shards' 48 x 40 images$"):
        check_fits(shards, tiny_config(data__crop=41))


def test_a_configuration_without_clips_is_refused(handmade_shards: str) -> None:
    shards = open_shards(handmade_shards)
    with pytest.raises(UserError, match=r"no validation clips in by_session fold 9 \(data\.fold\)$"):
        check_fits(shards, tiny_config(data__validation="by_session", data__fold=9))
    with pytest.raises(UserError, match=r"there are no training clips$"):
        check_fits(replace(shards, table=shards.table.slice(0, 2)), tiny_config())


def test_only_the_row_groups_and_columns_of_a_window_are_read(
    clips: list[Clip], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[tuple[list[int], list[str]]] = []
    whole = pq.ParquetFile.read_row_groups

    def spy(file: pq.ParquetFile, groups: list[int], columns: list[str], **options: object) -> pa.Table:
        reads.append((groups, columns))
        return whole(file, groups, columns, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_groups", spy)
    gaze = ["gaze_x", "gaze_y", "gaze_valid"]
    read(clips, Window(2, 16, 0, 0, False), Window(9, 15, 0, 0, False), Window(3, 0, 0, 0, False), streams=("flow",))
    assert reads == [([1], ["flow", *gaze]), ([1, 2], ["flow", *gaze]), ([3], ["flow", *gaze])]


def test_every_thread_has_a_reader_of_its_own(clips: list[Clip], monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    whole = reader_module._open_file

    def spy(uri: str) -> pq.ParquetFile:
        opened.append(threading.get_ident())
        return whole(uri)

    monkeypatch.setattr(reader_module, "_open_file", spy)
    close_shards()
    windows = [Window(4, 0, 0, 0, False), Window(4, 8, 0, 0, False)]
    read(clips, *windows)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(read, clips, *windows).result()
    assert len(opened) == len(set(opened)) == 2


def test_values_of_a_column_are_those_of_all_its_chunks() -> None:
    chunks = [pa.array([b"a", b"bc", b"", b"def"], pa.binary()).slice(1), pa.array([b"g"], pa.binary())]
    values = reader_module._column_bytes(pa.chunked_array(chunks))
    assert [value.tobytes() for value in values] == [b"bc", b"", b"def", b"g"]
