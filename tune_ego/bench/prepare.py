"""`bench prepare`: the job against a plain loop, flow methods, and what the feed reads and decodes."""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

import av
import cv2
import numpy as np
import torch

from tune_ego.bench.feed import clips_of, clips_of_usual_lengths, measure_feed
from tune_ego.bench.record import Benchmark, cores, in_turn
from tune_ego.cluster import ray_session
from tune_ego.console import console
from tune_ego.dataset import flow, video
from tune_ego.dataset.annotations import find_clips, read_annotations
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.synthetic import synthesize
from tune_ego.dataset.tv_l1 import tv_l1
from tune_ego.errors import UserError

_PAIRS = 4  # of frames of the clips given, beside the synthetic ones
_GPU_BATCH = 64  # pairs
_TEXTURE = (40, 12, 4)  # pixels: cells of the scene, the coarse ones weigh most
_MOTIONS = ((0.3, -0.1, 0, 1), (2.5, 1, 0.5, 1), (-1.5, 3, 0, 1.015), (11, -6, 2, 1))
"""(x, y) pixels, degrees, scale between two frames: from nearly still to a turn of the head."""


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
        return _measure(egtea or str(folder / "egtea"), folder, repeats, windows, synthetic=egtea is None)


def _measure(egtea: str, folder: Path, repeats: int, windows: int, synthetic: bool) -> Benchmark:
    settings = Settings()
    found = find_clips(egtea)
    files = [found[clip.name.name].uri for clip in read_annotations(egtea).clips if clip.name.name in found]
    if not files:
        raise UserError(f"{egtea}: none of the annotated clips is here, nothing to measure on")
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
    real = [] if synthetic else _first_pairs(files, settings.image_size)
    _measure_flow(benchmark, [*moving_pairs(settings.image_size), *real], repeats)
    clips = clips_of_usual_lengths(shards, folder) if synthetic else clips_of(shards)
    measure_feed(benchmark, shards, clips, windows, repeats)
    return benchmark


def _quiet_prepare(egtea: str, out: str, settings: Settings) -> None:
    with console.capture():
        prepare(egtea, out, settings, allow_missing=True)


def plain_loop(files: list[str], image_size: tuple[int, int]) -> None:
    """What one would write first: one process that decodes, resizes, computes DIS and makes the same JPEG files.

    Raises `UserError` for a clip that cannot be decoded.
    """
    for file in files:
        try:
            _encode_plainly(file, image_size)
        except (av.error.FFmpegError, OSError) as error:
            raise UserError(
                f"{file}: cannot be decoded ({error}); to measure, leave it out or fetch it again"
            ) from error


def _encode_plainly(file: str, image_size: tuple[int, int]) -> None:
    matcher = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    quality = [cv2.IMWRITE_JPEG_QUALITY, video.JPEG_QUALITY]
    before = None
    with av.open(file) as container:
        for frame in container.decode(video=0):
            image = cv2.resize(frame.to_ndarray(format="bgr24"), image_size, interpolation=cv2.INTER_AREA)
            cv2.imencode(".jpg", image, quality)
            grey = cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
            if before is not None:
                cv2.imencode(".jpg", flow.quantise(matcher.calc(before, grey, None)), quality)
            before = grey


def _measure_flow(benchmark: Benchmark, pairs: list[tuple[np.ndarray, np.ndarray]], repeats: int) -> None:
    """DIS and TV-L1 on the same frame pairs, one thread; TV-L1 on a GPU instead, where there is one, all at once."""
    dis = flow.flow_method("dis")
    on_gpu = flow.runs_on_gpu("tvl1")
    pairs = pairs * (_GPU_BATCH // len(pairs)) if on_gpu else pairs
    stacks = [torch.from_numpy(np.stack(frames)).to("cuda" if on_gpu else "cpu") for frames in zip(*pairs)]
    batch = len(pairs) if on_gpu else 1

    def slow() -> None:
        for before, after in zip(*(stack.split(batch) for stack in stacks)):
            tv_l1(before, after).cpu()

    seconds = in_turn(repeats, dis=lambda: [dis.fields(pair) for pair in pairs], tvl1=slow)
    where = "GPU" if on_gpu else "one thread"
    per_pair = {name: [1e3 * value / len(pairs) for value in values] for name, values in seconds.items()}
    fast = benchmark.add(f"flow dis, one thread, mean of {len(pairs)} pairs", "ms a pair", per_pair["dis"])
    best = benchmark.add(f"flow tvl1, {where}, mean of {len(pairs)} pairs", "ms a pair", per_pair["tvl1"])
    benchmark.compare("flow tvl1 / dis", best, fast)


def moving_pairs(image_size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Grey frame pairs of a textured scene, one of each kind of motion."""
    width, height = image_size
    random = np.random.default_rng(0)
    layers = [
        cv2.resize(random.uniform(0, 255, (height // cell, width // cell)), image_size, interpolation=cv2.INTER_CUBIC)
        for cell in _TEXTURE
    ]
    scene = np.clip(np.average(layers, axis=0, weights=_TEXTURE), 0, 255)
    pairs = []
    for x, y, degrees, scale in _MOTIONS:
        moved = cv2.getRotationMatrix2D((width / 2, height / 2), degrees, scale)
        moved[:, 2] += x, y
        after = cv2.warpAffine(scene, moved, image_size, flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT)
        noisy = (image + random.normal(0, 1, image.shape) for image in (scene, after))
        before, after = (np.clip(np.rint(image), 0, 255).astype(np.uint8) for image in noisy)
        pairs.append((before, after))
    return pairs


def _first_pairs(files: list[str], image_size: tuple[int, int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The first two frames of some clips, grey."""
    pairs = []
    for place in np.linspace(0, len(files) - 1, min(_PAIRS, len(files))).astype(int):
        frames = islice(video.decode(files[place], image_size), 2)
        grey = [cv2.cvtColor(image, cv2.COLOR_BGR2GRAY) for image in frames]
        if len(grey) == 2:
            pairs.append((grey[0], grey[1]))
    return pairs
