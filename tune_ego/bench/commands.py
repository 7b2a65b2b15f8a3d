"""The commands `tune-ego bench ...`; what they run is imported inside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from tune_ego.console import say

if TYPE_CHECKING:
    from tune_ego.bench.record import Benchmark

KILLS, SEARCH_KILLS = 20, 5
SEARCH_TRIALS, SEARCH_SEEDS = 1000, 20

bench = typer.Typer(
    no_args_is_help=True, help="Measure on this machine: speeds beside their yardsticks, as a table and JSON."
)
Record = Annotated[Optional[str], typer.Option("--out", help="JSON file to write, or URI.")]
Shards = Annotated[Optional[str], typer.Argument(help="Shards to measure on; else synthetic ones are made.")]


def _tell(benchmark: Benchmark, out: str | None) -> None:
    benchmark.show()
    if out is not None:
        benchmark.write(out)
        say(f"written to {out}")


@bench.command("feed")
def bench_feed(shards: Shards = None, out: Record = None) -> None:
    """Reading windows against a bare loop of decoding, on one core, and what the whole feed gives through Ray.

    Writes temporary files only, and --out. On two CPU cores about 4 minutes; nothing else should run.
    """
    from tune_ego.bench.feed import bench_feed as run

    _tell(run(shards), out)


@bench.command("step")
def bench_step(
    side: Annotated[int, typer.Option(min=32, help="Of the crop, pixels.")] = 224,
    batch: Annotated[Optional[int], typer.Option(min=1, help="Clips; else 24 on a GPU, 2 on a CPU.")] = None,
    repeats: Annotated[int, typer.Option(min=1)] = 5,
    out: Record = None,
) -> None:
    """Forward, backward and optimizer on data in memory, by stream, precision, layout and compilation.

    On the GPU, where there is one. Each beside the machine's rate of matrix products, and the straightforward version
    beside ours. On two CPU cores about 2 minutes.
    """
    from tune_ego.bench.step import bench_step as run

    _tell(run(side, batch, repeats, keep=lambda benchmark: benchmark.write(out) if out else None), out)


@bench.command("loop")
def bench_loop(
    shards: Shards = None,
    iterations: Annotated[int, typer.Option(min=40, help="Of each run.")] = 160,
    repeats: Annotated[int, typer.Option(min=1, help="Runs.")] = 5,
    out: Record = None,
) -> None:
    """A whole run on Ray against its bare step on data in memory: what feed, reporting and checkpoints cost.

    On synthetic clips at the demo's size; on shards that are given, at full size. Writes temporary files only, and
    --out. On two CPU cores about 10 minutes; nothing else should run.
    """
    from tune_ego.bench.loop import bench_loop as run

    _tell(run(shards, iterations=iterations, repeats=repeats), out)


@bench.command("all")
def bench_all(
    out: Annotated[Optional[str], typer.Option(help="Folder, or URI, for a JSON file of each.")] = None,
) -> None:
    """Every benchmark, one after another, each for as long as its own help says."""
    from tune_ego.bench.feed import bench_feed as feed
    from tune_ego.bench.loop import bench_loop as loop
    from tune_ego.bench.prepare import bench_prepare as prepare
    from tune_ego.bench.resume import bench_resume, bench_resume_search
    from tune_ego.bench.search import bench_search as search
    from tune_ego.bench.step import bench_step as step

    bodies: dict[str, Callable[[], Benchmark]] = {
        "step": step,
        "feed": feed,
        "loop": loop,
        "search": lambda: search(SEARCH_TRIALS, SEARCH_SEEDS),
        "prepare": prepare,
        "resume": lambda: bench_resume(KILLS, 0),
        "resume-search": lambda: bench_resume_search(SEARCH_KILLS, 0),
    }
    for name, body in bodies.items():
        _tell(body(), f"{out}/{name}.json" if out is not None else None)


@bench.command("prepare")
def bench_prepare(
    egtea: Annotated[
        Optional[str], typer.Argument(help="EGTEA folder to measure on; else synthetic clips, 640 x 480, are made.")
    ] = None,
    out: Record = None,
) -> None:
    """`prepare` against a plain loop, TV-L1 against DIS, and the feed against bare decoding.

    Writes temporary files only, and --out. Takes about 10 minutes on two CPU cores; nothing else should run.
    """
    from tune_ego.bench.prepare import bench_prepare as run

    _tell(run(egtea), out)


@bench.command("resume")
def resume_after_kills(
    search: Annotated[bool, typer.Option("--search", help="A search of 8 trials instead of one run.")] = False,
    kills: Annotated[
        Optional[int], typer.Option(min=1, help=f"How often; else {KILLS}, of a search {SEARCH_KILLS}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Record = None,
) -> None:
    """Kill a run, or a search, at random moments: it has to end as one that was left alone, to the bit.

    Writes temporary files only, and --out. On two CPU cores about 25 seconds a kill, with --search 15 minutes.
    """
    from tune_ego.bench.resume import bench_resume, bench_resume_search

    benchmark = bench_resume_search(kills or SEARCH_KILLS, seed) if search else bench_resume(kills or KILLS, seed)
    _tell(benchmark, out)


@bench.command("search")
def bench_search(
    trials: Annotated[int, typer.Option(min=16, help="Stub trials of each search.")] = SEARCH_TRIALS,
    seeds: Annotated[int, typer.Option(min=1, help="Searches to average over.")] = SEARCH_SEEDS,
    out: Record = None,
) -> None:
    """The real scheduler over stub learning curves: what ASHA saves, what it misses, what a report costs it.

    Writes temporary files only, and --out. Takes about 40 seconds.
    """
    from tune_ego.bench.search import bench_search as run

    _tell(run(trials, seeds), out)
