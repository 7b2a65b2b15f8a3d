"""`bench loop`: a whole run on Ray beside its bare training step, for the cost of feed, reporting and checkpoints.

Models are not compiled in runs as short as these.
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
from tune_ego.bench.record import Benchmark, time_in_turn
from tune_ego.bench.resume import descendants
from tune_ego.bench.step import STEPS_PER_REPEAT, Variant, measure, run_in_process, set_up
from tune_ego.cluster import is_local, ray_session
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.console import console, say
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.shards import open_shards
from tune_ego.dataset.synthetic import synthesize
from tune_ego.evaluation.evaluate import open_model, score_clips
from tune_ego.feed.sampling import dense_starts
from tune_ego.results import experiment, trial_records
from tune_ego.results.experiment import METRIC
from tune_ego.runs.final import train_final
from tune_ego.search.tune import start_search
from tune_ego.space_io import load_space

_IMAGE_SIZE = (96, 72)
"""Width and height of the demo's images, pixels."""
_TIMED_STARTS = 3
"""Trials whose start is timed."""
_BARE_STEPS = 60
"""Steps that last about as long as a run: the speed of the machine varies over such times."""
_WARM_UP_LINES = 4
"""First lines of metrics.jsonl, which are not timed: their batches were read ahead, and the machine warms up."""
_IDLE_PROCESSES = ("ray::IDLE", "ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Names of processes that a Ray cluster has without trials."""
_SHARED_ACTORS = ("ray::_StatsActor", "ray::_AutoscalingCoordinatorActor", "ray::_QueueActor")
"""Names of the actors of Ray Data and Ray Tune that all trials share."""


def bench_loop(shards: str | None = None, *, iterations: int = 160, repeats: int = 5) -> Benchmark:
    """Measure whole runs, the starts of trials, memory and dense evaluation.

    Args:
        shards: Folder or URI of shards, for the default configuration; None: synthetic shards, for the demo's.
        iterations: Iterations of each run.
        repeats: Number of runs.
    """
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as folder, ray_session():
        data = storage.absolute(shards) if shards else _synthetic_shards(Path(folder))
        config = _run_config(full=shards is not None, iterations=iterations)
        benchmark = Benchmark(
            "loop", {"iterations": iterations, "batch": config.train.batch_size, **_model_facts(config)}
        )
        benchmark.facts["clips"] = len(open_shards(data).table)
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
            lines = experiment.read_metrics(run)[_WARM_UP_LINES:]
            loop.append(_speed(lines, config))
            waits.append(median(line[experiment.FEED_WAIT] for line in lines))
            # A line holds the report time of the line before, which has a checkpoint where it has a validation.
            report_times = [(METRIC in last, line[experiment.REPORT_SECONDS]) for last, line in pairwise(lines)]
            reports.append(1e3 * median(seconds for validated, seconds in report_times if not validated))
            validated_report = 1e3 * median(seconds for validated, seconds in report_times if validated)
            checkpoints.append(validated_report - reports[-1])
        starts, memory = _time_starts(Path(folder), data, config)
        model_memory = run_in_process(_memory_of_a_step, config)
        say("measuring: dense evaluation, and the training forward")
        forward, dense = _forward_and_evaluation(f"{folder}/run-0", data, config, repeats)
    bare_step = benchmark.add("bare step on data in memory", "clips/s", bare)
    whole = benchmark.add("whole loop on Ray", "clips/s", loop)
    benchmark.compare("whole loop / bare step", whole, bare_step)
    benchmark.add("share of the loop's time spent waiting for the feed", "share", waits)
    benchmark.add("writing and reporting a line", "ms", reports)
    benchmark.add("additional time where a checkpoint is written in the background", "ms", checkpoints)
    benchmark.add("from a trial's start to its first step", "s", starts)
    if is_local(None):  # /proc does not show the processes of a cluster on other machines
        total, shared = zip(*memory)
        benchmark.add("memory of Ray's working processes, one trial at a time", "GB", [*total])
        benchmark.add("of that, actors that all trials share", "GB", [*shared])
        benchmark.add("of that, the model, its gradients and activations", "GB", [model_memory])
        rest = [most - others - model_memory for most, others in memory]
        benchmark.add("of that, the rest of the trial's processes", "GB", rest)
    training = benchmark.add("training forward on data in memory", "windows/s", forward)
    tested = benchmark.add("dense evaluation of the test clips", "windows/s", dense)
    benchmark.compare("dense evaluation / training forward", tested, training)
    return benchmark


def _speed(lines: list[dict[str, Any]], config: Config) -> float:
    """Return the clips/s over all lines; report and checkpoint times are included, validations are not."""
    clips = len(lines) * config.train.log_every * config.train.batch_size
    training = [config.train.log_every * config.train.batch_size / line["clips_per_second"] for line in lines]
    return clips / (sum(training) + sum(line[experiment.REPORT_SECONDS] for line in lines))


def _time_starts(folder: Path, data: str, config: Config) -> tuple[list[float], list[tuple[float, float]]]:
    """Run a small search, one trial at a time.

    Returns:
        Seconds from the start of each trial to its first logged step, and the highest `_memory_of_ray` of each trial.
    """
    changes = {"train.iterations": 8, "train.validate_every": 8, "train.log_every": 1, "compute.max_failures": 0}
    base = override_config(config, changes, "bench").model_dump(mode="json", exclude={"seed"})
    space = {"base": base, "space": {"seed": {"grid": [*range(_TIMED_STARTS)]}}, "scheduler": {"name": "fifo"}}
    (folder / "starts.yaml").write_text(yaml.safe_dump(space))
    root, ended = folder / "starts", threading.Event()
    start_times: dict[str, float] = {}
    step_times: dict[str, float] = {}
    memory: dict[str, tuple[float, float]] = {}

    def watch() -> None:
        for poll in itertools.count():
            if ended.wait(0.05):
                return
            for name, record in trial_records.read_records(str(root)).items():
                if record["state"] == "running":
                    start_times.setdefault(name, time.monotonic())
                    if poll % 20 == 0 or name not in memory:  # reading /proc is slow
                        memory[name] = max(memory.get(name, (0.0, 0.0)), _memory_of_ray(os.getpid()))
                if (Path(trial_records.run_folder(str(root), name)) / experiment.METRICS_FILE).exists():
                    step_times.setdefault(name, time.monotonic())

    say(f"measuring: the starts of {_TIMED_STARTS} trials, one at a time")
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        with console.capture():
            start_search(str(folder / "starts.yaml"), data, str(root), {}, 0, 1, None)
    finally:
        ended.set()
        thread.join()
    return [step_times[name] - start_times[name] for name in step_times if name in start_times], list(memory.values())


def _forward_and_evaluation(run: str, data: str, config: Config, repeats: int) -> tuple[list[float], list[float]]:
    """Return the windows/s of forward passes in training mode, and of `evaluate` on the test clips, read from disk.

    The two are measured in alternation.
    """
    opened = open_model(run, data)
    clips = opened.shards.test(config.data.split)
    windows = sum(len(dense_starts(clip.frames)) for clip in clips)
    trainer, batch, _ = set_up(Variant(), config)
    passes = max(1, windows // config.micro_batch)

    def forward() -> None:
        trainer.model.train()
        for _ in range(passes):
            trainer.forward(trainer.model, batch.model_input(), dict.fromkeys(config.stream_names, 0))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()

    def evaluate() -> None:
        with console.capture():
            score_clips(opened.model, opened.config, clips, opened.shards)

    seconds = time_in_turn(repeats, forward=forward, evaluate=evaluate)
    return (
        [passes * config.micro_batch / value for value in seconds["forward"]],
        [windows / value for value in seconds["evaluate"]],
    )


def _memory_of_ray(driver: int) -> tuple[float, float]:
    """Return the GB of all working processes of the cluster that process `driver` started, and of `_SHARED_ACTORS`."""
    total = shared = 0.0
    for pid in descendants(driver):
        try:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode()
            if name.startswith("ray::") and not name.startswith(_IDLE_PROCESSES):
                total += (memory := _memory_of(pid))
                shared += memory if name.startswith(_SHARED_ACTORS) else 0
        except (OSError, StopIteration):  # the process has ended
            continue
    return total, shared


def _memory_of(pid: int) -> float:
    """Return the GB of a process; a page that n processes share counts 1/n in each (proportional set size)."""
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) * 1024 / 1e9


def _memory_of_a_step(config: Config) -> float:
    """Return the GB by which this process grows with a model, its optimizer, a batch and three steps."""
    before = _memory_of(os.getpid())
    trainer, batch, _ = set_up(Variant(threads=math.ceil(config.compute.cpus_per_worker)), config)
    for _ in range(3):
        trainer.step(iter([batch] * config.passes))
    return _memory_of(os.getpid()) - before


def _synthetic_shards(folder: Path) -> str:
    """Write shards of synthetic clips at the demo's image size; return their folder."""
    data = str(folder / "shards")
    with console.capture():
        synthesize(str(folder / "egtea"), clips=120, seconds=1.2, size=(128, 96))
        prepare(str(folder / "egtea"), data, Settings(_IMAGE_SIZE))
    return data


def _run_config(full: bool, iterations: int) -> Config:
    """Return the configuration of one run, validated in its middle and at its end.

    Args:
        full: Whether to use the default configuration instead of the demo's.
        iterations: Iterations of the run.
    """
    changes: dict[str, Any] = {
        "train.iterations": iterations,
        "train.validate_every": iterations // 2,
        "train.log_every": max(1, iterations // 20),
    }
    base = Config() if full else _demo_config()
    return override_config(base, changes, "bench")


def _demo_config() -> Config:
    """Return the configuration of the demo's first trial, with the threads of its final run."""
    space = load_space("demo")
    config = space.config(next(space.draws()))
    return override_config(config, {"compute.cpus_per_worker": 1.5}, "demo")


def _model_facts(config: Config) -> dict[str, Any]:
    return {"crop": config.data.crop, "width": config.model.width, "optimizer": config.optimizer.name}


def _bare_step(config: Config) -> float:
    """Return the seconds of a training step of `config` on one batch in memory, with the threads of a worker."""
    on_gpu = torch.cuda.is_available()
    threads = 0 if on_gpu else math.ceil(config.compute.cpus_per_worker)
    repeats = _BARE_STEPS // STEPS_PER_REPEAT["cuda" if on_gpu else "cpu"]
    seconds: list[float] = run_in_process(measure, Variant(threads=threads), repeats, config).seconds
    return median(seconds)
