"""`bench loop`: a whole run on Ray beside its bare step: what feed, reporting and checkpoints cost."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch

from tune_ego import experiment, storage
from tune_ego.bench.record import Benchmark
from tune_ego.bench.step import Variant, in_a_process, measure
from tune_ego.cluster import ray_session
from tune_ego.config import Config, override_config
from tune_ego.console import console, say
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.synthetic import synthesize
from tune_ego.demo import IMAGE_SIZE
from tune_ego.final import train_final
from tune_ego.search_space import load_space

_WARM_UP = 4
"""Lines of metrics.jsonl that do not count: the feed is read ahead, and the machine warms up."""


def bench_loop(shards: str | None = None, *, iterations: int = 160, repeats: int = 3) -> Benchmark:
    """Train at the demo's size on synthetic clips made for it; given shards, at full size on those."""
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as folder, ray_session():
        data = storage.absolute(shards) if shards else _synthetic(Path(folder))
        config = _config(full=shards is not None, iterations=iterations)
        benchmark = Benchmark("loop", {"iterations": iterations, "batch": config.train.batch_size, **_size(config)})
        benchmark.about["clips"] = len(open_shards(data).table)
        loop: list[float] = []
        bare: list[float] = []
        waits: list[float] = []
        reports: list[float] = []
        checkpoints: list[float] = []
        for number in range(repeats):
            say(f"measuring: run {number + 1} of {repeats}, and its bare step")
            bare.append(config.train.batch_size / _bare_step(config))
            run = str(Path(folder) / f"run-{number}")
            with console.capture():
                train_final(config, data, run, None)
            lines = experiment.read_metrics(run)[_WARM_UP:]
            loop.append(median(line["clips_per_second"] for line in lines))
            waits.append(median(line[experiment.FEED_WAIT] for line in lines))
            reports.append(1e3 * median(line[experiment.REPORT_SECONDS] for line in lines))
            checkpoints.append(1e3 * max(line[experiment.REPORT_SECONDS] for line in lines))
    bare_step = benchmark.add("bare step on data in memory", "clips/s", bare)
    whole = benchmark.add("whole loop on Ray", "clips/s", loop)
    benchmark.compare("whole loop / bare step", whole, bare_step)
    benchmark.add("of the loop, waiting for the feed", "share", waits)
    benchmark.add("writing and reporting a line", "ms", reports)
    benchmark.add("the same with a validation and a checkpoint", "ms", checkpoints)
    return benchmark


def _synthetic(folder: Path) -> str:
    data = str(folder / "shards")
    with console.capture():
        synthesize(str(folder / "egtea"), clips=120, seconds=1.2, size=(128, 96))
        prepare(str(folder / "egtea"), data, Settings(IMAGE_SIZE))
    return data


def _config(full: bool, iterations: int) -> Config:
    """Of one run, validated in its middle and at its end."""
    changes: dict[str, Any] = {
        "train.iterations": iterations,
        "train.validate_every": iterations // 2,
        "train.log_every": max(1, iterations // 20),
    }
    base = Config() if full else _demo_config()
    return override_config(base, changes, "bench")


def _demo_config() -> Config:
    space = load_space("demo")
    return space.config(next(space.draws()))


def _size(config: Config) -> dict[str, Any]:
    return {"crop": config.data.crop, "width": config.model.width, "optimizer": config.optimizer.name}


def _bare_step(config: Config) -> float:
    """Seconds of the step of `config`, as its worker takes it, on one batch that is in memory."""
    threads = 0 if torch.cuda.is_available() else math.ceil(config.compute.cpus_per_worker)
    seconds: list[float] = in_a_process(measure, Variant(threads=threads), 20, config).seconds
    return median(seconds)
