"""`bench prepare`: `prepare` beside a plain loop, TV-L1 beside DIS, and the feed beside bare decoding."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from tune_ego.bench.feed import all_clips, clips_of_egtea_lengths, measure_feed
from tune_ego.bench.record import Benchmark, cores, time_in_turn
from tune_ego.cluster import ray_session
from tune_ego.console import console
from tune_ego.dataset import flow, video
from tune_ego.dataset.annotations import find_clips, read_annotations
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.synthetic import synthesize
from tune_ego.dataset.tv_l1 import tv_l1
from tune_ego.errors import UserError

_REAL_PAIRS = 4
"""Frame pairs of real clips, in addition to the synthetic pairs."""
_GPU_BATCH = 64
"""Frame pairs in a batch of TV-L1 on a GPU."""
_TEXTURE = (40, 12, 4)
"""Cell sizes of the synthetic scene's texture, pixels; also the weights, so that coarse cells dominate."""
_MOTIONS = ((0.3, -0.1, 0, 1), (2.5, 1, 0.5, 1), (-1.5, 3, 0, 1.015), (11, -6, 2, 1))
"""Motions between two frames, from nearly still to a turn of the head: x and y, pixels; degrees; scale."""


def bench_prepare(
    egtea: str | None = None, *, clips: int = 16, seconds: float = 30.0, repeats: int = 3, windows: int = 128
) -> Benchmark:
    """Measure `prepare`, two flow methods and the feed.

    Args:
        egtea: Folder of EGTEA clips to measure on; None: synthetic clips of 640 x 480.
        clips: Number of synthetic clips.
        seconds: Mean length of a synthetic clip.
        repeats: Repeats of each measurement.
        windows: Windows in a timed pass of the feed.
    """
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tune-ego-bench-")))
        if egtea is None:
            with console.capture():
                synthesize(folder / "egtea", verbs=2, nouns=1, clips=clips, seconds=seconds, size=(640, 480))
        stack.enter_context(flow.one_thread())
        return _measure_all(egtea or str(folder / "egtea"), folder, repeats, windows, synthetic=egtea is None)


def _measure_all(egtea: str, folder: Path, repeats: int, windows: int, synthetic: bool) -> Benchmark:
    settings = Settings()
    videos = find_clips(egtea)
    files = [videos[clip.name.name].uri for clip in read_annotations(egtea).clips if clip.name.name in videos]
    if not files:
        raise UserError(f"{egtea}: the folder has no annotated clip; name a folder with EGTEA's clips and annotations")
    benchmark = Benchmark("prepare", {"clips": len(files), "images": "320x240"})
    numbers = iter(range(repeats))
    with ray_session():
        seconds = time_in_turn(
            repeats,
            warm_up=0,  # a run takes minutes; the median hardly depends on the first run, which starts Ray's workers
            plain=lambda: plain_loop(files, settings.image_size),
            job=lambda: _quiet_prepare(egtea, str(folder / f"shards-{next(numbers)}"), settings),
        )
    shards = open_shards(str(folder / "shards-0"))
    frames = shards.info["frames"]
    benchmark.facts["frames"] = frames
    loop = benchmark.add("plain loop", "frames/s", [frames / value for value in seconds["plain"]])
    job = benchmark.add(f"prepare, {cores()} cores", "frames/s", [frames / value for value in seconds["job"]])
    benchmark.compare("prepare / plain loop", job, loop)
    real = [] if synthetic else _first_pairs(files, settings.image_size)
    _measure_flow(benchmark, [*moving_pairs(settings.image_size), *real], repeats)
    clips = clips_of_egtea_lengths(shards, folder) if synthetic else all_clips(shards)
    measure_feed(benchmark, shards, clips, windows, repeats)
    return benchmark


def _quiet_prepare(egtea: str, out: str, settings: Settings) -> None:
    with console.capture():
        prepare(egtea, out, settings, allow_missing=True)


