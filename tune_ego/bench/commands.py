"""The commands `tune-ego bench ...`. Imports are inside the functions so that `--help` prints at once."""

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
    no_args_is_help=True, help="Measure speeds on this machine, each beside a reference; print a table and write JSON."
)
Record = Annotated[Optional[str], typer.Option("--out", help="File or URI of the JSON record.")]
Shards = Annotated[
    Optional[str], typer.Argument(help="Folder or URI of shards to measure on; default: synthetic shards.")
]


def _show_and_write(benchmark: Benchmark, out: str | None) -> None:
    benchmark.show()
    if out is not None:
        benchmark.write(out)
        say(f"written to {out}")


@bench.command("feed")
def bench_feed(shards: Shards = None, out: Record = None) -> None:
    """Measure reading windows on one core beside a bare decoding loop, and the whole feed through Ray.

    Writes temporary files and --out only. Takes about 4 minutes on two CPU cores; run nothing else meanwhile.
    """
    from tune_ego.bench.feed import bench_feed as run

    _show_and_write(run(shards), out)


@bench.command("step")
def bench_step(
    side: Annotated[int, typer.Option(min=32, help="Width and height of the crop, pixels.")] = 224,
    batch: Annotated[
        Optional[int], typer.Option(min=1, help="Clips in a batch; default: 24 on a GPU, 2 on a CPU.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats of each variant.")] = 5,
    out: Record = None,
) -> None:
    """Measure forward, backward and optimizer on data in memory, by stream, precision, layout and compilation.

    Runs on the GPU where there is one. Each variant is compared with the machine's rate of matrix products, and our
    model with a straightforward version. Takes about 2 minutes on two CPU cores.
    """
    from tune_ego.bench.step import bench_step as run

    _show_and_write(run(side, batch, repeats, save=lambda benchmark: benchmark.write(out) if out else None), out)


@bench.command("loop")
def bench_loop(
    shards: Shards = None,
    iterations: Annotated[int, typer.Option(min=40, help="Iterations of each run.")] = 160,
    repeats: Annotated[int, typer.Option(min=1, help="Number of runs.")] = 5,
    out: Record = None,
) -> None:
    """Measure a whole run on Ray beside its bare training step: the cost of feed, reporting and checkpoints.

    Uses the demo's model on synthetic clips, or the full model on given shards. Writes temporary files and --out only.
    Takes about 10 minutes on two CPU cores; run nothing else meanwhile.
    """
    from tune_ego.bench.loop import bench_loop as run

    _show_and_write(run(shards, iterations=iterations, repeats=repeats), out)


@bench.command("all")
def bench_all(
    out: Annotated[Optional[str], typer.Option(help="Folder or URI for a JSON record of each benchmark.")] = None,
) -> None:
    """Run every benchmark, one after another. The help of each says how long it takes."""
    from tune_ego.bench.feed import bench_feed as feed
    from tune_ego.bench.loop import bench_loop as loop
    from tune_ego.bench.predict import bench_predict as predict
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
        "predict": predict,
        "resume": lambda: bench_resume(KILLS, 0),
        "resume-search": lambda: bench_resume_search(SEARCH_KILLS, 0),
    }
    for name, body in bodies.items():
        _show_and_write(body(), f"{out}/{name}.json" if out is not None else None)


@bench.command("prepare")
def bench_prepare(
    egtea: Annotated[
        Optional[str], typer.Argument(help="EGTEA folder to measure on; default: synthetic clips, 640 x 480.")
    ] = None,
    out: Record = None,
) -> None:
    """Measure `prepare` beside a plain loop, TV-L1 beside DIS, and the feed beside bare decoding.

    Writes temporary files and --out only. Takes about 10 minutes on two CPU cores; run nothing else meanwhile.
    """
    from tune_ego.bench.prepare import bench_prepare as run

    _show_and_write(run(egtea), out)


@bench.command("predict")
def bench_predict(
    width: Annotated[float, typer.Option(min=0.01, help="Width of the model, `model.width`.")] = 1.0,
    repeats: Annotated[int, typer.Option(min=1, help="Timed repeats.")] = 3,
    out: Record = None,
) -> None:
    """Measure `predict` on a short video beside the model's forward pass and the optical flow, measured apart.

    Writes temporary files and --out only; run nothing else meanwhile.
    """
    from tune_ego.bench.predict import bench_predict as run

    _show_and_write(run(width, repeats), out)


@bench.command("resume")
def bench_resume(
    search: Annotated[bool, typer.Option("--search", help="Kill a search of 8 trials instead of one run.")] = False,
    kills: Annotated[
        Optional[int], typer.Option(min=1, help=f"Number of kills; default: {KILLS}, of a search {SEARCH_KILLS}.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random moments.")] = 0,
    out: Record = None,
) -> None:
    """Kill and resume a run or a search at random moments, and compare it with one that was not killed.

    Weights and metrics of a run have to be equal to the bit; times are not compared. Of a search, the decisions, the
    states of the trials and the best trial have to be equal. Writes temporary files and --out only. Takes about
    25 seconds a kill on two CPU cores, with --search 15 minutes in all.
    """
    from tune_ego.bench.resume import bench_resume as run
    from tune_ego.bench.resume import bench_resume_search as run_search

    benchmark = run_search(kills or SEARCH_KILLS, seed) if search else run(kills or KILLS, seed)
    _show_and_write(benchmark, out)


@bench.command("search")
def bench_search(
    trials: Annotated[int, typer.Option(min=16, help="Simulated trials of each search.")] = SEARCH_TRIALS,
    seeds: Annotated[int, typer.Option(min=1, help="Searches to average over, each with its own seed.")] = SEARCH_SEEDS,
    out: Record = None,
) -> None:
    """Measure ASHA on simulated learning curves: iterations saved, accuracy lost, and time for each report.

    Writes temporary files and --out only. Takes about 40 seconds.
    """
    from tune_ego.bench.search import bench_search as run

    _show_and_write(run(trials, seeds), out)
