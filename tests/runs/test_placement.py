"""Runs that fit on a cluster, now and when it has grown: tables over made-up nodes, no Ray."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from tests.conftest import tiny_config
from tune_ego.errors import UserError
from tune_ego.runs.concurrency import fitting_runs, runs_at_a_time
from tune_ego.runs.placement import (
    Node,
    Nodes,
    cluster_nodes,
    decodes_on_gpu,
    gpus_per_worker,
    live_nodes,
    nodes_to_come,
    parse_node_type,
    placement_group_prefix,
    read_ahead_bytes,
    reader_count,
    trial_resources,
    worker_resources,
)

HEAD = "node:__internal_head__"


def put_nodes(monkeypatch: pytest.MonkeyPatch, *nodes: Node) -> None:
    """A cluster of these nodes, and one that is dead."""
    dead = {"Resources": {"CPU": 1000.0, "GPU": 100.0, HEAD: 1.0}, "Alive": False}
    described = [dead, *({"Resources": node, "Alive": True} for node in nodes)]
    monkeypatch.setattr(ray, "nodes", lambda: described)


@pytest.fixture(autouse=True)
def _no_cluster_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def test_dead_nodes_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    put_nodes(monkeypatch, {"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0})
    assert live_nodes() == [{"CPU": 4.0}, {"CPU": 2.0, "GPU": 1.0}]


@pytest.mark.parametrize(
    ("cpus", "readers", "reserved"),
    [
        (1.0, 1, 1.25),
        (1.0, 4, 2.0),
        (2.0, 2, 2.5),
        (0.5, 1, 0.75),
        (0.7, 1, 1.0),  # 0.95 = 15.2 / 16, rounded up
        (0.45, 1, 0.75),  # 0.7 = 11.2 / 16
        (3.05, 1, 3.3125),  # 3.3 = 52.8 / 16: 53 / 16
    ],
)
def test_a_worker_reserves_a_quarter_of_a_cpu_for_each_reader_in_16ths(
    cpus: float, readers: int, reserved: float
) -> None:
    config = tiny_config(compute__cpus_per_worker=cpus, compute__readers=readers)
    assert worker_resources(config, 0) == {"CPU": reserved}
    auto = tiny_config(compute__cpus_per_worker=cpus)
    assert worker_resources(auto, 0) == worker_resources(
        tiny_config(compute__cpus_per_worker=cpus, compute__readers=1), 0
    )
    assert worker_resources(config, 0.5) == {"CPU": reserved, "GPU": 0.5}


@pytest.mark.parametrize(
    ("changes", "gpus", "nodes", "runs"),
    [
        # A worker takes 1.25 CPUs, and each node keeps 0.1 for the trial's actor.
        ({}, 0.0, [{"CPU": 4.0}], 3),  # 3.9 / 1.25 = 3.12
        ({}, 0.0, [{"CPU": 5.0}], 3),  # 4.9 / 1.25 = 3.92: not 4
        ({}, 0.0, [{"CPU": 5.1}], 4),
        ({}, 0.0, [{"CPU": 4.0}, {"CPU": 2.0}], 4),
        ({}, 0.0, [{"CPU": 0.7}, {"CPU": 0.7}], 0),  # nodes, not their sum
        ({}, 0.0, [{"CPU": 0.05}, {"CPU": 4.0}], 3),  # less than nothing is nothing
        ({}, 0.0, [{"GPU": 1.0}], 0),
        ({}, 0.0, [], 0),
        ({}, 1.0, [{"CPU": 16.0, "GPU": 1.0}] * 8, 8),
        ({}, 1.0, [{"CPU": 16.0}], 0),
        ({}, 0.5, [{"CPU": 16.0, "GPU": 1.0}], 2),
        ({}, 0.5, [{"CPU": 2.0, "GPU": 1.0}], 1),
        ({"compute__workers": 2}, 1.0, [{"CPU": 16.0, "GPU": 1.0}] * 9, 4),
        ({"compute__workers": [2, 4]}, 1.0, [{"CPU": 16.0, "GPU": 1.0}] * 9, 4),  # the least that it may have
        ({}, 2.0, [{"CPU": 16.0, "GPU": 1.0}] * 8, 0),
    ],
)
def test_the_runs_that_nodes_hold(changes: dict[str, Any], gpus: float, nodes: list[Node], runs: int) -> None:
    assert fitting_runs(tiny_config(**changes), gpus, nodes) == runs


def test_cpus_that_a_node_keeps_for_other_processes() -> None:
    nodes = [{"CPU": 5.0}]
    assert [fitting_runs(tiny_config(), 0, nodes, beside) for beside in (0.0, 0.1, 1.3, 2.6)] == [4, 3, 2, 1]


@pytest.mark.parametrize(
    ("setting", "nodes", "gpus"),
    [
        ("auto", [{"CPU": 4.0}], 0.0),
        ("auto", [{"CPU": 4.0}, {"CPU": 4.0, "GPU": 2.0}], 1.0),
        ("auto", [{"CPU": 4.0, "GPU": 0.5}], 0.0),
        ("auto", [], 0.0),
        (0.5, [{"CPU": 4.0}], 0.5),
        (0.0, [{"CPU": 4.0, "GPU": 2.0}], 0.0),
    ],
)
def test_the_gpus_of_a_worker(setting: Any, nodes: list[Node], gpus: float) -> None:
    config = tiny_config(compute__gpus_per_worker=setting)
    assert gpus_per_worker(config, Nodes(nodes, [], may_grow=False)) == gpus
    assert gpus_per_worker(config, Nodes([], nodes, may_grow=False)) == gpus
    if setting == "auto" and not gpus:
        with pytest.raises(UserError, match=r"auto: the cluster has no GPU now.* --node-type CPU=16,GPU=1,max=8"):
            gpus_per_worker(config, Nodes(nodes, [], may_grow=True))
    else:
        assert gpus_per_worker(config, Nodes(nodes, [], may_grow=True)) == gpus


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("CPU=16,GPU=1,max=3", [{"CPU": 16.0, "GPU": 1.0}] * 3),
        ("CPU=1.5", [{"CPU": 1.5}]),
        ("CPU=1, max=2", [{"CPU": 1.0}] * 2),
        ("", None),
        ("CPU", None),
        ("CPU=x", None),
        ("CPU=-1", None),
        ("max=3", None),
        ("CPU=1,max=1.5", None),
        ("CPU=1,CPU=2", None),
        ("cpu=16,gpu=1", None),
        ("CPU=1,x=2", [{"CPU": 1.0, "x": 2.0}]),
    ],
)
def test_a_node_type_is_resources_and_a_number(text: str, nodes: list[Node] | None) -> None:
    if nodes is None:
        with pytest.raises(UserError, match=rf"^--node-type '{text}': "):
            parse_node_type(text)
    else:
        assert parse_node_type(text) == nodes


def test_the_nodes_of_a_session(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine alone does not grow; a cluster may, to nodes that are told, or described, or unknown."""
    put_nodes(monkeypatch, {"CPU": 4.0})
    live = [{"CPU": 4.0}]
    assert cluster_nodes(None, ["CPU=8"]) == Nodes(live, [], may_grow=False)
    assert cluster_nodes("auto") == Nodes(live, [], may_grow=True)
    describe(tmp_path, CLUSTER)
    described = nodes_to_come("auto")
    assert described and cluster_nodes("auto") == Nodes(live, described, may_grow=False)
    assert cluster_nodes("auto", ["CPU=8,max=2", "GPU=1"]) == Nodes(
        live, [{"CPU": 8.0}, {"CPU": 8.0}, {"GPU": 1.0}], may_grow=False
    )


