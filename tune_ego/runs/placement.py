"""Resources of runs on the nodes of a Ray cluster, and the names of their placement groups."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tune_ego.cluster import is_local
from tune_ego.config import Config
from tune_ego.errors import UserError
from tune_ego.yaml_files import read_yaml

READER_CPUS = 0.25
"""CPUs that a worker reserves for each of its reader tasks. Without the reservation, workers on every CPU would
wait for their readers for ever."""
_MOST_READERS = 8
"""Most readers by `compute.readers: auto`. Two of them feed 100 windows of 224 x 224 pixels a second on two cores."""
TRIAL_CPUS = 0.1
"""CPUs that Ray reserves for a trial's own actor, which starts and supervises its workers."""
_HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head of a cluster alone."""
_BOOTSTRAP = "~/ray_bootstrap_config.yaml"
"""File that `ray up` leaves on the head: the cluster's description, with the resources of each type of node."""

Node = dict[str, float]
"""Resource name -> amount, of one node."""


def live_nodes() -> list[Node]:
    """Return the resources of each live node of the cluster."""
    import ray  # late: seconds to import

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


class Nodes(NamedTuple):
    """Nodes of a cluster, as far as they are known."""

    live: list[Node]
    to_come: list[Node]
    """Nodes that the cluster may start."""
    may_grow: bool
    """Whether the cluster may start nodes that are not known here."""


def cluster_nodes(address: str | None, node_types: Sequence[str] = ()) -> Nodes:
    """Return the nodes of the cluster of this session; `node_types` describe nodes to come (`parse_node_type`)."""
    if is_local(address):
        return Nodes(live_nodes(), [], may_grow=False)
    to_come = [node for text in node_types for node in parse_node_type(text)] or nodes_to_come(address)
    return Nodes(live_nodes(), to_come, may_grow=not to_come)


def parse_node_type(text: str) -> list[Node]:
    """Return the nodes that a text such as `CPU=16,GPU=1,max=8` describes. Raises `UserError`."""
    amounts: dict[str, float] = {}
    for part in text.split(","):
        name, separator, amount = part.strip().partition("=")
        if not (name and separator and re.fullmatch(r"\d+(\.\d+)?", amount)) or name in amounts:
            raise UserError(f"--node-type {text!r}: write NAME=AMOUNT,...,max=COUNT, e.g. CPU=16,GPU=1,max=8")
        amounts[name] = float(amount)
    count = amounts.pop("max", 1.0)
    if any(name != name.upper() and name.upper() in ("CPU", "GPU") for name in amounts):
        raise UserError(f"--node-type {text!r}: the names of resources are CPU and GPU, in capitals")
    if not count.is_integer() or not amounts:
        raise UserError(f"--node-type {text!r}: max is the number of nodes, beside at least one resource")
    return [amounts] * int(count)


def nodes_to_come(address: str | None) -> list[Node]:
    """Return the nodes that a cluster of `ray up` may start, if this process is on its head; else none."""
    file = Path(_BOOTSTRAP).expanduser()
    if is_local(address) or not file.exists():
        return []
    cluster = read_yaml(file)
    kinds: dict[str, dict[str, Any]] = cluster.get("available_node_types", {})
    workers = [kind for name, kind in kinds.items() if name != cluster.get("head_node_type")]
    nodes = [kind.get("resources", {}) for kind in workers for _ in range(kind.get("max_workers", 0))]
    return nodes[: cluster.get("max_workers", 0)]


def gpus_per_worker(config: Config, nodes: Nodes) -> float:
    """Return the GPUs of a worker on a cluster of these nodes.

    Raises `UserError` where decoding needs a GPU more, and for `auto` on a cluster without a GPU that may start others:
    a run must not train on CPUs only because no GPU node is up yet.
    """
    gpus = config.compute.gpus_per_worker
    if gpus == "auto":
        gpus = 1.0 if any(node.get("GPU", 0) >= 1 for node in [*nodes.live, *nodes.to_come]) else 0.0
        if not gpus and nodes.may_grow:
            raise UserError(
                "compute.gpus_per_worker: auto: the cluster has no GPU now, and may start nodes. Set it to 1 to wait"
                " for GPUs or to 0 to train on CPUs, or describe the nodes: --node-type CPU=16,GPU=1,max=8"
            )
    decodes_on_gpu(config, gpus)
    return gpus


def decodes_on_gpu(config: Config, gpus: float) -> bool:
    """Return whether workers decode on their GPUs. Raises `UserError` for `data.decode: gpu` without a GPU."""
    match config.data.decode:
        case "gpu":
            if not gpus:
                raise UserError(
                    "data.decode: gpu needs a GPU, and workers have none; `auto` takes one where there is one"
                )
            return True
        case "auto":
            return gpus > 0
        case "cpu":
            return False
        case unknown:
            raise ValueError(f"no device to decode on for {unknown!r}")


def worker_resources(config: Config, gpus: float) -> Node:
    """Return the resources that Ray reserves for a training process and its readers.

    CPUs in 16ths, rounded up: Ray counts how many workers fit by dividing floats, and 2.85 // 0.95 is 2.
    """
    cpus = config.compute.cpus_per_worker + config.compute.reserved_readers * READER_CPUS
    return {"CPU": math.ceil(16 * cpus) / 16, **({"GPU": gpus} if gpus else {})}


def read_ahead_bytes(config: Config, gpus: float, node: Node) -> int:
    """Return the bytes that a worker on this node may read ahead: its share of half of the node's object store.

    The node is assumed to be full of such workers. Seven feeds of 771 MB in a store of 1 GiB wrote 11 GB to disk in
    75 s.
    """
    return int(node.get("object_store_memory", 0) / 2 / _workers_on(config, gpus, node))


def reader_count(config: Config, gpus: float, node: Node, batch_bytes: int) -> int:
    """Return the number of reader tasks of a worker on this node, which is assumed to be full of such workers.

    By `auto` they and the trainer have a batch each, at most, of what the worker may read ahead (`read_ahead_bytes`).
    """
    if config.compute.readers != "auto":
        return config.compute.readers
    spare = node.get("CPU", 0) / _workers_on(config, gpus, node) - config.compute.cpus_per_worker
    held = read_ahead_bytes(config, gpus, node) // batch_bytes - 1
    return max(1, min(math.floor(spare), held, _MOST_READERS))


def _workers_on(config: Config, gpus: float, node: Node) -> int:
    """Return how many such workers a node has room for, at least one."""
    needs = worker_resources(config, gpus)
    return max(1, min(math.floor(node.get(kind, 0) / need) for kind, need in needs.items()))


def this_node() -> Node:
    """Return the resources of the node of this process."""
    import ray  # late: seconds to import

    name = ray.get_runtime_context().get_node_id()
    return next((node["Resources"] for node in ray.nodes() if node["NodeID"] == name), {})


def trial_resources(at_a_time: int) -> Node:
    """Return the resources of a trial's own actor. It is on the head if that has the CPUs: other nodes may go away."""
    room = any(_HEAD in node and node.get("CPU", 0) >= at_a_time * TRIAL_CPUS for node in live_nodes())
    return {"CPU": TRIAL_CPUS, **({_HEAD: 1e-3} if room else {})}


def placement_group_prefix(run: str) -> str:
    """Return the beginning of the names of all placement groups of a run (its folder or URI), unique to it."""
    return f"tune_ego-{hashlib.sha256(run.encode()).hexdigest()[:16]}-"
