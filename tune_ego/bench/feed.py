"""`bench feed`: reading windows, beside a bare loop of decoding, and what the feed gives through Ray."""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from statistics import mean

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg

from tune_ego import storage
from tune_ego.bench.record import Benchmark, cores, in_turn
from tune_ego.bench.step import in_a_process
from tune_ego.cluster import ray_session
from tune_ego.config import WINDOW_FRAMES, Config, override_config
from tune_ego.console import console
from tune_ego.dataset import flow
from tune_ego.dataset.gaze import no_gaze
from tune_ego.dataset.prepare import FRAMES_PER_SHARD, Settings, prepare
from tune_ego.dataset.shards import Clip, Shards, frame_table, open_shards, read_clip, row_groups, write_shard
from tune_ego.dataset.synthetic import synthesize
from tune_ego.feed.batches import AHEAD, ray_batches
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.feed.reader import WindowReader, close_shards
from tune_ego.feed.sampling import Window, training_window
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.runs.ray_private import throttling_callback

_CROP = 224
_BATCH = 8
_COUNTED = 5 * AHEAD
"""Batches through Ray that count; as many as it may read ahead go before them."""
_MEDIAN, _MEAN, _EXTREMES = 59, 100, (15, 2801)  # frames of EGTEA's clips
_IO_COUNTS = Path("/proc/self/io")


