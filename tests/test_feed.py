from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torchvision.io import decode_jpeg

from tests.conftest import tiny_config
from tune_ego.dataset.shards import Clip, open_shards
from tune_ego.errors import UserError, user_error_in
from tune_ego.feed import batches as batches_module
from tune_ego.feed.batches import begun, ray_batches, to_device
from tune_ego.feed.decoding import decoded as decode_images
from tune_ego.feed.plan import FeedPlan
from tune_ego.feed.windows import Window, WindowReader, check_fits, dense_starts, spread_starts, training_window
from tune_ego.placement import decodes_on_gpu, gpus_per_worker

CLIPS = [Clip(f"c{n}", n % 3, 10 + n, "s", 0) for n in range(12)]


def windows(seed: int, samples: range) -> list[Window]:
    return [training_window(CLIPS, seed, n, (48, 36), 32) for n in samples]


def test_the_sample_order_is_a_pure_function_and_an_epoch_a_permutation() -> None:
    order = windows(1, range(36))
    assert windows(1, range(20, 36)) == order[20:]
    for epoch in range(3):
        assert sorted(w.clip for w in order[12 * epoch : 12 * epoch + 12]) == list(range(12))
    assert windows(2, range(36)) != order
    for window in order:
        assert 0 <= window.start <= max(0, CLIPS[window.clip].frames - 16)
        assert 0 <= window.top <= 4 and 0 <= window.left <= 16
    assert {w.flip for w in order} == {True, False}


def test_evaluation_windows() -> None:
    assert dense_starts(10) == dense_starts(16) == [0]
    assert dense_starts(17) == [0, 1]
    assert dense_starts(32) == [0, 8, 16]
    assert dense_starts(35) == [0, 8, 16, 19]
    assert spread_starts(36, 1) == [10]
    assert spread_starts(36, 2) == [5, 15]
    assert spread_starts(10, 3) == [0]


def read(reader: WindowReader, window: Window) -> dict[str, np.ndarray]:
    return {name: value[0] for name, value in reader.read_batch([window]).items()}


def decoded(jpeg: bytes, flag: int) -> np.ndarray:
    image = cv2.imdecode(np.frombuffer(jpeg, np.uint8), flag)
    assert image is not None
    return image


def test_a_window_is_the_frames_flow_and_gaze_of_its_place(shards: str) -> None:
    data = open_shards(shards)
    clips = data.test(1)
    clip = max(clips, key=lambda clip: clip.frames)
    index = clips.index(clip)
    rows = pq.read_table(clip.shard, partitioning=None).to_pylist()
    rows = [row for row in rows if row["clip"] == clip.name]
    reader = WindowReader(clips, ("rgb", "flow"), data.image_size, 32)
    start = clip.frames - 16
    for flip in (False, True):
        sample = read(reader, Window(index, start, top=3, left=5, flip=flip))
        for t, row in enumerate(rows[start:]):
            rgb, flow = decoded(row["rgb"], cv2.IMREAD_COLOR), decoded(row["flow"], cv2.IMREAD_GRAYSCALE)
            rgb = rgb[3:35, 5:37, ::-1]
            x, y = flow[:36][3:35, 5:37], flow[36:][3:35, 5:37]
            if flip:
                rgb, x, y = rgb[:, ::-1], 255 - x[:, ::-1], y[:, ::-1]
            assert (sample["rgb"][t] == rgb).all()
            assert (sample["flow"][t] == np.stack([x, y])).all()
            assert sample["gaze_valid"][t] == row["gaze_valid"]
            if row["gaze_valid"]:
                gaze_x, gaze_y = (row["gaze_x"] * 48 - 5) / 32, (row["gaze_y"] * 36 - 3) / 32
                assert sample["gaze"][t] == pytest.approx((1 - gaze_x if flip else gaze_x, gaze_y), abs=1e-5)


def test_short_clips_repeat_their_last_frame(shards: str) -> None:
    data = open_shards(shards)
    clips = data.test(1)
    short = Clip(clips[0].name, 0, 5, clips[0].shard, clips[0].row_group)
    sample = read(WindowReader([short], ("rgb",), data.image_size, 32), Window(0, 0, 0, 0, False))
    assert all((sample["rgb"][t] == sample["rgb"][4]).all() for t in range(4, 16))
    assert not (sample["rgb"][3] == sample["rgb"][4]).all()


def plan(shards: str, workers: int = 1, rank: int = 0, *, encoded: bool = False, **changes: object) -> FeedPlan:
    settings = {"train__iterations": 7, "train__validate_every": 3, "train__accumulate": 2, **changes}
    return FeedPlan.of(shards, tiny_config(**settings), workers, rank, encoded=encoded)


