"""The `reproduce` command: the published experiments on EGTEA Gaze+ with repeats, and a page of both results."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.cluster import ray_session
from tune_ego.console import heading, percent, print_table, say
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.evaluation.trials import evaluate_trials
from tune_ego.report.write import write_reproduction
from tune_ego.results.experiment import EXPERIMENT_FILE, Experiment
from tune_ego.results.reading import read_experiment
from tune_ego.runs.concurrency import runs_at_a_time
from tune_ego.runs.launch import check_same_data
from tune_ego.runs.placement import cluster_nodes, gpus_per_worker
from tune_ego.runs.worker_task import call_on_worker
from tune_ego.search.dry_run import show_plan
from tune_ego.search.tune import any_config, check_runs, resolved_space, resume_search, start_search

STAGE_O = "lu_o"
"""Search space of Lu's "-o". The other search spaces start from its weights."""
SPACES = (STAGE_O, "lu", "table1")
"""Search spaces in the order in which they are run."""
KINETICS = {"rgb": "rgb_imagenet.pt", "flow": "flow_imagenet.pt"}
"""Stream -> file with I3D's weights of Kinetics, from which "-o" starts."""
PUBLISHED_O = {"rgb": "rgb-o.pt", "flow": "flow-o.pt"}
"""Stream -> file with Lu's published "-o" weights."""
PAGE = "reproduction.html"
_RESUME_COMMAND = "the same command"


class Request(NamedTuple):
    """Arguments of the command."""

    data: str
    root: str
    """Folder or URI of the searches and the page."""
    weights: str | None
    repeats: int
    iterations: int | None
    changes: dict[str, Any]
    """Keys of all configurations set on the command line."""
    seed: int
    concurrent: int | None
    address: str | None
    node_types: Sequence[str]


def reproduce(request: Request) -> dict[str, Any]:
    """Run the searches of `SPACES`, test all trials, and write the page; return its numbers.

    Searches and tests of an earlier call are resumed or kept. Without Lu's published "-o" weights, `lu` and `table1`
    start from the first trial of `lu_o`. Raises `UserError` for weights or changes that do not fit, before the first
    search starts.
    """
    data = storage.absolute(request.data)
    weights = _starting_weights(request.weights)
    for name in weights:
        _check(name, data, weights[name], request)
    searches: list[Experiment] = []
    with ray_session(request.address):
        for number, name in enumerate(weights, start=1):
            heading(f"{number}. {name}")
            start = weights[name] if weights[name] or name == STAGE_O else _weights_of_stage_o(searches[0])
            search = _search(name, data, _changes(name, start, request), request)
            _test(search, data, request)
            searches.append(search)
    numbers = write_reproduction(searches, storage.join(request.root, PAGE))
    _print_numbers(numbers)
    return numbers


def show_plans(request: Request, *, probe: bool, price: float | None) -> None:
    """Print the plan of each search; start nothing. With `probe`, measure and estimate, as `tune --dry-run` does."""
    weights = _starting_weights(request.weights)
    trials = iterations = 0
    with ray_session(request.address):
        for name, files in weights.items():
            heading(name)
            plan = show_plan(
                name,
                storage.absolute(request.data),
                storage.join(request.root, name),
                _changes(name, files, request),
                request.seed,
                request.concurrent,
                request.address,
                probe=probe,
                price=price,
                node_types=request.node_types,
            )
            trials, iterations = trials + plan["trials"], iterations + plan["iterations_at_most"]
    say(f"In all {trials:,} trials and {iterations:,} iterations")


def _starting_weights(folder: str | None) -> dict[str, dict[str, str]]:
    """Return search space -> stream -> file of its starting weights, for the searches that are to run.

    A search without files starts from `lu_o`, and `lu_o` itself from random weights. With Lu's "-o" weights alone,
    `lu_o` is left out. Raises `UserError` if the folder has neither pair of files.
    """
    if folder is None:
        say("Without --weights, -o starts from random weights: its results will be far below the published ones.")
        return {name: {} for name in SPACES}
    folder = storage.absolute(folder)
    kinetics, published = _pair(folder, KINETICS), _pair(folder, PUBLISHED_O)
    if not kinetics and not published:
        pairs = "; ".join(" and ".join(files.values()) for files in (KINETICS, PUBLISHED_O))
        raise UserError(f"--weights {folder}: none of the expected files: {pairs}")
    if not kinetics:
        say(f"Without {' and '.join(KINETICS.values())} in {folder}, -o is not repeated.")
        return {name: published for name in SPACES if name != STAGE_O}
    return {name: kinetics if name == STAGE_O else published for name in SPACES}