def plain_loop(files: list[str], image_size: tuple[int, int]) -> None:
    """Decode, resize, compute DIS flow and encode JPEG files in one process, as a first version of `prepare` would.

    Args:
        files: Video files.
        image_size: Width and height of the images, pixels.

    Raises:
        UserError: A video cannot be decoded.
    """
    for file in files:
        try:
            _encode_plainly(file, image_size)
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(
                f"{file}: cannot be decoded ({error}); download it again, or remove it from the folder"
            ) from error


def _encode_plainly(file: str, image_size: tuple[int, int]) -> None:
    """Encode frames and flow of one video; the JPEG files are dropped."""
    matcher = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    quality = [cv2.IMWRITE_JPEG_QUALITY, video.JPEG_QUALITY]
    previous = None
    with av.open(file) as container:
        for frame in container.decode(video=0):
            image = cv2.resize(frame.to_ndarray(format="bgr24"), image_size, interpolation=cv2.INTER_AREA)
            cv2.imencode(".jpg", image, quality)
            grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            if previous is not None:
                cv2.imencode(".jpg", flow.quantise(matcher.calc(previous, grey, None)), quality)
            previous = grey


def _measure_flow(benchmark: Benchmark, pairs: list[tuple[np.ndarray, np.ndarray]], repeats: int) -> None:
    """Measure DIS and TV-L1 on the same frame pairs, each on one thread.

    Where there is a GPU, TV-L1 runs on the GPU in one batch of `_GPU_BATCH` pairs.
    """
    dis = flow.flow_method("dis")
    on_gpu = flow.runs_on_gpu("tvl1")
    pairs = pairs * (_GPU_BATCH // len(pairs)) if on_gpu else pairs
    stacks = [torch.from_numpy(np.stack(frames)).to("cuda" if on_gpu else "cpu") for frames in zip(*pairs)]
    batch = len(pairs) if on_gpu else 1

    def compute_tv_l1() -> None:
        for before, after in zip(*(stack.split(batch) for stack in stacks)):
            tv_l1(before, after).cpu()

    seconds = time_in_turn(repeats, dis=lambda: [dis.fields(pair) for pair in pairs], tvl1=compute_tv_l1)
    where = "GPU" if on_gpu else "one thread"
    per_pair = {name: [1e3 * value / len(pairs) for value in values] for name, values in seconds.items()}
    dis_figure = benchmark.add(f"flow dis, one thread, mean of {len(pairs)} pairs", "ms a pair", per_pair["dis"])
    tv_l1_figure = benchmark.add(f"flow tvl1, {where}, mean of {len(pairs)} pairs", "ms a pair", per_pair["tvl1"])
    benchmark.compare("flow tvl1 / dis", tv_l1_figure, dis_figure)


def moving_pairs(image_size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return grey frame pairs [H, W] uint8 of a textured scene, one pair for each of `_MOTIONS`."""
    width, height = image_size
    random = np.random.default_rng(0)
    layers = [
        cv2.resize(random.uniform(0, 255, (height // cell, width // cell)), image_size, interpolation=cv2.INTER_CUBIC)
        for cell in _TEXTURE
    ]
    scene = np.clip(np.average(layers, axis=0, weights=_TEXTURE), 0, 255)
    pairs = []
    for x, y, degrees, scale in _MOTIONS:
        motion = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale)  # [2, 3]
        motion[:, 2] += x, y
        after = cv2.warpAffine(scene, motion, image_size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        noisy = (image + random.normal(0, 1, image.shape) for image in (scene, after))
        before, after = (np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in noisy)
        pairs.append((before, after))
    return pairs


def _first_pairs(files: list[str], image_size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the first two frames, grey [H, W] uint8, of up to `_REAL_PAIRS` videos."""
    pairs = []
    for place in np.linspace(0, len(files) - 1, min(_REAL_PAIRS, len(files))).astype(int):
        frames = islice(video.decode(files[place], image_size), 2)
        grey = [cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in frames]
        if len(grey) == 2:
            pairs.append((grey[0], grey[1]))
    return pairs