def test_a_plan_interleaves_training_and_validation(shards: str) -> None:
    whole = plan(shards)
    kinds = "".join("t" if whole.windows(item)[0] else "v" for item in range(whole.items))
    validation = "v" * whole.validation_items
    assert kinds == "tttttt" + validation + "tttttt" + validation + "tt" + validation
    seen = [w for item in range(6, 6 + whole.validation_items) for w in whole.windows(item)[1] if w is not None]
    assert sorted(w.clip for w in seen) == list(range(len(whole.validation_labels)))
    for iterations in (0, 3, 6):
        first = whole.first_item(iterations)
        assert kinds[first] == "t" and (first == 0 or kinds[first - 1] == "v")


def test_workers_share_one_order(shards: str) -> None:
    alone = plan(shards, train__batch_size=8)
    config = tiny_config(
        train__iterations=7, train__validate_every=3, train__accumulate=2, train__batch_size=8, compute__workers=2
    )
    pair = [FeedPlan.of(shards, config, 2, rank) for rank in range(2)]
    training = [[item for item in range(p.items) if p.windows(item)[0]] for p in (alone, *pair)]
    merged = [w for a, b in zip(training[1], training[2]) for w in pair[0].windows(a)[1] + pair[1].windows(b)[1]]
    assert merged == [w for item in training[0] for w in alone.windows(item)[1]]
    assert pair[0].items == pair[1].items


def test_ray_reads_the_same_batches_in_the_same_order(shards: str) -> None:
    whole = plan(shards)
    batches = list(ray_batches(whole, 3, readers=2, batch_bytes=1 << 20))
    assert len(batches) == whole.items - 3
    for item, batch in enumerate(batches, start=3):
        expected = whole.read(item)
        assert batch.keys() == expected.keys()
        assert all(np.array_equal(batch[name], expected[name], equal_nan=name == "gaze") for name in expected)


def test_what_does_not_fit_is_refused(shards: str) -> None:
    with pytest.raises(UserError, match=r"data\.crop = 64.*48 x 36"):
        check_fits(open_shards(shards), tiny_config(data__crop=64))
    with pytest.raises(UserError, match=r"validation clips in by_session fold 9"):
        check_fits(open_shards(shards), tiny_config(data__validation="by_session", data__fold=9))


def test_threads_may_share_a_reader(shards: str) -> None:
    data = open_shards(shards)
    clips = sorted(data.test(1), key=lambda clip: clip.shard)
    reader = WindowReader(clips, ("rgb", "flow"), data.image_size, 32)
    windows = [Window(index % len(clips), 0, 0, 0, False) for index in range(400)]
    expected = [read(reader, window) for window in windows[: len(clips)]]
    with ThreadPoolExecutor(8) as pool:
        for window, sample in zip(windows, pool.map(partial(read, reader), windows)):
            assert np.array_equal(sample["rgb"], expected[window.clip]["rgb"])


def test_a_mistake_inside_a_ray_task_is_still_the_users(shards: str, tmp_path: Path) -> None:
    shutil.copytree(shards, tmp_path / "shards")
    for path in (tmp_path / "shards" / "frames").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Exception, match="parquet") as caught:
        list(ray_batches(plan(str(tmp_path / "shards")), 0, readers=1, batch_bytes=1 << 20))
    mistake = user_error_in(caught.value)
    assert mistake is not None
    assert "run prepare again" in str(mistake)
    assert "Traceback" not in str(mistake)


