"""Number of runs that a Ray cluster has room for at a time, for searches, final runs and dry runs."""

from __future__ import annotations

import math

from tune_ego.config import Config
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.runs.placement import TRIAL_CPUS, Node, Nodes, worker_resources


def runs_at_a_time(
    config: Config,
    gpus: float,
    nodes: Nodes,
    trials: int = 1,
    concurrent: int | None = None,
    beside: float = TRIAL_CPUS,
) -> int:
    """Return how many of `trials` runs of this configuration, with its fewest workers, run at a time.

    By default the number that fits on the current nodes. `concurrent` may be more on a cluster that can start nodes;
    a run then waits for its node. `beside` is the number of CPUs of each node that other processes use. Raises
    `UserError` where not even one run fits.
    """
    fits = fitting_runs(config, gpus, nodes.live, beside)
    most = trials if nodes.may_grow or nodes.to_come else fits
    if not fits:
        if not nodes.may_grow and not fitting_runs(config, gpus, [*nodes.live, *nodes.to_come], beside):
            raise _fits_nowhere(config, gpus, [*nodes.live, *nodes.to_come], beside)
        needs = ", ".join(f"{amount:g} {kind}" for kind, amount in worker_resources(config, gpus).items())
        say(f"No node has room for a worker ({needs}) now: waiting for nodes that the cluster starts")
        fits = 1
    return min(concurrent or fits, most, trials)


def fitting_runs(config: Config, gpus: float, nodes: list[Node], beside: float = TRIAL_CPUS) -> int:
    """Return how many runs of this configuration these nodes have room for."""
    needs, spare = worker_resources(config, gpus), {"CPU": beside}
    places = sum(
        min(math.floor(max(0.0, node.get(kind, 0) - spare.get(kind, 0)) / need) for kind, need in needs.items())
        for node in nodes
    )
    return places // config.compute.least_workers


def _fits_nowhere(config: Config, gpus: float, nodes: list[Node], beside: float) -> UserError:
    totals = {kind: sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU")}
    return UserError(
        f"{config.compute.least_workers} worker(s) ask for {worker_resources(config, gpus)['CPU']:g} CPUs and {gpus:g} "
        f"GPUs each, {beside:g} CPUs beside, and the cluster has {totals['CPU']:g} CPUs and {totals['GPU']:g} GPUs on "
        f"{len(nodes)} node(s); change compute.workers, compute.cpus_per_worker, compute.gpus_per_worker or the cluster"
    )