def test_an_explicit_request_waits_for_nodes_of_an_unknown_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    nodes = Nodes([{"CPU": 1.0}], [], may_grow=True)
    assert runs_at_a_time(tiny_config(), 1, nodes, trials=9) == 1
    assert runs_at_a_time(tiny_config(), 1, nodes, trials=9, concurrent=3) == 3
    words = "No node has room for a worker (1.25 CPU, 1 GPU) now: waiting for nodes that the cluster starts"
    assert capsys.readouterr().out.splitlines() == [words] * 2


def test_decoding_on_a_gpu_needs_one() -> None:
    table = {("auto", 0.0): False, ("auto", 0.5): True, ("cpu", 0.0): False, ("cpu", 1.0): False, ("gpu", 0.5): True}
    assert {key: decodes_on_gpu(tiny_config(data__decode=key[0]), key[1]) for key in table} == table
    config = tiny_config(data__decode="gpu")
    with pytest.raises(UserError, match=r"^data\.decode: gpu needs a GPU"):
        decodes_on_gpu(config, 0)
    with pytest.raises(UserError, match=r"^data\.decode: gpu needs a GPU"):
        gpus_per_worker(config, Nodes([{"CPU": 4.0}], [], may_grow=False))


CLUSTER: dict[str, Any] = {
    "max_workers": 5,
    "head_node_type": "head",
    "available_node_types": {
        "head": {"resources": {"CPU": 4}, "max_workers": 9},
        "small": {"resources": {"CPU": 8}, "max_workers": 2},
        "gpu": {"resources": {"CPU": 16, "GPU": 1}, "max_workers": 8},
        "reserve": {"resources": {"CPU": 64}},
    },
}