def bench_feed(shards: str | None = None, *, repeats: int = 3, windows: int = 128) -> Benchmark:
    """Measure on shards of 320 x 240 images, else on those of a few synthetic clips made for it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-ego-bench-")))
        stack.enter_context(ray_session())
        data = open_shards(storage.absolute(shards) if shards else _synthetic(folder))
        benchmark = Benchmark("feed", {"clips": len(data.table), "crop": _CROP, "batch": _BATCH})
        clips = clips_of(data) if shards else clips_of_usual_lengths(data, folder)
        with flow.one_thread():
            measure_feed(benchmark, data, clips, windows, repeats)
        plan = _plan(data)
        alone = in_a_process(_alone, plan, repeats)
        one = benchmark.add("the run's windows, read without Ray, one core", "windows/s", alone)
        for readers in sorted({1, cores()}):
            speeds = [_through_ray(plan, readers) for _ in range(repeats)]
            whole = benchmark.add(f"the same through Ray, {readers} at a time", "windows/s", speeds)
            benchmark.compare(f"through Ray, {readers} at a time / without", whole, one)
    return benchmark


def _synthetic(folder: Path) -> str:
    with console.capture():
        synthesize(str(folder / "egtea"), verbs=2, nouns=1, clips=16, seconds=20.0, size=(640, 480))
        prepare(str(folder / "egtea"), str(folder / "shards"), Settings(), allow_missing=True)
    return str(folder / "shards")


def _plan(shards: Shards) -> FeedPlan:
    count = AHEAD + _COUNTED
    changes = {"data.crop": _CROP, "train.batch_size": _BATCH, "train.iterations": count}
    config = override_config(Config(), {**changes, "train.validate_every": count}, "bench")
    return FeedPlan.of(shards.root, config, 1, 0)


def _alone(plan: FeedPlan, repeats: int) -> list[float]:
    def read() -> None:
        for item in range(AHEAD, 2 * AHEAD):  # none is kept: the next one takes its memory
            plan.read(item)

    with flow.one_thread():
        keep_freed_memory()  # as readers do
        seconds = in_turn(repeats, read=read)["read"]
    return [AHEAD * _BATCH / value for value in seconds]


def _through_ray(plan: FeedPlan, readers: int) -> float:
    """Windows/s of the feed where nobody computes: what a trainer could take at most."""
    batches = ray_batches(plan, 0, readers, _BATCH * WINDOW_FRAMES * _CROP**2 * 5, throttling_callback)
    for _ in range(AHEAD):
        next(batches)
    start = time.perf_counter()
    for _ in range(_COUNTED):
        next(batches)
    return _COUNTED * _BATCH / (time.perf_counter() - start)  # what is left, the validation, is not read


def measure_feed(benchmark: Benchmark, shards: Shards, clips: list[Clip], count: int, repeats: int) -> None:
    """Two-stream windows on one core against a bare loop of `cv2.imdecode` over the same JPEG files."""
    windows = [training_window(clips, 0, sample, shards.image_size, _CROP) for sample in range(count)]
    reader = WindowReader(clips, ("rgb", "flow"), shards.image_size, _CROP)
    images = _images_of(clips, windows)

    def read() -> None:
        for first in range(0, count, _BATCH):
            reader.read_batch([*windows[first : first + _BATCH]])

    def bare() -> None:
        for flag, data in images:
            cv2.imdecode(data, flag)

    def bare_simplejpeg() -> None:
        for flag, data in images:
            simplejpeg.decode_jpeg(data, "RGB" if flag == cv2.IMREAD_COLOR else "GRAY")

    seconds = in_turn(2 * repeats + 1, read=read, bare=bare, bare_simplejpeg=bare_simplejpeg)
    ceiling = benchmark.add("bare cv2.imdecode, one core", "windows/s", [count / value for value in seconds["bare"]])
    feed = benchmark.add("feed, one core", "windows/s", [count / value for value in seconds["read"]])
    benchmark.compare("feed / bare cv2.imdecode", feed, ceiling)
    decoder = benchmark.add(
        "bare simplejpeg, one core", "windows/s", [count / value for value in seconds["bare_simplejpeg"]]
    )
    benchmark.compare("feed / bare simplejpeg, which it decodes with", feed, decoder)
    benchmark.about["mean frames of the feed's clips"] = round(mean(clip.frames for clip in clips))
    if _IO_COUNTS.exists():
        before = _bytes_read()
        for window in windows:
            close_shards()  # EGTEA has more shards than stay open: at worst each window opens one
            reader.read_batch([window])
        benchmark.add("feed reads, a shard opened each time", "MB a window", [(_bytes_read() - before) / 1e6 / count])


def clips_of(shards: Shards) -> list[Clip]:
    return [shards.clip(row) for row in shards.table.to_pylist()]


def clips_of_usual_lengths(shards: Shards, folder: Path) -> list[Clip]:
    """The frames of synthetic shards once more, as clips with EGTEA's lengths: median 59 frames, mean about 100."""
    columns = ["rgb", "flow"]
    rows = pa.concat_tables(read_clip(shards, row).select(columns) for row in shards.table.to_pylist())
    lengths = np.random.default_rng(0).lognormal(np.log(_MEDIAN), np.sqrt(2 * np.log(_MEAN / _MEDIAN)), rows.num_rows)
    clips: list[Clip] = []
    tables: list[pa.Table] = []
    start, group, shard = 0, 0, 0
    shortest, longest = _EXTREMES
    for length in np.clip(np.rint(lengths), shortest, min(longest, rows.num_rows)).astype(int).tolist():
        images = rows.slice(start, length)
        if tables and (start + length > rows.num_rows or sum(map(len, tables)) + length > FRAMES_PER_SHARD):
            write_shard(clips[-1].shard, tables, [], [], {})
            tables, group, shard = [], 0, shard + 1
        if start + length > rows.num_rows:
            break
        clips.append(Clip(f"clip-{len(clips)}", 0, length, str(folder / f"usual-{shard:04d}.parquet"), group))
        rgb, motion = (images[name].to_pylist() for name in columns)
        tables.append(frame_table(clips[-1].name, rgb, motion, no_gaze(length)))
        start, group = start + length, group + row_groups(length)
    return clips


def _images_of(clips: list[Clip], windows: list[Window]) -> list[tuple[int, np.ndarray]]:
    """(flag of `cv2.imdecode`, JPEG file) of all that the windows show."""
    images = []
    for window in windows:
        clip = clips[window.clip]
        groups = range(clip.row_group, clip.row_group + row_groups(clip.frames))
        with pq.ParquetFile(clip.shard) as file:
            table = file.read_row_groups(groups, ["rgb", "flow"]).slice(window.start, WINDOW_FRAMES)
        for name, flag in (("rgb", cv2.IMREAD_COLOR), ("flow", cv2.IMREAD_GRAYSCALE)):
            images += [(flag, np.frombuffer(value.as_py(), np.uint8)) for value in table[name]]
    return images


def _bytes_read() -> int:
    """What this process has read so far, by its own calls (from the page cache too)."""
    return int(_IO_COUNTS.read_text().split()[1])
