"""`tune --dry-run`: the plan of a search, and its hours and price estimated from a short measured run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.cluster import ray_session
from tune_ego.config import Config
from tune_ego.config_io import override_config
from tune_ego.console import print_table, say
from tune_ego.errors import UserError
from tune_ego.results import driver, experiment
from tune_ego.results.progress import share_of_iterations
from tune_ego.runs.concurrency import runs_at_a_time
from tune_ego.runs.job import Job
from tune_ego.runs.launch import fit
from tune_ego.runs.placement import cluster_nodes, gpus_per_worker, worker_resources
from tune_ego.search.tune import check_runs, resolved_space
from tune_ego.search_space import SearchSpace

_WARM_UP, _MEASURED = 4, 12  # iterations


class Probe(NamedTuple):
    """Seconds, measured."""

    start: float
    """Seconds of a trial before its first iteration and after its last one."""
    iteration: float
    validation: float


def show_plan(
    space_name: str,
    data: str,
    root: str,
    changes: dict[str, Any],
    seed: int,
    concurrent: int | None,
    address: str | None,
    *,
    probe: bool = False,
    price: float | None = None,
    node_types: Sequence[str] = (),
) -> dict[str, Any]:
    """Print and return the plan of a search. With `probe` a short run is trained, measured and deleted.

    `price` is the price of a GPU for an hour, without GPUs that of a worker. Raises `UserError` where `tune` would
    refuse the search.
    """
    space, _ = resolved_space(space_name, changes, seed)
    data = storage.absolute(data)
    check_runs(space, data)
    with ray_session(address):
        nodes = cluster_nodes(address, node_types)
        config = space.config(_any_draw(space, seed))
        gpus = gpus_per_worker(config, nodes)
        plan = _plan(space, config, gpus, runs_at_a_time(config, gpus, nodes, space.trials, concurrent))
        measured = _measure(config, data, f"{root}-probe", gpus) if probe else None
    if measured is not None:
        plan |= _cost(plan, config, measured, price)
        if different := [key for key in _COSTLY if key in space.searched_keys]:
            say(f"Trials with other values of {', '.join(different)} than the probe's take longer or shorter")
    _show(plan, space, nodes.live)
    return plan


_COSTLY = ("model.backbone", "model.stam_depth", "streams", "data.crop", "data.window_frames", "train.batch_size")
"""Keys on which the time of an iteration depends most."""


def _any_draw(space: SearchSpace, seed: int) -> dict[str, Any]:
    """Return a draw of the search: its first, or for a searcher that learns any valid one."""
    match space.searcher:
        case "random":
            return space.draw(seed, 0)
        case "tpe":
            return next(space.draws())
        case unknown:
            raise ValueError(f"no searcher {unknown!r}")


def _plan(space: SearchSpace, config: Config, gpus: float, at_a_time: int) -> dict[str, Any]:
    budget = config.train.iterations
    return {
        "configurations": space.configurations,
        "trials": space.trials,
        "trials_at_a_time": at_a_time,
        "workers": config.compute.most_workers,
        "cpus_per_worker": worker_resources(config, gpus)["CPU"],
        "gpus_per_worker": gpus,
        "iterations_of_a_trial": budget,
        "iterations_at_most": budget * space.trials,
        "share_expected": share_of_iterations(space, budget),
    }


def _measure(config: Config, data: str, run: str, gpus: float) -> Probe:
    """Measure a run of a few iterations and one validation, with the code of a trial."""
    names = storage.list_names(run)
    if experiment.CONFIG_FILE in names:  # left by a probe that was killed
        storage.remove_folder(run)
    elif names:
        raise UserError(f"{run}: the folder of the probe is not empty")
    iterations = _WARM_UP + _MEASURED
    changes = {"train.iterations": iterations, "train.log_every": 1, "train.validate_every": iterations}
    short = override_config(config, {**changes, "schedule.warmup": 0}, "--probe")
    say(f"Probe: {iterations} iterations and a validation of the first configuration ({config.model.backbone})")
    start = time.monotonic()
    try:
        fit(Job(short, data, run, gpus, driver.stop_uri(run), final=False))
        seconds = time.monotonic() - start
        lines = experiment.read_metrics(run)
    finally:
        storage.remove_folder(run)
    iteration_seconds = [config.train.batch_size / line["clips_per_second"] for line in lines]
    validation = lines[-1][experiment.VALIDATION_SECONDS]
    return Probe(seconds - sum(iteration_seconds) - validation, median(iteration_seconds[_WARM_UP:]), validation)


def _cost(plan: dict[str, Any], config: Config, probe: Probe, price: float | None) -> dict[str, Any]:
    validations = -(-config.train.iterations // config.train.validate_every)
    training = config.train.iterations * probe.iteration + validations * probe.validation
    costs: dict[str, Any] = {"seconds": probe._asdict()}
    for name, share in (("at_most", 1.0), ("expected", plan["share_expected"])):
        if share is None:
            continue
        busy = plan["trials"] * (probe.start + share * training) / 3600
        costs[f"hours_{name}"] = busy / plan["trials_at_a_time"]
        if price is not None:
            costs[f"price_{name}"] = busy * plan["workers"] * (plan["gpus_per_worker"] or 1) * price
    return costs


def _show(plan: dict[str, Any], space: SearchSpace, nodes: list[dict[str, float]]) -> None:
    repeats = f" of {space.repeats} repeats each" if space.repeats > 1 else ""
    request = f"{plan['cpus_per_worker']:g} CPUs, {plan['gpus_per_worker']:g} GPUs each"
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    share = plan["share_expected"]
    expected = "depends on the curves" if share is None else f"about {share * plan['iterations_at_most']:,.0f}"
    rows = [
        ["cluster now", f"{len(nodes)} node(s), {cpus:g} CPUs, {gpus:g} GPUs"],
        ["configurations", f"{plan['configurations']:,}{repeats}, drawn by {space.searcher}"],
        ["trials", f"{plan['trials']:,}, {plan['trials_at_a_time']} at a time"],
        ["workers of a trial", f"{plan['workers']}: {request}"],
        ["iterations of a trial", f"{plan['iterations_of_a_trial']:,} at most"],
        ["iterations in all", f"{plan['iterations_at_most']:,} at most, with {space.scheduler.name} {expected}"],
    ]
    if "seconds" in plan:
        seconds = plan["seconds"]
        parts = f"{seconds['iteration']:.2f} an iteration, {seconds['validation']:.1f} a validation"
        rows.append(["seconds, measured", f"{parts}, {seconds['start']:.0f} to start and end a trial"])
    for quantity, unit in (("hours", "h"), ("price", "")):
        if f"{quantity}_at_most" in plan:
            most, about = plan[f"{quantity}_at_most"], plan.get(f"{quantity}_expected")
            also = "" if about is None else f", with {space.scheduler.name} about {about:,.2f} {unit}".rstrip()
            rows.append([quantity, f"{most:,.2f} {unit}".rstrip() + f" at most{also}"])
    print_table("Plan", ["", ""], rows)
