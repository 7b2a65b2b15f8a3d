"""The `reproduce` command: the published experiments on EGTEA Gaze+ with repeats, and a page of both results."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.cluster import ray_session
from tune_ego.console import heading, percent, print_table, say
from tune_ego.errors import UserError
from tune_ego.evaluation.trials import evaluate_trials
from tune_ego.report.write import write_reproduction
from tune_ego.results.experiment import EXPERIMENT_FILE, Experiment
from tune_ego.results.reading import read_experiment
from tune_ego.runs.worker_task import call_on_worker
from tune_ego.search.dry_run import show_plan
from tune_ego.search.tune import any_config, resume_search, start_search

WEIGHTS = {
    "lu_o": {"rgb": "rgb_imagenet.pt", "flow": "flow_imagenet.pt"},
    "lu": {"rgb": "rgb-o.pt", "flow": "flow-o.pt"},
}
"""Search space -> stream -> file of its starting weights in the folder of weights: I3D's Kinetics, Lu's "-o"."""
PAGE = "reproduction.html"


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


def reproduce(request: Request, resume_command: str) -> dict[str, Any]:
    """Run the searches `lu_o`, `lu` and `table1`, test all trials, and write the page; return its numbers.

    What an earlier call has done is not done again. `lu` and `table1` start from Lu's published "-o" weights, or from
    those of the first trial of `lu_o`. Raises `UserError`.

    Args:
        request: Arguments of the command.
        resume_command: Command that is printed where this one was interrupted.
    """
    data = storage.absolute(request.data)
    given = _given_weights(request.weights)
    searches: list[Experiment] = []
    with ray_session(request.address):
        for name in ("lu_o", "lu", "table1"):
            heading(f"{len(searches) + 1}. {name}")
            weights = given.get(name) or _weights_of_stage_o(searches)
            changes = _changes(name, weights, request)
            search = _search(name, data, request, changes, resume_command)
            call = partial(
                call_on_worker,
                config=any_config(search.space),
                gpus=search.spec["gpus_per_worker"],
                resume_command=resume_command,
            )
            evaluate_trials(search.root, data, call=call)
            searches.append(search)
    numbers = write_reproduction(searches, storage.join(request.root, PAGE))
    _print_numbers(numbers)
    return numbers


def show_plans(request: Request, *, probe: bool, price: float | None) -> None:
    """Print the plan of each search; start nothing. With `probe`, measure and estimate, as `tune --dry-run` does."""
    given = _given_weights(request.weights)
    with ray_session(request.address):
        for name in ("lu_o", "lu", "table1"):
            heading(name)
            show_plan(
                name,
                storage.absolute(request.data),
                storage.join(request.root, name),
                _changes(name, given.get(name, {}), request),
                request.seed,
                request.concurrent,
                request.address,
                probe=probe,
                price=price,
                node_types=request.node_types,
            )


def _given_weights(folder: str | None) -> dict[str, dict[str, str]]:
    """Return search space -> stream -> file of starting weights in the folder. Raises `UserError` if it has none."""
    if folder is None:
        say("Without --weights the first stage starts from random weights: far below the published results.")
        return {}
    folder = storage.absolute(folder)
    given = {
        name: {stream: uri for stream, file in files.items() if storage.exists(uri := storage.join(folder, file))}
        for name, files in WEIGHTS.items()
    }
    for name, files in WEIGHTS.items():
        if given[name] and len(given[name]) < len(files):
            raise UserError(f"--weights {folder}: {' and '.join(files.values())} belong together; one is missing")
    if not any(given.values()):
        pairs = "; ".join(" and ".join(files.values()) for files in WEIGHTS.values())
        raise UserError(f"--weights {folder}: none of the expected files: {pairs}")
    given["table1"] = given["lu"]
    return {name: files for name, files in given.items() if files}


def _weights_of_stage_o(searches: list[Experiment]) -> dict[str, str]:
    """Return the first finished trial of `lu_o` as the starting weights of both streams; none before that search."""
    if not searches:
        return {}
    finished = [trial for trial in searches[0].trials if trial.state == "finished"]
    return dict.fromkeys(("rgb", "flow"), finished[0].run)


def _changes(name: str, weights: dict[str, str], request: Request) -> dict[str, Any]:
    """Return the changes to a search space."""
    streams = ("rgb",) if name == "table1" else ("rgb", "flow")
    changes: dict[str, Any] = {f"init_from.{s}": weights[s] for s in streams if s in weights}
    changes |= {**request.changes, "repeats": request.repeats}
    if request.iterations is not None:
        changes["train.iterations"] = request.iterations
        changes["train.validate_every"] = max(1, min(250, request.iterations // 4))
    return changes


def _search(name: str, data: str, request: Request, changes: dict[str, Any], resume_command: str) -> Experiment:
    """Start a search, resume it, or read it where it has ended. Raises `UserError` if it is one of other arguments."""
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
            resume_command=resume_command,
        )
    search = read_experiment(root)
    # A run as starting weights is on record as its checkpoint.
    before = search.spec["overrides"]
    other = [key for key, value in changes.items() if not str(before.get(key)).startswith(str(value))]
    if other or before.get("seed") != request.seed:
        raise UserError(
            f"{root}: this search was started with other arguments ({', '.join(other) or 'seed'}); choose another "
            "--name"
        )
    if len(search.trials) == search.spec["trials"] and all(trial.state == "finished" for trial in search.trials):
        say(f"{root}: has finished")
        return search
    return resume_search(
        root,
        request.address,
        data=data,
        node_types=request.node_types,
        concurrent=request.concurrent,
        resume_command=resume_command,
    )


def _print_numbers(numbers: dict[str, Any]) -> None:
    rows = []
    for row in numbers["rows"]:
        one = row["mean_class"]
        if one["mean"] is None:
            ours = "-"
        elif one["low"] is None:
            ours = percent(one["mean"])
        else:
            ours = f"{percent(one['mean'])} [{percent(one['low'])}, {percent(one['high'])}]"
        rows.append([row["model"], row["source"], percent(one["published"]), ours])
    print_table(
        "Mean class accuracy on the test clips of split 1, ours with 95 % intervals",
        ["model", "source", "published", "ours"],
        rows,
    )
    if not numbers["comparable"]:
        say(f"NOT COMPARABLE: {numbers['classes']} classes here, {numbers['published_classes']} in EGTEA Gaze+.")