def _pair(folder: str, files: dict[str, str]) -> dict[str, str]:
    """Return stream -> URI of two files in a folder; none if neither is there. Raises `UserError` for one alone."""
    uris = {stream: uri for stream, file in files.items() if storage.exists(uri := storage.join(folder, file))}
    if len(uris) == 1:
        raise UserError(f"--weights {folder}: {' and '.join(files.values())} belong together; one is missing")
    return uris


def _weights_of_stage_o(search: Experiment) -> dict[str, str]:
    """Return the first trial of `lu_o` as the starting weights of both streams."""
    for name, damage in search.damaged.items():
        raise UserError(f"{search.root}: {name}: damaged: {damage}; the other searches start from the first trial")
    first = search.trials[0]
    if first.state != "finished":
        raise UserError(f"{first.run}: {first.state}; the other searches start from its weights: {first.reason}")
    return dict.fromkeys(("rgb", "flow"), first.run)


def _changes(name: str, weights: dict[str, str], request: Request) -> dict[str, Any]:
    """Return the changes to a search space. Raises `UserError` for changes of how many trials there are."""
    for key in ("repeats", "samples"):
        if key in request.changes:
            raise UserError(f"--set {key}: the number of runs of each row is --repeats")
    streams = ("rgb",) if name == "table1" else ("rgb", "flow")
    changes: dict[str, Any] = {f"init_from.{stream}": weights[stream] for stream in streams if stream in weights}
    changes |= {**request.changes, "repeats": request.repeats}
    if request.iterations is not None:
        changes["train.iterations"] = request.iterations
        changes["train.validate_every"] = max(1, min(250, request.iterations // 4))
    return changes


def _check(name: str, data: str, weights: dict[str, str], request: Request) -> None:
    """Raise `UserError` where a search cannot run, or was started with other arguments or on other shards."""
    space, changes = resolved_space(name, _changes(name, weights, request), request.seed)
    check_runs(space, data)
    root = storage.join(request.root, name)
    if not storage.exists(storage.join(root, EXPERIMENT_FILE)):
        return
    search = read_experiment(root)
    check_same_data(open_shards(data), search.spec["data_fingerprint"], root)
    before = dict(search.spec["overrides"])
    if not weights and name != STAGE_O:  # the first trial of `lu_o`, as it was then
        before = {key: value for key, value in before.items() if not key.startswith("init_from.")}
    other = [key for key in before | changes if before.get(key) != changes.get(key)]
    if other:
        raise UserError(
            f"{root}: this search was started with other arguments ({', '.join(other)}); choose another --name"
        )


def _search(name: str, data: str, changes: dict[str, Any], request: Request) -> Experiment:
    """Start a search, resume it, or read it where all of its trials have finished."""
    root = storage.join(request.root, name)
    if not storage.exists(storage.join(root, EXPERIMENT_FILE)):
        return start_search(
            name,
            data,
            root,
            changes,
            request.seed,
            request.concurrent,
            request.address,
            node_types=request.node_types,
            resume_command=_RESUME_COMMAND,
        )
    search = read_experiment(root)
    if len(search.trials) == search.spec["trials"] and all(trial.state == "finished" for trial in search.trials):
        say(f"{root}: has finished")
        return search
    return resume_search(
        root,
        request.address,
        data=data,
        node_types=request.node_types,
        concurrent=request.concurrent,
        resume_command=_RESUME_COMMAND,
    )


def _test(search: Experiment, data: str, request: Request) -> None:
    """Test the finished trials, each on a worker's CPUs and GPUs."""
    config, nodes = any_config(search.space), cluster_nodes(request.address, request.node_types)
    gpus = gpus_per_worker(config, nodes)
    runs_at_a_time(config, gpus, nodes, beside=0)
    evaluate_trials(search.root, data, call=lambda work: call_on_worker(work, config, gpus, _RESUME_COMMAND))


def _print_numbers(numbers: dict[str, Any]) -> None:
    rows = []
    for row in numbers["rows"]:
        accuracy = row["mean_class"]
        ours = "-" if accuracy["mean"] is None else percent(accuracy["mean"])
        if accuracy["low"] is not None:
            ours += f" [{percent(accuracy['low'])}, {percent(accuracy['high'])}]"
        rows.append([row["model"], row["source"], percent(accuracy["published"]), ours])
    title = "Mean class accuracy on the test clips, ours with 95 % intervals"
    print_table(title, ["model", "source", "published", "ours"], rows)
    if numbers["not_comparable"]:
        say(f"NOT COMPARABLE: {numbers['not_comparable']}")
