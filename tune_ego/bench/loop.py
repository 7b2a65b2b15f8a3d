"""`bench loop`: a whole run on Ray beside its bare step: what feed, reporting and checkpoints cost.

Runs as short as these are not compiled.
"""

from __future__ import annotations

import itertools
import math
import os
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml

from tune_ego import storage
from tune_ego.bench.record import Benchmark, in_turn
from tune_ego.bench.resume import descendants
from tune_ego.bench.step import STEPS_A_REPEAT, Variant, in_a_process, measure, set_up
from tune_ego.cluster import is_local, ray_session
from tune_ego.config import Config, override_config
from tune_ego.console import console, say
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.synthetic import synthesize
from tune_ego.evaluation.evaluate import open_model, score_clips
from tune_ego.feed.sampling import dense_starts
from tune_ego.results import experiment
from tune_ego.results.experiment import METRIC
from tune_ego.runs.final import train_final
from tune_ego.search.tune import start_search
from tune_ego.search_space import load_space

_IMAGE_SIZE = (96, 72)
"""Width and height of the demo's images, pixels."""
_STARTS = 3
"""Trials whose starts are measured."""
_BARE_STEPS = 60
"""Enough to last about as long as a run: the machine's own speed comes and goes."""
_WARM_UP = 4
"""Lines of metrics.jsonl that do not count: the feed is read ahead, and the machine warms up."""
_WAITING = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Processes that a cluster has without trials."""
_SHARED = ("ray::_StatsActor", "ray::_AutoscalingCoordinatorActor", "ray::_QueueActor")
"""Actors of Ray Data and Ray Tune, one of each for all trials."""


def bench_loop(shards: str | None = None, *, iterations: int = 160, repeats: int = 5) -> Benchmark:
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
        say("measuring: the bare step")
        bare.append(config.train.batch_size / _bare_step(config))
        for number in range(repeats):
            say(f"measuring: run {number + 1} of {repeats}, and the bare step after it")
            run = str(Path(folder) / f"run-{number}")
            with console.capture():
                train_final(config, data, run, None)
            bare.append(config.train.batch_size / _bare_step(config))
            lines = experiment.read_metrics(run)[_WARM_UP:]
            loop.append(_speed(lines, config))
            waits.append(median(line[experiment.FEED_WAIT] for line in lines))
            after = [(METRIC in last, line[experiment.REPORT_SECONDS]) for last, line in pairwise(lines)]
            reports.append(1e3 * median(seconds for validated, seconds in after if not validated))
            checkpoints.append(1e3 * median(seconds for validated, seconds in after if validated) - reports[-1])
        starts, memory = _starts(Path(folder), data, config)
        computing = in_a_process(_memory_of_a_step, config)
        say("measuring: dense evaluation, and the training forward")
        forward, dense = _forward_and_evaluation(f"{folder}/run-0", data, config, repeats)
    bare_step = benchmark.add("bare step on data in memory", "clips/s", bare)
    whole = benchmark.add("whole loop on Ray", "clips/s", loop)
    benchmark.compare("whole loop / bare step", whole, bare_step)
    benchmark.add("of the loop, waiting for the feed", "share", waits)
    benchmark.add("writing and reporting a line", "ms", reports)
    benchmark.add("what a checkpoint, written beside training, adds to it", "ms", checkpoints)
    benchmark.add("from a trial's start to its first step", "s", starts)
    if is_local(None):  # processes of a cluster that was there are not seen
        everything, shared = zip(*memory)
        benchmark.add("memory of Ray's working processes, one trial at a time", "GB", [*everything])
        benchmark.add("of that, in actors that all trials share", "GB", [*shared])
        benchmark.add("of that, in the model, its gradients and activations", "GB", [computing])
        rest = [most - others - computing for most, others in memory]
        benchmark.add("what is left, of the trial's own processes", "GB", rest)
    training = benchmark.add("training forward on data in memory", "windows/s", forward)
    tested = benchmark.add("dense evaluation of the test clips", "windows/s", dense)
    benchmark.compare("dense evaluation / training forward", tested, training)
    return benchmark


def _speed(lines: list[dict[str, Any]], config: Config) -> float:
    """Clips/s over all lines, with what reporting them and writing checkpoints took, without validations."""
    clips = len(lines) * config.train.log_every * config.train.batch_size
    training = [config.train.log_every * config.train.batch_size / line["clips_per_second"] for line in lines]
    return clips / (sum(training) + sum(line[experiment.REPORT_SECONDS] for line in lines))


def _starts(folder: Path, data: str, config: Config) -> tuple[list[float], list[tuple[float, float]]]:
    """(seconds from the start of each trial of a small search to its first step, its `_memory_of_ray` at most)."""
    changes = {"train.iterations": 8, "train.validate_every": 8, "train.log_every": 1, "compute.max_failures": 0}
    base = override_config(config, changes, "bench").model_dump(mode="json", exclude={"seed"})
    space = {"base": base, "space": {"seed": {"grid": [*range(_STARTS)]}}, "scheduler": {"name": "fifo"}}
    (folder / "starts.yaml").write_text(yaml.safe_dump(space))
    root, ended = folder / "starts", threading.Event()
    began: dict[str, float] = {}
    stepped: dict[str, float] = {}
    memory: dict[str, tuple[float, float]] = {}

    def watch() -> None:
        for look in itertools.count():
            if ended.wait(0.05):
                return
            for name, record in experiment.read_records(str(root)).items():
                if record["state"] == "running":
                    began.setdefault(name, time.monotonic())
                    if look % 20 == 0 or name not in memory:  # it takes a while
                        memory[name] = max(memory.get(name, (0.0, 0.0)), _memory_of_ray(os.getpid()))
                if (Path(experiment.run_folder(str(root), name)) / experiment.METRICS_FILE).exists():
                    stepped.setdefault(name, time.monotonic())

    say(f"measuring: the starts of {_STARTS} trials, one at a time")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with console.capture():
            start_search(str(folder / "starts.yaml"), data, str(root), {}, 0, 1, None)
    finally:
        ended.set()
        thread.join()
    return [stepped[name] - began[name] for name in stepped if name in began], list(memory.values())


def _forward_and_evaluation(run: str, data: str, config: Config, repeats: int) -> tuple[list[float], list[float]]:
    """Windows/s, measured in turn: forward passes as in training, and `evaluate` on the test clips, read from disk."""
    opened = open_model(run, data)
    clips = opened.shards.test(config.data.split)
    windows = sum(len(dense_starts(clip.frames)) for clip in clips)
    trainer, batch, _ = set_up(Variant(), config)
    passes = max(1, windows // config.micro_batch)

    def forward() -> None:
        trainer.model.train()
        for _ in range(passes):
            trainer.forward(trainer.model, batch, dict.fromkeys(config.stream_names, 0))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()

    def dense() -> None:
        with console.capture():
            score_clips(opened.model, opened.config, clips, opened.shards)

    seconds = in_turn(repeats, forward=forward, dense=dense)
    return (
        [passes * config.micro_batch / value for value in seconds["forward"]],
        [windows / value for value in seconds["dense"]],
    )


def _memory_of_ray(driver: int) -> tuple[float, float]:
    """GB of (all working processes of the cluster that process `driver` has started, those of `_SHARED` among them)."""
    total = shared = 0.0
    for pid in descendants(driver):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            if name.startswith("ray::") and not name.startswith(_WAITING):
                total += (memory := _memory_of(pid))
                shared += memory if name.startswith(_SHARED) else 0
        except (OSError, StopIteration):  # it has ended
            continue
    return total, shared


def _memory_of(pid: int) -> float:
    """GB of a process; a page that n processes share counts 1/n in each."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024 / 1e9


def _memory_of_a_step(config: Config) -> float:
    """GB that this process grows by with the model, its optimizer, a batch and steps on it."""
    before = _memory_of(os.getpid())
    trainer, batch, _ = set_up(Variant(threads=math.ceil(config.compute.cpus_per_worker)), config)
    for _ in range(3):
        trainer.step(iter([batch] * config.passes))
    return _memory_of(os.getpid()) - before


def _synthetic(folder: Path) -> str:
    data = str(folder / "shards")
    with console.capture():
        synthesize(str(folder / "egtea"), clips=120, seconds=1.2, size=(128, 96))
        prepare(str(folder / "egtea"), data, Settings(_IMAGE_SIZE))
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
    on_gpu = torch.cuda.is_available()
    threads = 0 if on_gpu else math.ceil(config.compute.cpus_per_worker)
    repeats = _BARE_STEPS // STEPS_A_REPEAT["cuda" if on_gpu else "cpu"]
    seconds: list[float] = in_a_process(measure, Variant(threads=threads), repeats, config).seconds
    return median(seconds)
