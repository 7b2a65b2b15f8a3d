"""`bench feed`: reading windows on one core beside a bare decoding loop, and the whole feed through Ray."""

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
from tune_ego.bench.record import Benchmark, cores, time_in_turn
from tune_ego.bench.step import run_in_process
from tune_ego.cluster import ray_session
from tune_ego.config import WINDOW_FRAMES, Config
from tune_ego.config_io import override_config
from tune_ego.console import console
from tune_ego.dataset import flow
from tune_ego.dataset.gaze import no_gaze
from tune_ego.dataset.prepare import FRAMES_PER_SHARD, Settings, prepare
from tune_ego.dataset.shards import Clip, Shards, frame_table, open_shards, read_clip, row_groups, write_shard
from tune_ego.dataset.synthetic import synthesize
from tune_ego.feed.batches import BATCHES_AHEAD, ray_batches
from tune_ego.feed.feed_plan import FeedPlan
from tune_ego.feed.reader import WindowReader, close_shards
from tune_ego.feed.sampling import Window, training_window
from tune_ego.freed_memory import keep_freed_memory
from tune_ego.ray_private import throttling_callback

_CROP = 224
_BATCH = 8
_COUNTED = 5 * BATCHES_AHEAD
"""Timed batches through Ray. They come after the batches that the feed may have read ahead."""
_MEDIAN, _MEAN, _EXTREMES = 59, 100, (15, 2801)
"""Length of EGTEA's clips, frames: median, mean, and (shortest, longest)."""
_IO_COUNTS = Path("/proc/self/io")


def bench_feed(shards: str | None = None, *, repeats: int = 3, windows: int = 128) -> Benchmark:
    """Measure the feed.

    Args:
        shards: Folder or URI of shards with images of 320 x 240; None: shards of 16 synthetic clips.
        repeats: Repeats of each measurement.
        windows: Windows in a timed pass over the clips.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-ego-bench-")))
        stack.enter_context(ray_session())
        data = open_shards(storage.absolute(shards) if shards else _synthetic_shards(folder))
        benchmark = Benchmark("feed", {"clips": len(data.table), "crop": _CROP, "batch": _BATCH})
        clips = all_clips(data) if shards else clips_of_egtea_lengths(data, folder)
        with flow.one_thread():
            measure_feed(benchmark, data, clips, windows, repeats)
        plan = _feed_plan(data)
        speeds = run_in_process(_read_alone, plan, repeats)
        reference = benchmark.add("the run's windows, read without Ray, one core", "windows/s", speeds)
        for readers in sorted({1, cores()}):
            speeds = [_read_through_ray(plan, readers) for _ in range(repeats)]
            whole = benchmark.add(f"the same through Ray, {readers} at a time", "windows/s", speeds)
            benchmark.compare(f"through Ray, {readers} at a time / without", whole, reference)
    return benchmark


def _synthetic_shards(folder: Path) -> str:
    """Write shards of 16 synthetic clips, about 20 s each; return their folder."""
    with console.capture():
        synthesize(str(folder / "egtea"), verbs=2, nouns=1, clips=16, seconds=20.0, size=(640, 480))
        prepare(str(folder / "egtea"), str(folder / "shards"), Settings(), allow_missing=True)
    return str(folder / "shards")


def _feed_plan(shards: Shards) -> FeedPlan:
    """Return the plan of a run that is validated once, after the last of its batches."""
    count = BATCHES_AHEAD + _COUNTED
    changes = {"data.crop": _CROP, "train.batch_size": _BATCH, "train.iterations": count}
    config = override_config(Config(), {**changes, "train.validate_every": count}, "bench")
    return FeedPlan.from_config(shards.root, config, 1, 0)


def _read_alone(plan: FeedPlan, repeats: int) -> list[float]:
    """Return the windows/s of reading batches of the plan in this process, on one core, without Ray."""

    def read() -> None:
        for item in range(BATCHES_AHEAD, 2 * BATCHES_AHEAD):  # not stored: each batch reuses the memory of the last
            plan.read(item)

    with flow.one_thread():
        keep_freed_memory()  # as in the readers of a run
        seconds = time_in_turn(repeats, read=read)["read"]
    return [BATCHES_AHEAD * _BATCH / value for value in seconds]


def _read_through_ray(plan: FeedPlan, readers: int) -> float:
    """Return the windows/s of the feed without training, an upper bound of the training speed."""
    batches = ray_batches(plan, 0, readers, _BATCH * WINDOW_FRAMES * _CROP**2 * 5, throttling_callback)
    for _ in range(BATCHES_AHEAD):
        next(batches)
    start = time.perf_counter()
    for _ in range(_COUNTED):
        next(batches)
    return _COUNTED * _BATCH / (time.perf_counter() - start)  # the plan's validation is not read


def measure_feed(benchmark: Benchmark, shards: Shards, clips: list[Clip], count: int, repeats: int) -> None:
    """Measure reading two-stream windows on one core beside bare loops that decode the same JPEG files.

    Args:
        benchmark: Benchmark to add the figures to.
        shards: Shards of the clips.
        clips: Clips to read.
        count: Windows in a timed pass.
        repeats: The pass is timed 2 * repeats + 1 times.
    """
    windows = [training_window(clips, 0, sample, shards.image_size, _CROP) for sample in range(count)]
    reader = WindowReader(clips, ("rgb", "flow"), shards.image_size, _CROP)
    images = _images_of(clips, windows)

    def read() -> None:
        for first in range(0, count, _BATCH):
            reader.read_batch([*windows[first : first + _BATCH]])

    def decode_opencv() -> None:
        for flag, data in images:
            cv2.imdecode(data, flag)

    def decode_simplejpeg() -> None:
        for flag, data in images:
            simplejpeg.decode_jpeg(data, "RGB" if flag == cv2.IMREAD_COLOR else "GRAY")

    seconds = time_in_turn(2 * repeats + 1, read=read, opencv=decode_opencv, simplejpeg=decode_simplejpeg)
    speeds = {name: [count / value for value in values] for name, values in seconds.items()}
    opencv = benchmark.add("bare cv2.imdecode, one core", "windows/s", speeds["opencv"])
    feed = benchmark.add("feed, one core", "windows/s", speeds["read"])
    benchmark.compare("feed / bare cv2.imdecode", feed, opencv)
    decoder = benchmark.add("bare simplejpeg, one core", "windows/s", speeds["simplejpeg"])
    benchmark.compare("feed / bare simplejpeg, the feed's decoder", feed, decoder)
    benchmark.facts["mean frames of the feed's clips"] = round(mean(clip.frames for clip in clips))
    if _IO_COUNTS.exists():
        before = _bytes_read()
        for window in windows:
            close_shards()  # the worst case: EGTEA has more shards than stay open, so each window may open one
            reader.read_batch([window])
        benchmark.add("feed reads, a shard opened each time", "MB a window", [(_bytes_read() - before) / 1e6 / count])


def all_clips(shards: Shards) -> list[Clip]:
    """Return all clips of a data set."""
    return [shards.clip(row) for row in shards.table.to_pylist()]


def clips_of_egtea_lengths(shards: Shards, folder: Path) -> list[Clip]:
    """Write the frames of synthetic shards again, as clips with the lengths of EGTEA's; return the clips.

    Lengths are drawn from a log-normal distribution with a median of 59 and a mean of about 100 frames.
    """
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
    """Return (flag of `cv2.imdecode`, JPEG file as uint8) for each image of the windows, frames and flow."""
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
    """Return the bytes that this process has read with system calls, page cache included."""
    return int(_IO_COUNTS.read_text().split()[1])
