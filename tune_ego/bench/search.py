"""`bench search`: the scheduler of `tune` on simulated learning curves, beside running every trial to its end."""

from __future__ import annotations

import heapq
import math
import random
import tempfile
import time
from statistics import mean
from types import SimpleNamespace
from typing import NamedTuple

from tune_ego.bench.record import Benchmark
from tune_ego.results.experiment import METRIC
from tune_ego.results.trial_records import trial_name
from tune_ego.search_space import SearchSpace
from tune_ego.space_io import parse_space

_STUB_SPACE = """
base: {train: {iterations: 3000, validate_every: 100}}
space: {optimizer.lr: {loguniform: [1e-4, 1e-1]}}
scheduler: {name: asha, grace: 100, reduction: 3}
"""
_CONCURRENT = 16
"""Trials that run at the same time."""


class Curve(NamedTuple):
    """Learning curve of a simulated trial: accuracy = top * t / (t + half) + noise, t in iterations."""

    top: float
    half: float
    seed: int

    def at(self, iteration: int) -> float:
        """Return the validation mean class accuracy at an iteration; the noise has a standard deviation of 0.01."""
        noise = random.Random(self.seed * 100_003 + iteration).gauss(0, 0.01)
        return self.top * iteration / (iteration + self.half) + noise


class Outcome(NamedTuple):
    """Result of a simulated search."""

    iterations: int
    """Iterations of all trials."""
    best: float
    """Highest accuracy that a trial reported."""
    seconds: float
    """Time spent in the scheduler."""
    reports: int
    """Validations reported to the scheduler."""


def draw_curves(trials: int, seed: int) -> list[Curve]:
    """Draw random learning curves: tops in [0, 0.6], halves log-uniform in [50, 500] iterations."""
    rng = random.Random(seed)
    return [
        Curve(0.6 * rng.betavariate(2, 3), 50 * math.exp(rng.uniform(0, math.log(10))), rng.randrange(1 << 30))
        for _ in range(trials)
    ]


def run_asha(space: SearchSpace, curves: list[Curve], root: str) -> Outcome:
    """Run simulated trials through the scheduler of `tune`, `_CONCURRENT` at a time, all at the same speed.

    Args:
        space: Search space with budget, validation interval and scheduler.
        curves: Learning curve of each trial.
        root: Folder for the scheduler's records.
    """
    # Late: the scheduler imports Ray, which `draw_curves` and `run_fifo` do without.
    from tune_ego.search.scheduler import RecordedScheduler

    config = space.config(next(space.draws()))
    step, budget = config.train.validate_every, config.train.iterations
    scheduler = RecordedScheduler(root, space, budget)
    scheduler.set_search_properties(METRIC, "max")
    waiting = list(reversed(range(len(curves))))
    running: list[tuple[int, int, int]] = []  # (time, number, iteration)
    spent, best, seconds, reports = 0, 0.0, 0.0, 0
    now = 0
    while waiting or running:
        while waiting and len(running) < _CONCURRENT:
            number = waiting.pop()
            heapq.heappush(running, (now + step, number, step))
        now, number, iteration = heapq.heappop(running)
        accuracy = curves[number].at(iteration)
        trial = SimpleNamespace(config={"trial": trial_name(number, 0, 1)})
        result = {"iteration": iteration, METRIC: accuracy}
        start = time.perf_counter()
        action = scheduler.on_trial_result(None, trial, result)
        seconds += time.perf_counter() - start
        reports, spent, best = reports + 1, spent + step, max(best, accuracy)
        if action != "STOP" and iteration < budget:
            heapq.heappush(running, (now + step, number, iteration + step))
    return Outcome(spent, best, seconds, reports)


def run_fifo(space: SearchSpace, curves: list[Curve]) -> Outcome:
    """Return the outcome of a search that runs every trial to its end."""
    config = space.config(next(space.draws()))
    step, budget = config.train.validate_every, config.train.iterations
    validations = range(step, budget + 1, step)
    best = max(curve.at(iteration) for curve in curves for iteration in validations)
    return Outcome(budget * len(curves), best, 0.0, len(validations) * len(curves))


def bench_search(trials: int = 1000, seeds: int = 20) -> Benchmark:
    """Measure ASHA beside running every trial to its end: `seeds` searches of `trials` simulated trials each."""
    space = parse_space(_STUB_SPACE, "bench", {})
    benchmark = Benchmark("search", {"trials": trials, "seeds": seeds, "budget": "3,000 iterations", "reduction": 3})
    shares, bests, costs, fewer = [], [], [], []
    for seed in range(seeds):
        curves = draw_curves(trials, seed)
        with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as root:
            asha = run_asha(space, curves, root)
        with tempfile.TemporaryDirectory(prefix="tune-ego-bench-") as root:
            small = run_asha(space, curves[: trials // 4], root)
        fifo = run_fifo(space, curves)
        shares.append(asha.iterations / fifo.iterations)
        bests.append(asha.best / fifo.best)
        costs.append(1e3 * asha.seconds / asha.reports)
        fewer.append(1e3 * small.seconds / small.reports)
    benchmark.add("iterations, ASHA / all to the end", "", shares)
    benchmark.add("best accuracy, ASHA / all to the end", "", bests)
    many = benchmark.add(f"scheduling a report, {trials:,} trials", "ms", costs)
    few = benchmark.add(f"scheduling a report, {trials // 4:,} trials", "ms", fewer)
    benchmark.compare(f"a report of {trials:,} trials / of {trials // 4:,}", many, few)
    benchmark.facts |= {
        "mean share of iterations": round(mean(shares), 3),
        "mean share of the best": round(mean(bests), 4),
    }
    return benchmark