def describe(tmp_path: Path, cluster: dict[str, Any]) -> None:
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(cluster, sort_keys=False))


@pytest.mark.parametrize(
    ("most", "expected"),
    [
        (5, [{"CPU": 8}] * 2 + [{"CPU": 16, "GPU": 1}] * 3),
        (20, [{"CPU": 8}] * 2 + [{"CPU": 16, "GPU": 1}] * 8),
        (0, []),
    ],
)
def test_the_nodes_to_come_are_workers_up_to_the_cluster_s_most(
    most: int, expected: list[Node], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert nodes_to_come("auto") == []  # not on the head of a cluster of `ray up`
    describe(tmp_path, {**CLUSTER, "max_workers": most})
    assert nodes_to_come("auto") == expected
    assert nodes_to_come(None) == []  # a cluster of this machine alone
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert nodes_to_come(None) == expected


@pytest.mark.parametrize(
    ("nodes", "address", "trials", "concurrent", "expected"),
    [
        ([{"CPU": 5.1}], None, 9, None, 4),  # as many as it holds
        ([{"CPU": 5.1}], None, 3, None, 3),  # no more than there are
        ([{"CPU": 5.1}], None, 9, 2, 2),
        ([{"CPU": 5.1}], None, 9, 6, 4),  # a machine alone does not grow
        ([{"CPU": 5.1}], "auto", 9, None, 4),
        ([{"CPU": 5.1}], "auto", 9, 6, 6),  # a cluster may
        ([{"CPU": 5.1}], "auto", 5, 6, 5),
        ([{"CPU": 5.1}], "auto", 9, 1, 1),
        ([{"CPU": 0.5}], "auto", 9, None, 1),  # none fits now, but on nodes to come
        ([{"CPU": 0.5}], "auto", 9, 4, 4),
    ],
)
def test_the_runs_that_go_on_at_a_time(
    nodes: list[Node],
    address: str | None,
    trials: int,
    concurrent: int | None,
    expected: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    describe(tmp_path, CLUSTER)
    put_nodes(monkeypatch, *nodes)
    assert runs_at_a_time(tiny_config(), 0, cluster_nodes(address), trials, concurrent) == expected


def test_a_run_that_fits_nowhere_is_refused_with_all_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs: 4 now, and 2 x 8 + 3 x 16 = 64 to come; 3 GPUs on 6 nodes."""
    describe(tmp_path, CLUSTER)
    put_nodes(monkeypatch, {"CPU": 4.0})
    with pytest.raises(UserError) as caught:
        runs_at_a_time(tiny_config(compute__workers=4), 1, cluster_nodes("auto"), trials=8)
    assert str(caught.value) == (
        "4 worker(s) ask for 1.25 CPUs and 1 GPUs each, 0.1 CPUs beside, and the cluster has 68 CPUs and 3 GPUs on "
        "6 node(s); change compute.workers, compute.cpus_per_worker, compute.gpus_per_worker or the cluster"
    )
    with pytest.raises(UserError, match="the cluster has 4 CPUs and 0 GPUs on 1 node"):
        runs_at_a_time(tiny_config(), 1, cluster_nodes(None))
    with pytest.raises(UserError, match="3 CPUs beside"):
        runs_at_a_time(tiny_config(), 0, cluster_nodes(None), beside=3.0)


@pytest.mark.parametrize(
    ("node", "gpus", "readers"),
    [
        ({"CPU": 2.0}, 0, 1),  # one worker of 1.25 CPUs
        ({"CPU": 16.0}, 0, 1),  # full of workers of 1.25 CPUs
        ({"CPU": 16.0, "GPU": 4.0}, 1, 3),  # 4 CPUs for each GPU, one of them for training
        ({"CPU": 16.0, "GPU": 1.0}, 1, 8),
        ({"CPU": 16.0, "GPU": 1.0}, 0.5, 7),
        ({"CPU": 2.0, "GPU": 1.0}, 1, 1),
        ({}, 1, 1),
    ],
)
def test_auto_reads_with_the_cpus_that_a_node_has_to_spare(node: Node, gpus: float, readers: int) -> None:
    node = {**node, "object_store_memory": 64e9}
    assert reader_count(tiny_config(), gpus, node, 50_000_000) == readers
    assert reader_count(tiny_config(compute__readers=5), gpus, node, 50_000_000) == 5


@pytest.mark.parametrize(("store", "readers"), [(0, 1), (2e9, 4), (3e9, 6), (64e9, 8)])
def test_auto_reads_no_more_batches_than_the_store_holds(store: float, readers: int) -> None:
    """A worker alone on its node has half of the store: of 2 GB five batches of 200 MB, one of them the trainer's."""
    node = {"CPU": 16.0, "GPU": 1.0, "object_store_memory": store}
    assert reader_count(tiny_config(), 1, node, 200_000_000) == readers


@pytest.mark.parametrize(
    ("nodes", "at_a_time", "on_head"),
    [
        ([{"CPU": 4.0, HEAD: 1.0}], 40, True),  # 40 x 0.1 = 4
        ([{"CPU": 4.0, HEAD: 1.0}], 41, False),
        ([{"CPU": 0.0, HEAD: 1.0}, {"CPU": 64.0}], 1, False),
        ([{HEAD: 1.0}], 1, False),
        ([{"CPU": 64.0}], 1, False),
    ],
)
def test_a_trial_s_own_actor_stays_on_the_head_where_it_has_room(
    nodes: list[Node], at_a_time: int, on_head: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_nodes(monkeypatch, *nodes)
    assert trial_resources(at_a_time) == ({"CPU": 0.1, HEAD: 0.001} if on_head else {"CPU": 0.1})


def test_the_placement_groups_of_a_run_have_a_name_of_their_own() -> None:
    """The first 16 digits of the SHA-256 of "abc" (FIPS 180-2)."""
    assert placement_group_prefix("abc") == "tune_ego-ba7816bf8f01cfea-"
    assert placement_group_prefix("abc/") != placement_group_prefix("abc")


def test_ray_divides_what_a_worker_reserves_without_a_remainder() -> None:
    for cpus in (0.45, 0.7, 0.85, 1.1, 3.05):
        reserved = worker_resources(tiny_config(compute__cpus_per_worker=cpus), 0)["CPU"]
        assert all(math.floor(n * reserved / reserved) == n for n in range(1, 100))


@pytest.mark.parametrize(
    ("node", "gpus", "expected"),
    [
        ({"CPU": 2.5, "object_store_memory": 8e9}, 0, 2e9),  # two workers of 1.25 CPUs
        ({"CPU": 16, "GPU": 4, "object_store_memory": 8e9}, 1, 1e9),  # four, as there are four GPUs
        ({"CPU": 16, "GPU": 1, "object_store_memory": 8e9}, 0.5, 2e9),
        ({"CPU": 1, "object_store_memory": 8e9}, 0, 4e9),
        ({}, 0, 0),
    ],
)
def test_a_worker_reads_ahead_its_share_of_the_node_s_store(
    node: dict[str, float], gpus: float, expected: float
) -> None:
    """Half of the store is for what is read ahead."""
    assert read_ahead_bytes(tiny_config(), gpus, node) == expected


def test_a_run_may_need_live_nodes_and_nodes_to_come_together() -> None:
    gpu: Node = {"CPU": 16.0, "GPU": 1.0}
    config = tiny_config(compute__workers=2, train__batch_size=2)
    assert runs_at_a_time(config, 1, Nodes([gpu], [gpu], may_grow=False)) == 1
    with pytest.raises(UserError, match="workers"):
        runs_at_a_time(config, 1, Nodes([gpu], [], may_grow=False))
