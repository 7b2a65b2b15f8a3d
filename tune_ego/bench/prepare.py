"""`bench prepare`: the job against a plain loop, flow methods, and what the feed reads and decodes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from tune_ego.bench.record import Benchmark, cores, in_turn
from tune_ego.cluster import ray_session
from tune_ego.config import WINDOW_FRAMES
from tune_ego.console import console
from tune_ego.dataset import flow, video
from tune_ego.dataset.annotations import find_clips, read_annotations
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import Clip, Shards, open_shards, read_clip
from tune_ego.dataset.synthetic import synthesize
from tune_ego.feed.windows import Window, WindowReader, training_window

_CROP = 224
_BATCH = 8
_PAIRS = 4  # of frames, for the slow flow methods
_IO_COUNTS = Path("/proc/self/io")


def bench_prepare(
    egtea: str | None = None, *, clips: int = 16, seconds: float = 30.0, repeats: int = 3, windows: int = 128
) -> Benchmark:
    """Measure on an EGTEA folder, else on `clips` synthetic clips of `seconds`, 640 x 480, made for it."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-ego-bench-")))
        if egtea is None:
            with console.capture():
                synthesize(folder / "egtea", verbs=2, nouns=1, clips=clips, seconds=seconds, size=(640, 480))
        stack.enter_context(flow.one_thread())
        return _measure(egtea or str(folder / "egtea"), folder, repeats, windows)


def _measure(egtea: str, folder: Path, repeats: int, windows: int) -> Benchmark:
    settings = Settings()
    found = find_clips(egtea)
    files = [found[clip.name.name].uri for clip in read_annotations(egtea).clips if clip.name.name in found]
    benchmark = Benchmark("prepare", {"clips": len(files), "images": "320x240"})
    places = iter(range(repeats))
    with ray_session():
        seconds = in_turn(
            repeats,
            warm_up=0,  # minutes each; the first job starts its workers as well, the median does not see it
            plain=lambda: plain_loop(files, settings.image_size),
            job=lambda: _quiet_prepare(egtea, str(folder / f"shards-{next(places)}"), settings),
        )
    shards = open_shards(str(folder / "shards-0"))
    frames = shards.info["frames"]
    benchmark.about["frames"] = frames
    loop = benchmark.add("plain loop", "frames/s", [frames / value for value in seconds["plain"]])
    job = benchmark.add(f"prepare, {cores()} cores", "frames/s", [frames / value for value in seconds["job"]])
    benchmark.compare("prepare / plain loop", job, loop)
    _measure_flow(benchmark, files, settings.image_size, repeats)
    _measure_feed(benchmark, shards, windows, repeats)
    return benchmark


def _quiet_prepare(egtea: str, out: str, settings: Settings) -> None:
    with console.capture():
        prepare(egtea, out, settings, allow_missing=True)


def plain_loop(files: list[str], image_size: tuple[int, int]) -> None:
    """What one would write first: one process that decodes, resizes, computes DIS and makes the same JPEG files."""
    matcher = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    quality = [cv2.IMWRITE_JPEG_QUALITY, video.JPEG_QUALITY]
    for file in files:
        before = None
        with av.open(file) as container:
            for frame in container.decode(video=0):
                image = cv2.resize(frame.to_ndarray(format="bgr24"), image_size, interpolation=cv2.INTER_AREA)
                cv2.imencode(".jpg", image, quality)
                grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
                if before is not None:
                    cv2.imencode(".jpg", flow.quantise(matcher.calc(before, grey, None)), quality)
                before = grey


def _measure_flow(benchmark: Benchmark, files: list[str], image_size: tuple[int, int], repeats: int) -> None:
    """DIS and TV-L1 on the same frame pairs, one thread; TV-L1 on a GPU too, where there is one."""
    dis, tv_l1 = flow.flow_method("dis"), flow.flow_method("tvl1")
    grey = [dis.view(image) for _, image in zip(range(_PAIRS + 1), video.decode(files[0], image_size))]
    pairs = len(grey) - 1
    seconds = in_turn(repeats, dis=lambda: dis.fields(grey), tvl1=lambda: tv_l1.fields(grey))
    where = "GPU" if torch.cuda.is_available() else "one thread"
    fast = benchmark.add("flow dis, one thread", "ms a pair", [1e3 * value / pairs for value in seconds["dis"]])
    slow = benchmark.add(f"flow tvl1, {where}", "ms a pair", [1e3 * value / pairs for value in seconds["tvl1"]])
    benchmark.compare("flow tvl1 / dis", slow, fast)


def _measure_feed(benchmark: Benchmark, shards: Shards, count: int, repeats: int) -> None:
    """Two-stream windows on one core against a bare loop of `cv2.imdecode` over the same JPEG files."""
    clips = [clip for role in ("train", "test") for clip in _clips(shards, role)]
    windows = [training_window(clips, 0, sample, shards.image_size, _CROP) for sample in range(count)]
    reader = WindowReader(clips, ("rgb", "flow"), shards.image_size, _CROP)
    images = _images_of(shards, clips, windows)

    def read() -> None:
        for first in range(0, count, _BATCH):
            reader.read_batch([*windows[first : first + _BATCH]])

    def bare() -> None:
        for flag, data in images:
            cv2.imdecode(data, flag)

    seconds = in_turn(2 * repeats + 1, read=read, bare=bare)
    ceiling = benchmark.add("bare cv2.imdecode, one core", "windows/s", [count / value for value in seconds["bare"]])
    feed = benchmark.add("feed, one core", "windows/s", [count / value for value in seconds["read"]])
    benchmark.compare("feed / bare cv2.imdecode", feed, ceiling)
    if _IO_COUNTS.exists():
        before = _bytes_read()
        read()
        benchmark.add("feed reads", "MB a window", [(_bytes_read() - before) / 1e6 / count])


def _clips(shards: Shards, role: str) -> list[Clip]:
    wanted = set(shards.names(role, 1))
    return [
        Clip(row["clip"], row["action"], row["frames"], f"{shards.root}/{row['shard']}", row["row_group"])
        for row in shards.table.to_pylist()
        if row["clip"] in wanted
    ]


def _images_of(shards: Shards, clips: list[Clip], windows: list[Window]) -> list[tuple[int, np.ndarray]]:
    """(flag of `cv2.imdecode`, JPEG file) of all that the windows show."""
    rows = {row["clip"]: row for row in shards.table.to_pylist()}
    images = []
    for window in windows:
        clip = clips[window.clip]
        table = read_clip(shards, rows[clip.name]).slice(window.start, WINDOW_FRAMES)
        for name, flag in (("rgb", cv2.IMREAD_COLOR), ("flow", cv2.IMREAD_GRAYSCALE)):
            images += [(flag, np.frombuffer(value.as_py(), np.uint8)) for value in table[name]]
    return images


def _bytes_read() -> int:
    """What this process has read so far, by its own calls (from the page cache too)."""
    return int(_IO_COUNTS.read_text().split()[1])
