"""The commands `tune-ego bench ...`; what they run is imported inside them."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

bench = typer.Typer(
    no_args_is_help=True, help="Measure on this machine: speeds beside their yardsticks, as a table and JSON."
)
Record = Annotated[Optional[str], typer.Option("--out", help="JSON file to write, or URI.")]


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

    benchmark = run(egtea)
    benchmark.show()
    if out is not None:
        benchmark.write(out)


@bench.command("resume")
def resume_after_kills(
    search: Annotated[bool, typer.Option("--search", help="A search of 8 trials instead of one run.")] = False,
    kills: Annotated[Optional[int], typer.Option(min=1, help="How often; else 20, of a search 5.")] = None,
    seed: Annotated[int, typer.Option(help="Of the moments.")] = 0,
    out: Record = None,
) -> None:
    """Kill a run, or a search, at random moments: it has to end as one that was left alone, to the bit.

    Writes temporary files only, and --out. On two CPU cores about 25 seconds a kill, with --search 15 minutes.
    """
    from tune_ego.bench.resume import bench_resume, bench_resume_search

    benchmark = bench_resume_search(kills or 5, seed) if search else bench_resume(kills or 20, seed)
    benchmark.show()
    if out is not None:
        benchmark.write(out)


@bench.command("search")
def bench_search(
    trials: Annotated[int, typer.Option(min=16, help="Stub trials of each search.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Searches to average over.")] = 20,
    out: Record = None,
) -> None:
    """The real scheduler over stub learning curves: what ASHA saves, what it misses, what a report costs it.

    Writes temporary files only, and --out. Takes about 40 seconds.
    """
    from tune_ego.bench.search import bench_search as run

    benchmark = run(trials, seeds)
    benchmark.show()
    if out is not None:
        benchmark.write(out)
