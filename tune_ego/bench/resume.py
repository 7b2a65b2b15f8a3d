"""`bench resume`: runs and searches that are killed at random moments, compared with ones that are not."""

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
from tune_ego.results import checkpoint_files, experiment, reading, trial_records
from tune_ego.results.checkpoint_files import CHECKSUM_FILE, is_checkpoint_name
from tune_ego.results.decisions import read_decisions

_CONFIG: dict[str, dict[str, Any]] = {
    "data": {"crop": 32},
    "model": {"width": 0.05, "bn_momentum": 0.1},
    "train": {"batch_size": 4, "validate_every": 4, "log_every": 1},
}
_ITERATIONS_PER_KILL = 12
_MID_WRITE_EVERY = 2
"""Every second kill waits until a checkpoint is half written."""
_POLL_SECONDS = 0.002
_STOPPED_WITHIN = 0.01
"""Seconds after SIGSTOP within which a process has stopped."""
_COMMAND = "from tune_ego.cli import main; main()"


def bench_resume(kills: int = 20, seed: int = 0) -> Benchmark:
    """Kill all processes of `train` with SIGKILL at random moments, and start `train` again until the run finishes.

    Args:
        kills: Number of kills.
        seed: Seed of the random moments.

    Raises:
        UserError: Weights or metrics (except `experiment.TIMES`) differ in a bit from those of a run without kills.
    """
    iterations = _ITERATIONS_PER_KILL * (kills + 1)
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as name:
        folder = Path(name)
        config = {**_CONFIG, "train": {**_CONFIG["train"], "iterations": iterations}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        _make_shards(folder)
        log = folder / "log"
        _run_to_end(log, *_train_arguments(folder, "whole"))
        until_first: list[float] = []
        lost: list[float] = []
        mid_write_kills, saved_lines = 0, list[dict[str, Any]]()
        for kill in range(kills):
            start = time.time()
            process = _start(log, *_train_arguments(folder, "killed"))
            metrics = folder / "killed" / experiment.METRICS_FILE
            _wait(process, functools.partial(_is_newer, metrics, start))
            until_first.append(time.time() - start)
            # Measured speeds included: the lines up to the checkpoint must be the same lines, not repeated ones.
            if experiment.read_metrics(str(folder / "killed"))[: len(saved_lines)] != saved_lines:
                raise UserError("the run did not resume from its last complete checkpoint")
            _run_until_moment(process, folder / "killed", rng, mid_write=kill % _MID_WRITE_EVERY == 0)
            if process.poll() is not None:
                break
            kill_all(process)
            half_written = _is_half_written(folder / "killed", set())
            mid_write_kills += half_written
            logged, saved = _last_logged(folder / "killed"), _last_saved(folder / "killed")
            lost.append(logged - saved)
            lines = experiment.read_metrics(str(folder / "killed"))
            saved_lines = [line for line in lines if line["iteration"] <= saved]
            moment = "while a checkpoint was written" if half_written else f"after iteration {logged}"
            say(f"kill {kill + 1} of {kills}, {moment}; last complete checkpoint: iteration {saved}")
        _run_to_end(log, *_train_arguments(folder, "killed"))
        _compare(folder / "whole", folder / "killed")
    facts = {"kills": len(lost), "iterations": iterations, "of these while a checkpoint was written": mid_write_kills}
    benchmark = Benchmark("resume", {**facts, "weights and metrics": "bit-identical"})
    benchmark.add("from the start of the command to a new iteration", "s", until_first)
    benchmark.add("iterations repeated after a kill", "iterations", lost)
    return benchmark


def _make_shards(folder: Path) -> None:
    """Write shards of 40 synthetic clips to `folder`/shards."""
    with console.capture():
        synthesize(folder / "egtea", verbs=2, nouns=2, clips=40, seconds=0.8, size=(96, 72))
        prepare(str(folder / "egtea"), str(folder / "shards"), Settings((48, 36)))


def _start(log: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start `tune-ego` with the given arguments in a new process, which starts its own Ray cluster."""
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        stdout=log.open("ab"),
        stderr=subprocess.STDOUT,
        env={key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"},
    )


def _run_to_end(log: Path, *arguments: str) -> None:
    """Run `tune-ego` with the given arguments; raises `UserError` with the end of the log where the command fails."""
    if _start(log, *arguments).wait():
        raise UserError(f"tune-ego {arguments[0]} failed: {log.read_text()[-2000:]}")


def _train_arguments(folder: Path, name: str) -> list[str]:
    options = ["--data", str(folder / "shards"), "--storage", str(folder), "--name", name]
    return ["train", str(folder / "config.yaml"), *options]


def _last_logged(run: Path) -> int:
    """Return the last iteration in a run's metrics.jsonl, 0 without a line."""
    lines = experiment.read_metrics(str(run))
    return int(lines[-1]["iteration"]) if lines else 0


def _last_saved(run: Path) -> int:
    """Return the iteration of a run's last complete checkpoint, 0 without a checkpoint."""
    return max(checkpoint_files.checkpoint_iterations(str(run)), default=0)


def _wait(process: subprocess.Popen[bytes], condition: Callable[[], Any]) -> None:
    """Wait until a condition holds or the process has ended."""
    while process.poll() is None and not condition():
        time.sleep(_POLL_SECONDS)


def _is_newer(file: Path, moment: float) -> bool:
    """Return whether a file was modified after a moment, in seconds since the epoch."""
    return file.exists() and file.stat().st_mtime > moment


def _run_until_moment(process: subprocess.Popen[bytes], run: Path, rng: random.Random, mid_write: bool) -> None:
    """Wait for a random number of iterations, and then for a random part of a second.

    With `mid_write`, wait for a half-written checkpoint instead of a part of a second, and stop the processes there.
    """
    target = _last_logged(run) + rng.randrange(_ITERATIONS_PER_KILL // 2)
    _wait(process, lambda: _last_logged(run) >= target)
    if not mid_write:
        time.sleep(rng.uniform(0, 0.5))
        return
    pids, complete = descendants(process.pid), set[str]()  # listed now: that takes longer than writing a checkpoint
    while process.poll() is None:
        if not _is_half_written(run, complete):
            continue  # no sleep: a checkpoint is half written for a short time only
        _signal(reversed(pids), signal.SIGSTOP)
        time.sleep(_STOPPED_WITHIN)
        if _is_half_written(run, complete):
            return
        _signal(pids, signal.SIGCONT)  # the checkpoint was completed before its writer stopped: wait for the next one


def _is_half_written(run: Path, complete: set[str]) -> bool:
    """Return whether a checkpoint of a run is incomplete.

    Args:
        run: Folder of the run.
        complete: Names of checkpoints that need no check; complete ones are added.
    """
    for name in os.listdir(run):
        if is_checkpoint_name(name) and name not in complete:
            if not (run / name / CHECKSUM_FILE).exists():
                return True
            complete.add(name)
    return False


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """Send SIGKILL to a process and all its descendants, as if the machine lost power."""
    _signal(descendants(process.pid), signal.SIGKILL)
    process.wait()


def _signal(pids: Iterable[int], number: signal.Signals) -> None:
    """Send a signal to processes; those that have ended are passed over."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue


def descendants(root: int) -> list[int]:
    """Return the ids of a process and all processes below it, `root` first."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except (FileNotFoundError, ProcessLookupError):  # the process has ended
                continue
            children.setdefault(parent, []).append(int(folder.name))
    pids = [root]
    for pid in pids:  # the list grows while it is read
        pids += children.get(pid, [])
    return pids


def _compare(whole: Path, killed: Path) -> None:
    """Raise `UserError` where two runs differ in their weights, or in metrics other than `experiment.TIMES`."""
    if (whole / checkpoint_files.MODEL_FILE).read_bytes() != (killed / checkpoint_files.MODEL_FILE).read_bytes():
        raise UserError("the weights of the killed run differ from those of the run without kills")
    metrics = [
        [
            {key: value for key, value in line.items() if key not in experiment.TIMES}
            for line in experiment.read_metrics(run)
        ]
        for run in (str(whole), str(killed))
    ]
    if metrics[0] != metrics[1]:
        raise UserError("the metrics of the killed run differ from those of the run without kills")


_SEARCH_SPACE = {
    "base": {**_CONFIG, "train": {**_CONFIG["train"], "iterations": 96, "validate_every": 8}},
    "space": {
        "optimizer.name": {"grid": ["ranger", "sgd"]},
        "optimizer.lr": {"loguniform": [1e-3, 1e-1]},
        "model.stam_depth": {"grid": [0, 1]},
    },
    "samples": 2,
    "scheduler": {"name": "asha", "grace": 8, "reduction": 2},
}
_MOST_DECISIONS_PER_KILL = 7
"""Most decisions of the scheduler between two kills; with 0 the search is killed while it starts."""


def bench_resume_search(kills: int = 5, seed: int = 0) -> Benchmark:
    """Kill a search of 8 trials, one at a time, at random moments, and resume the search until its trials have ended.

    Resumed training is exact to the bit, so each reported accuracy depends on configuration and iteration only. The
    search then has to stop the same trials at the same iterations. With several trials at a time, the order of their
    reports would depend on timing.

    Raises:
        UserError: A decision of ASHA, the state of a trial or the best trial differs from a search without kills.
    """
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as name:
        folder = Path(name)
        (folder / "space.yaml").write_text(yaml.safe_dump(_SEARCH_SPACE))
        _make_shards(folder)
        log, root = folder / "log", folder / "killed"
        options = ["--data", str(folder / "shards"), "--storage", str(folder), "--concurrent", "1", "--seed", str(seed)]
        tune = ["tune", str(folder / "space.yaml"), *options, "--name"]
        _run_to_end(log, *tune, "whole")
        command, killed_times = [*tune, "killed"], 0

        def count_decisions() -> int:
            return len(read_decisions(str(root)))

        for _ in range(kills):
            start = time.time()
            process = _start(log, *command)
            _wait(process, functools.partial(_is_newer, root / trial_records.TRIALS_FILE, start))
            target = count_decisions() + rng.randint(0, _MOST_DECISIONS_PER_KILL)
            _wait(process, lambda target=target: count_decisions() >= target)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 1))
            if process.poll() is not None:
                break
            kill_all(process)
            killed_times += 1
            command = ["resume", str(root)]
            states = [trial.state for trial in reading.read_experiment(str(root)).trials]
            interrupted = states.count("interrupted")
            say(f"kill {killed_times} of {kills}, after {count_decisions()} decisions; {interrupted} trial interrupted")
        _run_to_end(log, "resume", str(root))
        whole, killed = (_history(folder / name) for name in ("whole", "killed"))
        if whole != killed:
            raise UserError(f"the killed search differs: {killed}; without kills: {whole}")
    stopped = sum(state == "stopped" for state in whole["states"])
    facts = {"trials": len(whole["states"]), "stopped": stopped, "kills": killed_times}
    return Benchmark("resume-search", {**facts, "stopped trials, iterations and the best": "the same"})


def _history(root: Path) -> dict[str, Any]:
    """Return the facts that must be equal in the two searches."""
    search = reading.read_experiment(str(root))
    return {
        "states": [trial.state for trial in search.trials],
        "decisions": [decision[1:] for decision in read_decisions(str(root))],
        "best": (search.best.id, search.best.accuracy),
        "learning rates": [trial.config.optimizer.lr for trial in search.trials],
    }