@pytest.mark.parametrize("damage", ["one bit of an image", "cut off"])
def test_a_damaged_shard_is_named(tmp_path: Path, shards: str, damage: str) -> None:
    data = open_shards(shards)
    clip = data.test(1)[0]
    raw = bytearray(Path(clip.shard).read_bytes())
    image = pq.read_table(clip.shard, columns=["rgb"], partitioning=None)["rgb"][0].as_py()
    if damage == "cut off":
        del raw[-100:]
    else:
        raw[raw.index(image) + len(image) // 2] ^= 4  # any JPEG decoder makes something of it
    damaged = tmp_path / "part.parquet"
    damaged.write_bytes(raw)
    reader = WindowReader([Clip(clip.name, 0, clip.frames, str(damaged), 0)], ("rgb",), data.image_size, 32)
    with pytest.raises(UserError, match=rf"part\.parquet: {clip.name} cannot be read.*delete this file"):
        read(reader, Window(0, 0, 0, 0, False))


def test_an_image_of_another_size_is_named(tmp_path: Path, shards: str) -> None:
    data = open_shards(shards)
    clip = data.test(1)[0]
    reader = WindowReader([clip], ("rgb",), (data.image_size[1], data.image_size[0]), 32)
    with pytest.raises(UserError, match=rf"{clip.name} holds a damaged rgb image \(of 48 x 36 pixels\)"):
        read(reader, Window(0, 0, 0, 0, False))


def test_a_feed_that_has_begun_gives_the_same_batches_and_errors() -> None:
    def feed(count: int) -> Iterator[dict[str, np.ndarray]]:
        for number in range(count):
            asked.set()
            yield {"item": np.array(number)}
        if count == 2:
            raise UserError("spoilt")

    asked = threading.Event()
    batches = begun(feed(3))
    assert asked.wait(10)  # before anybody asks for one
    assert [int(batch["item"]) for batch in batches] == [0, 1, 2]
    assert not list(begun(feed(0)))
    broken = begun(feed(2))
    assert [int(next(broken)["item"]) for _ in range(2)] == [0, 1]
    with pytest.raises(UserError, match="spoilt"):
        next(broken)


def test_what_the_device_decodes_is_what_readers_decode(shards: str) -> None:
    """On a CPU to the bit; padding, short clips and mirrored windows too."""
    data = open_shards(shards)
    clips = data.test(1)
    reader = WindowReader([*clips, replace(clips[0], frames=5)], ("rgb", "flow"), data.image_size, 32)
    chosen = [Window(0, 0, 3, 5, False), None, Window(1, 2, 0, 1, True), Window(len(clips), 0, 4, 16, True)]
    plain, encoded = reader.read_batch(chosen), reader.read_encoded(chosen)
    assert sum(map(len, (encoded["rgb_jpeg"], encoded["flow_jpeg"]))) < plain["rgb"].nbytes
    ours, theirs = (to_device(batch, torch.device("cpu")) for batch in (encoded, plain))
    for name, found, expected in zip(ours._fields, ours, theirs):
        assert found is not None and expected is not None
        assert torch.equal(found.nan_to_num(), expected.nan_to_num()), name


@pytest.mark.parametrize("estimate", [0.3, 3.0])
def test_whatever_the_blocks_and_their_estimated_size_the_order_stays(
    shards: str, monkeypatch: pytest.MonkeyPatch, estimate: float
) -> None:
    """Two tasks of several blocks of several batches each."""
    whole = plan(shards, train__iterations=70)
    size = sum(value.nbytes for value in whole.read(0).values())
    monkeypatch.setattr(batches_module, "TASKS", 2)
    monkeypatch.setattr(batches_module, "BLOCK_BYTES", int(3 * size * estimate))
    found = list(ray_batches(whole, 1, readers=2, batch_bytes=int(size * estimate)))
    assert len(found) == whole.items - 1
    for item, batch in enumerate(found, start=1):
        for name, value in whole.read(item).items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)


def test_where_images_are_decoded_is_known_before_a_run_starts() -> None:
    for asked, gpus, expected in (("cpu", 1, False), ("auto", 1, True), ("auto", 0, False), ("gpu", 0.5, True)):
        config = tiny_config(data__decode=asked, compute__gpus_per_worker=float(gpus))
        assert decodes_on_gpu(config, gpus_per_worker(config, [])) == expected
    with pytest.raises(UserError, match=r"data.decode: gpu needs a GPU"):
        gpus_per_worker(tiny_config(data__decode="gpu"), [{"CPU": 4}])


def test_an_image_that_the_device_cannot_decode_is_a_users_error(shards: str) -> None:
    batch = plan(shards, encoded=True).read(0)
    batch["rgb_jpeg"] = np.zeros_like(batch["rgb_jpeg"])
    with pytest.raises(UserError, match=r"an image cannot be decoded .*`data.decode: cpu` says which"):
        to_device(batch, torch.device("cpu"))


def test_what_a_gpu_cannot_do_is_no_fault_of_the_images(shards: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, the CPU has the last word: there is a GPU in name only here."""
    whole, spoilt = plan(shards, encoded=True).read(0), plan(shards, encoded=True).read(0)
    spoilt["rgb_jpeg"] = np.zeros_like(spoilt["rgb_jpeg"])

    def no_memory(files: list[torch.Tensor], mode: object, device: torch.device) -> object:
        if device.type == "cuda":
            raise RuntimeError("CUDA error: out of memory")
        return decode_jpeg(files, mode=mode, device=device)

    monkeypatch.setattr("tune_ego.feed.decoding.decode_jpeg", no_memory)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(synchronize=lambda: None))
    with pytest.raises(RuntimeError, match="out of memory"):
        decode_images(whole, "rgb", torch.device("cuda"))
    with pytest.raises(UserError, match="an image cannot be decoded"):
        decode_images(spoilt, "rgb", torch.device("cuda"))


def test_encoded_batches_travel_through_ray(shards: str) -> None:
    encoded = plan(shards, encoded=True)
    found = list(ray_batches(encoded, 0, readers=1, batch_bytes=1 << 16))
    assert len(found) == encoded.items
    for item, batch in enumerate(found):
        expected = encoded.read(item)
        assert "rgb_jpeg" in expected
        assert batch.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(batch[name], value, err_msg=name)
