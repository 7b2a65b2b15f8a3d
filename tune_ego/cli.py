"""The commands. Torch and Ray are imported inside the functions, so that `--help` prints at once."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn, Optional

import typer

from tune_ego import __version__
from tune_ego.bench.commands import bench
from tune_ego.dataset.commands import prepare, synthesize
from tune_ego.driver_signals import FAILED, INTERRUPTED, EndedInterrupted
from tune_ego.errors import UserError
from tune_ego.evaluation.commands import evaluate
from tune_ego.options import Address, Data, Name, NodeType, Seed, Set, Storage, Track, parse_changes
from tune_ego.prediction.commands import package, predict
from tune_ego.report.commands import report, visualize

app = typer.Typer(
    name="tune-ego",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Search and train two-stream, gaze-supervised action recognisers for first-person video, on Ray.",
)

_TRACKERS = ["tensorboard"]
_LOG_LINES = 20  # that `status` prints of a run


def main() -> None:
    """Run the command line. A mistake of the user is one line on stderr and exit code 2."""
    try:
        app(standalone_mode=True)
    except EndedInterrupted:
        raise
    except SystemExit as end:  # Typer ends a command that was interrupted without a word
        if end.code == INTERRUPTED:
            raise KeyboardInterrupt from end
        raise
    except UserError as error:
        _fail(str(error))
    except Exception as error:
        if not (isinstance(error, OSError) or type(error).__module__.startswith("pyarrow")):
            raise
        # A full disk, a missing permission, an object store that does not answer: no bug of this package.
        from tune_ego.storage import describe_error

        _fail(f"{type(error).__name__}: {describe_error(error)}")


def _fail(message: str) -> NoReturn:
    print(f"tune-ego: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(FAILED)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def demo(
    out: Annotated[
        str, typer.Option("--out", help="Folder for everything; must be empty or absent.")
    ] = "tune-ego-demo",
    seed: Seed = 0,
) -> None:
    """Run every step on synthetic clips: prepare, tune, export, train, evaluate and report.

    Reads nothing. Writes egtea/, shards/, search/, best.yaml, final/, report.html and .json, and summary.json (200 MB).
    Costs 6 to 7 minutes on two virtual CPUs, and 4 GB of memory.
    """
    from tune_ego.demo import run_demo

    run_demo(out, seed)


app.command()(synthesize)
app.command()(prepare)


@app.command()
def inspect(
    shards: Annotated[str, typer.Argument(help="Folder or URI of the shards that `prepare` wrote.")],
    clip: Annotated[
        Optional[str], typer.Argument(help="Name of a clip to draw; without it counts are printed.")
    ] = None,
    out: Annotated[
        Optional[str], typer.Option("--out", help="PNG to write; by default CLIP.png in the working directory.")
    ] = None,
) -> None:
    """Show the content of shards: counts per split, fold, class and session, or one clip as a picture.

    Reads the shards. With CLIP, writes a PNG of frames with the gaze point, the flow as colour, and the gaze target of
    the attention loss. Takes a second.
    """
    from tune_ego.evaluation.inspection import draw_clip, show_counts

    if clip is None:
        show_counts(shards)
    else:
        draw_clip(shards, clip, out or f"{clip}.png")


@app.command()
def tune(
    space: Annotated[
        str,
        typer.Argument(
            help="Search space: a YAML file, or the name of a shipped one: demo, optimizer, activation, stam_depth, "
            "table1, lu_o, lu, study, full (docs/search.md)."
        ),
    ],
    data: Data,
    storage: Storage,
    name: Name,
    seed: Seed = 0,
    concurrent: Annotated[
        Optional[int], typer.Option(min=1, help="Trials at a time; by default as many as the cluster has room for.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: measure a few iterations and estimate the hours.")
    ] = False,
    price: Annotated[
        Optional[float],
        typer.Option(
            min=0, help="With --probe: price of a GPU (without GPUs: of a worker) for an hour, to estimate the cost."
        ),
    ] = None,
    changes: Set = None,
    track: Track = _TRACKERS,
    address: Address = None,
    node_type: NodeType = None,
) -> None:
    """Search for the best configuration with Ray Tune on the validation mean class accuracy.

    Reads a search space and shards. Writes STORAGE/NAME: experiment.json, trials.json and runs/.
    Shipped search spaces state their cost in their headers. After a crash: `tune-ego resume STORAGE/NAME`.
    """
    from tune_ego.storage import join_name

    request = (space, data, join_name(storage, name), parse_changes(changes), seed, concurrent, address)
    if (probe and not dry_run) or (price is not None and not probe):
        raise UserError("--probe belongs to --dry-run, and --price to --probe")
    if dry_run:
        from tune_ego.search.dry_run import show_plan

        show_plan(*request, probe=probe, price=price, node_types=node_type or ())
    else:
        from tune_ego.search.tune import start_search

        start_search(*request, track=track, node_types=node_type or ())


@app.command()
def resume(
    search: Annotated[str, typer.Argument(help="STORAGE/NAME of a search.")],
    data: Annotated[
        Optional[str], typer.Option("--data", help="New folder or URI of the search's shards, if they were moved.")
    ] = None,
    samples: Annotated[
        Optional[int], typer.Option(min=1, help="Raise `samples` of the search space: more configurations are drawn.")
    ] = None,
    iterations: Annotated[
        Optional[int],
        typer.Option(
            min=1, help="Raise the budget: finished trials continue, trials that were stopped early stay stopped."
        ),
    ] = None,
    concurrent: Annotated[
        Optional[int], typer.Option(min=1, help="Trials at a time from now on; by default as before.")
    ] = None,
    address: Address = None,
    node_type: NodeType = None,
) -> None:
    """Resume a search that was killed or interrupted, or extend it.

    Reads and writes the search's files: unfinished and failed trials resume from their last checkpoints, others stay as
    they are. Costs the rest of the search.
    """
    from tune_ego.search.tune import resume_search

    resume_search(
        search,
        address,
        data=data,
        node_types=node_type or (),
        samples=samples,
        iterations=iterations,
        concurrent=concurrent,
    )


@app.command()
def status(
    search: Annotated[str, typer.Argument(help="STORAGE/NAME of a search or run, or a trial's folder.")],
) -> None:
    """Show the state of a search with its trials, best first, or of a run or trial with the last lines of its log.

    Reads files, writes nothing, takes a second.
    """
    from tune_ego import storage
    from tune_ego.config_io import load_config
    from tune_ego.console import print_table, say
    from tune_ego.results.experiment import CONFIG_FILE
    from tune_ego.results.progress import facts, run_facts, run_state, search_state, status_table
    from tune_ego.results.reading import read_experiment, say_damaged
    from tune_ego.results.tables import configuration_table
    from tune_ego.runs.run_log import last_log_lines

    root = storage.absolute(search)
    if storage.exists(config := storage.join(root, CONFIG_FILE)):
        print_table("", ["", ""], run_facts(load_config(config), root, run_state(root)))
        for line in last_log_lines(root, _LOG_LINES):
            say(line)
        return
    experiment = read_experiment(root)
    print_table("", ["", ""], [("search", search_state(experiment, experiment.alive)), *facts(experiment)])
    print_table(
        f"{len(experiment.trials)} of {experiment.spec['trials']} trials of {experiment.root}",
        *status_table(experiment),
    )
    if experiment.space.repeats > 1:
        print_table("Configurations, over their repeats", *configuration_table(experiment))
    for trial in experiment.trials:
        for message in (trial.reason, trial.warning):
            if message:
                say(f"{trial.id}: {message}")
    say_damaged(experiment)


@app.command()
def export(
    search: Annotated[str, typer.Argument(help="STORAGE/NAME of a search.")],
    out: Annotated[str, typer.Option("--out", help="YAML file to write.")] = "best.yaml",
) -> None:
    """Write the complete best configuration of a search and its provenance, for a final run of 3,000 iterations.

    Reads the search's files and writes one YAML file. Takes a second.
    """
    from tune_ego.console import percent, say
    from tune_ego.search.export import export_best

    best = export_best(search, out)
    repeats = f", mean of {len(best.accuracies)} repeats" if len(best.trials) > 1 else ""
    say(f"{out}: trial {best.id}, validation mean class accuracy {percent(best.accuracy)}{repeats}")


@app.command()
def train(
    config: Annotated[
        str, typer.Argument(help="Configuration: the file that `export` wrote, or the config.yaml of a run.")
    ],
    data: Data,
    storage: Storage,
    name: Name,
    iterations: Annotated[
        Optional[int], typer.Option(min=1, help="Optimizer steps; by default those of the configuration.")
    ] = None,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Test the final weights, as `evaluate` does.")
    ] = True,
    changes: Set = None,
    track: Track = _TRACKERS,
    address: Address = None,
    node_type: NodeType = None,
) -> None:
    """Train one configuration to its last iteration and test it. The same command resumes an interrupted run.

    Reads a configuration and shards. Writes STORAGE/NAME: config.yaml, metrics.jsonl, checkpoints, final/model.pt and
    evaluation.json. Cost: on an H200 3,000 iterations of 12 two-stream samples at 165 clips/s: 4 minutes.
    """
    from tune_ego.config_io import load_config, override_config
    from tune_ego.console import say
    from tune_ego.runs.final import train_final
    from tune_ego.runs.launch import describe_micro_batches
    from tune_ego.storage import join_name

    settings = parse_changes(changes)
    if iterations is not None:
        settings["train.iterations"] = iterations
    stored = load_config(config)
    resolved = override_config(stored, settings, "--set")
    if note := describe_micro_batches(stored, resolved):
        say(note)
    run = join_name(storage, name)
    train_final(resolved, data, run, address, test=evaluate, track=track, node_types=node_type or ())


@app.command()
def reproduce(
    data: Annotated[str, typer.Argument(help="Folder or URI of the shards of EGTEA Gaze+.")],
    storage: Storage,
    name: Name = "reproduction",
    weights: Annotated[
        Optional[str],
        typer.Option(
            "--weights",
            help="Folder or URI with rgb_imagenet.pt and flow_imagenet.pt (I3D, Kinetics), and rgb-o.pt and flow-o.pt "
            "(Lu's, without attention) if you have them.",
        ),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Runs of each row, over seeds.")] = 3,
    iterations: Annotated[
        Optional[int], typer.Option(min=1, help="Iterations of each run; by default 3,000, as in the paper.")
    ] = None,
    seed: Seed = 0,
    concurrent: Annotated[Optional[int], typer.Option(min=1, help="Trials at a time; by default all that fit.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and start nothing.")] = False,
    probe: Annotated[
        bool, typer.Option("--probe", help="With --dry-run: measure a few iterations and estimate the hours.")
    ] = False,
    price: Annotated[
        Optional[float], typer.Option(min=0, help="With --probe: price of a GPU (or worker) for an hour.")
    ] = None,
    changes: Set = None,
    address: Address = None,
    node_type: NodeType = None,
) -> None:
    """Repeat the published experiments: Lu's -o, -v and -a of both streams, and the rows of the paper's Table 1.

    Reads shards and starting weights. Writes three searches under STORAGE/NAME, tests all trials, and writes
    reproduction.html and .json there: published results and ours with 95 % intervals. Costs 21 runs of 3,000 iterations
    with 3 repeats. The same command resumes.
    """
    if (probe and not dry_run) or (price is not None and not probe):
        raise UserError("--probe belongs to --dry-run, and --price to --probe")
    from tune_ego.reproduction import Request, show_plans
    from tune_ego.reproduction import reproduce as run
    from tune_ego.storage import join_name

    root = join_name(storage, name)
    request = Request(
        data,
        root,
        weights,
        repeats,
        iterations,
        parse_changes(changes),
        seed,
        concurrent,
        address,
        node_type or (),
    )
    if dry_run:
        show_plans(request, probe=probe, price=price)
    else:
        run(request)


app.command()(evaluate)
app.command()(predict)
app.command()(package)
app.command()(report)
app.command()(visualize)
app.add_typer(bench, name="bench")
