"""`bench resume`: runs killed at random moments end as one that was not, and what each kill costs."""

from __future__ import annotations

import functools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from tune_ego.bench.record import Benchmark
from tune_ego.console import console, say
from tune_ego.dataset.prepare import Settings, prepare
from tune_ego.dataset.synthetic import synthesize
from tune_ego.errors import UserError
from tune_ego.results import checkpoint_files, experiment
from tune_ego.results.checkpoint_files import CHECKSUM_FILE, is_checkpoint_name

_CONFIG: dict[str, dict[str, Any]] = {
    "data": {"crop": 32},
    "model": {"width": 0.05, "bn_momentum": 0.1},
    "train": {"batch_size": 4, "validate_every": 4, "log_every": 1},
}
_ITERATIONS_A_KILL = 12
_IN_WRITING = 2
"""Every so many kills, one waits for the moment when a checkpoint is half written."""
_LOOK_EVERY = 0.002  # seconds
_COMMAND = "from tune_ego.cli import main; main()"


def bench_resume(kills: int = 20, seed: int = 0) -> Benchmark:
    """Kill all processes of `train` with SIGKILL, at random moments, and start it again until it ends.

    Raises `UserError` where weights or metrics differ in one bit from those of a run that was left alone.
    """
    iterations = _ITERATIONS_A_KILL * (kills + 1)
    rng = random.Random(seed)
    benchmark = Benchmark("resume", {"kills": kills, "iterations": iterations})
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as name:
        folder = Path(name)
        config = {**_CONFIG, "train": {**_CONFIG["train"], "iterations": iterations}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        _make_shards(folder)
        log = folder / "log"
        _to_the_end(log, *_train(folder, "whole"))
        until_first: list[float] = []
        lost: list[float] = []
        in_writing, kept = 0, list[dict[str, Any]]()
        for kill in range(kills):
            start = time.time()
            process = _start(log, *_train(folder, "killed"))
            metrics = folder / "killed" / experiment.METRICS_FILE
            _wait(process, functools.partial(_is_newer, metrics, start))
            until_first.append(time.time() - start)
            if experiment.read_metrics(str(folder / "killed"))[: len(kept)] != kept:  # their speeds too
                raise UserError("the run did not go on from its last whole checkpoint")
            _let_it_run(process, folder / "killed", rng, in_writing=kill % _IN_WRITING == 0)
            kill_all(process)
            caught = _is_half_written(folder / "killed", set())
            in_writing += caught
            done, saved = _last_logged(folder / "killed"), _last_saved(folder / "killed")
            lost.append(done - saved)
            kept = [line for line in experiment.read_metrics(str(folder / "killed")) if line["iteration"] <= saved]
            where = "while a checkpoint was written" if caught else f"after iteration {done}"
            say(f"kill {kill + 1} of {kills}, {where}; the last whole checkpoint is of iteration {saved}")
        _to_the_end(log, *_train(folder, "killed"))
        _compare(folder / "whole", folder / "killed")
    benchmark.about |= {"of these while a checkpoint was written": in_writing, "weights and metrics": "bit-identical"}
    benchmark.add("from the start of the command to a new iteration", "s", until_first)
    benchmark.add("iterations to do again after a kill", "iterations", lost)
    return benchmark


def _make_shards(folder: Path) -> None:
    with console.capture():
        synthesize(folder / "egtea", verbs=2, nouns=2, clips=40, seconds=0.8, size=(96, 72))
        prepare(str(folder / "egtea"), str(folder / "shards"), Settings((48, 36)))


def _start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """`tune-ego` with these arguments, in a process and with a Ray cluster of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )


def _to_the_end(log: Path, *arguments: str) -> None:
    if _start(log, *arguments).wait():
        raise UserError(f"{arguments[0]} failed: {log.read_text()[-2000:]}")


def _train(folder: Path, name: str) -> list[str]:
    where = ["--data", str(folder / "shards"), "--storage", str(folder), "--name", name]
    return ["train", str(folder / "config.yaml"), *where]


def _last_logged(run: Path) -> int:
    lines = experiment.read_metrics(str(run))
    return int(lines[-1]["iteration"]) if lines else 0


def _last_saved(run: Path) -> int:
    return max(checkpoint_files.checkpoint_iterations(str(run)), default=0)


def _wait(process: subprocess.Popen[bytes], moment: Callable[[], Any]) -> None:
    while process.poll() is None and not moment():
        time.sleep(_LOOK_EVERY)


def _is_newer(file: Path, moment: float) -> bool:
    return file.exists() and file.stat().st_mtime > moment


def _let_it_run(process: subprocess.Popen[bytes], run: Path, rng: random.Random, in_writing: bool) -> None:
    """Wait for some iterations and a part of one; with `in_writing`, then for a half-written checkpoint, and kill."""
    target = _last_logged(run) + rng.randrange(_ITERATIONS_A_KILL // 2)
    _wait(process, lambda: _last_logged(run) >= target)
    if not in_writing:
        time.sleep(rng.uniform(0, 0.5))
        return
    pids, whole = descendants(process.pid), set[str]()  # found out now: it takes longer than the writing
    while process.poll() is None and not _is_half_written(run, whole):
        pass  # the moment is short
    _kill(reversed(pids))


def _is_half_written(run: Path, whole: set[str]) -> bool:
    """Whether a checkpoint is begun and not whole; `whole`, and added to it, are the names of those that are."""
    for name in os.listdir(run):
        if is_checkpoint_name(name) and name not in whole:
            if not (run / name / CHECKSUM_FILE).exists():
                return True
            whole.add(name)
    return False


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL to a process and all its descendants, as when the machine loses power."""
    _kill(descendants(process.pid))
    process.wait()


def _kill(pids: Iterable[int]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def descendants(root: int) -> list[int]:
    """Process ids, `root` first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # it ended
                continue
            children.setdefault(parent, []).append(int(folder.name))
    found = [root]
    for pid in found:
        found += children.get(pid, [])
    return found


def _compare(whole: Path, killed: Path) -> None:
    if (whole / checkpoint_files.MODEL_FILE).read_bytes() != (killed / checkpoint_files.MODEL_FILE).read_bytes():
        raise UserError("the weights of the killed run are others than those of the whole one")
    metrics = [
        [
            {key: value for key, value in line.items() if key not in experiment.TIMES}
            for line in experiment.read_metrics(run)
        ]
        for run in (str(whole), str(killed))
    ]
    if metrics[0] != metrics[1]:
        raise UserError("the metrics of the killed run are others than those of the whole one")


_SPACE = {
    "base": {**_CONFIG, "train": {**_CONFIG["train"], "iterations": 96, "validate_every": 8}},
    "space": {
        "optimizer.name": {"grid": ["ranger", "sgd"]},
        "optimizer.lr": {"loguniform": [1e-3, 1e-1]},
        "model.stam_depth": {"grid": [0, 1]},
    },
    "samples": 2,
    "scheduler": {"name": "asha", "grace": 8, "reduction": 2},
}
_MOST_BEFORE_A_KILL = 7
"""Decisions of the scheduler since the last one; with none the search is killed while it starts."""


def bench_resume_search(kills: int = 5, seed: int = 0) -> Benchmark:
    """The same for a search of 8 trials, one at a time: killed, it stops the same trials at the same iterations.

    Training is exact to the bit, so what the trials report is a function of configuration and iteration. Raises
    `UserError` where a decision of ASHA's, a trial's end or the best trial differ.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as name:
        folder = Path(name)
        (folder / "space.yaml").write_text(yaml.safe_dump(_SPACE))
        _make_shards(folder)
        log, root = folder / "log", folder / "killed"
        where = ["--data", str(folder / "shards"), "--storage", str(folder), "--concurrent", "1", "--seed", str(seed)]
        tune = ["tune", str(folder / "space.yaml"), *where, "--name"]
        _to_the_end(log, *tune, "whole")
        command, done = [*tune, "killed"], 0

        def decided() -> int:
            return len(experiment.read_decisions(str(root)))

        for _ in range(kills):
            start = time.time()
            process = _start(log, *command)
            _wait(process, functools.partial(_is_newer, root / experiment.TRIALS_FILE, start))
            target = decided() + rng.randint(0, _MOST_BEFORE_A_KILL)
            _wait(process, lambda target=target: decided() >= target)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 1))
            if process.poll() is not None:
                break
            kill_all(process)
            done += 1
            command = ["resume", str(root)]
            states = [trial.state for trial in experiment.read_experiment(str(root)).trials]
            running = states.count("interrupted")
            say(f"kill {done} of {kills}, after {decided()} decisions, {running} trial running")
        _to_the_end(log, "resume", str(root))
        whole, killed = (_history(folder / name) for name in ("whole", "killed"))
        if whole != killed:
            raise UserError(f"the killed search is another: {killed}, and left alone {whole}")
    stopped = sum(state == "stopped" for state in whole["states"])
    about = {"trials": len(whole["states"]), "stopped": stopped, "kills": done}
    return Benchmark("resume-search", {**about, "stopped trials, iterations and the best": "the same"})


def _history(root: Path) -> dict[str, Any]:
    """What must not differ."""
    found = experiment.read_experiment(str(root))
    return {
        "states": [trial.state for trial in found.trials],
        "decisions": [decision[1:] for decision in experiment.read_decisions(str(root))],
        "best": (found.best.id, found.best.accuracy),
        "learning rates": [trial.config.optimizer.lr for trial in found.trials],
    }
