"""What `ray_private` uses of Ray: a test for each entry, which fails where an upgrade of Ray moves it."""

from __future__ import annotations

import functools
import inspect
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
import ray
from ray.train import RunConfig, ScalingConfig

from tune_ego import ray_private
from tune_ego.cluster import _VITAL_PROCESSES
from tune_ego.feed.pace import Pace


@pytest.mark.parametrize("workers", [1, 2])
def test_trainer_class(ray_cluster: None, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray has the callbacks that are left out, the handler that is replaced, and the function that is named."""
    from ray.train.v2._internal.execution.worker_group import worker_group
    from ray.util.placement_group import placement_group

    kind = ray_private.trainer_class("tune_ego-1-", workers)
    (base,) = kind.__bases__
    trainer = kind(lambda: None, scaling_config=ScalingConfig(num_workers=workers), run_config=RunConfig())
    before = [type(callback).__name__ for callback in base._create_default_callbacks(trainer)]
    callbacks = trainer._create_default_callbacks()
    after = [type(callback).__name__ for callback in callbacks]
    assert {*before} - {*after} == {"PlacementGroupCleanerCallback", "DatasetsCallback"}
    assert after == [name for name in before if name in after] + ["NamedPlacementGroups"]
    assert callable(base._register_sigint_handler) and trainer._register_sigint_handler(None) is None

    assert "placement_group" in worker_group.WorkerGroup._create_placement_group.__code__.co_names
    monkeypatch.setattr(worker_group, "placement_group", placement_group)  # to be restored
    made: list[Any] = []
    for _ in range(2):
        callbacks[-1].before_worker_group_start(None)
        made.append(worker_group.placement_group)
    assert all(isinstance(group, functools.partial) and group.func is placement_group for group in made)
    names = [group.keywords["name"] for group in made]
    assert names[0] != names[1] and all(name.startswith("tune_ego-1-") for name in names)


def test_preemption_info(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.v2._internal.execution import context
    from ray.train.v2._internal.execution.preemption import PreemptionContext

    assert isinstance(inspect.getattr_static(context.TrainContext, "preemption_context", None), property) or (
        "preemption_context" in context.TrainContext.__dataclass_fields__
    )
    there = PreemptionContext()
    monkeypatch.setattr(context, "get_train_context", lambda: SimpleNamespace(preemption_context=there))
    assert ray_private.preemption_info() is None


def test_live_controllers(ray_cluster: None) -> None:
    """By the name of Ray Train's actor, while it is alive."""
    from ray.train.v2._internal.execution.controller import TrainController

    class Other:
        def ready(self) -> bool:
            return True

    class StandInTrainController(Other):
        pass

    assert TrainController.__name__ == "TrainController"
    other, controller = ray.remote(num_cpus=0)(Other).remote(), ray.remote(num_cpus=0)(StandInTrainController).remote()
    ray.get([other.ready.remote(), controller.ready.remote()])
    names = [actor["ActorClassName"] for actor in ray_private.live_controllers()]
    assert len([name for name in names if name.endswith("StandInTrainController")]) == 1
    assert not any(name.endswith("Other") for name in names)
    ray.kill(controller)
    ray.kill(other)
    end = time.monotonic() + 20
    while any(actor["ActorClassName"].endswith("StandInTrainController") for actor in ray_private.live_controllers()):
        assert time.monotonic() < end
        time.sleep(0.1)


def test_throttling_callback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray calls it at each step; the pause depends on how many blocks are ready."""
    from ray.data._internal.execution.execution_callback import ExecutionCallback
    from ray.data._internal.execution.streaming_executor import StreamingExecutor

    assert callable(ExecutionCallback.on_execution_step)
    assert "self._output_node = " in inspect.getsource(StreamingExecutor)
    pauses: list[float] = []
    ready_blocks: list[int] = []
    pace = Pace()

    def pause(ready: int) -> float:
        ready_blocks.append(ready)
        return 0.04 * (ready + 1)

    monkeypatch.setattr(pace, "pause", pause)
    monkeypatch.setattr(time, "sleep", pauses.append)
    for ready in (0, 3):
        executor = SimpleNamespace(_output_node=(None, SimpleNamespace(output_queue=[None] * ready)))
        ray_private.throttling_callback(pace.pause)().on_execution_step(executor)
    assert ready_blocks == [0, 3] and pauses == pytest.approx([0.04, 0.16])


def test_own_sessions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts each of its processes by the class that is replaced."""
    from ray._private import services

    assert "ConsolePopen(" in inspect.getsource(services.start_ray_process)
    original = services.ConsolePopen
    starts: list[None] = []
    with ray_private.own_sessions(lambda: starts.append(None)) as processes:
        process = services.ConsolePopen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert os.getsid(process.pid) == process.pid and processes == [process] and len(starts) == 1
        process.communicate(b"\n")
    assert services.ConsolePopen is original


def test_dead_processes(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of this driver's cluster: none while it runs, and their names are the ones that are looked for."""
    from ray._private import worker

    assert ray_private.dead_processes() == []
    assert worker._global_node.all_processes.keys() > _VITAL_PROCESSES
    (raylet,) = worker._global_node.all_processes["raylet"]
    here = threading.current_thread()  # another one watches the Ray of this session, and would end it
    monkeypatch.setattr(raylet.process, "poll", lambda: -9 if threading.current_thread() is here else None)
    assert ray_private.dead_processes() == ["raylet"]

    class ChangingNode:
        def is_head(self) -> bool:
            return True

        def dead_processes(self) -> list[tuple[str, object]]:
            raise RuntimeError("dictionary changed size during iteration")

    monkeypatch.setattr(worker, "_global_node", ChangingNode())
    assert ray_private.dead_processes() == []
    monkeypatch.setattr(worker, "_global_node", None)
    assert ray_private.dead_processes() == []


@pytest.fixture
def foreign_server() -> Iterator[str]:
    """The address of a gRPC server that knows no method."""
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(0)


def test_cluster_refusal(ray_cluster: None, foreign_server: str) -> None:
    assert ray_private.cluster_refusal(ray.get_runtime_context().gcs_address, 60) == ""
    start = time.monotonic()
    assert ray_private.cluster_refusal(foreign_server, 6) != ""
    assert time.monotonic() - start < 10


def test_client_server_refusal(ray_cluster: None, foreign_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither a cluster's own port nor another server, and the real one, also where a proxy is set."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    from ray.util.client.server.server import serve

    start = time.monotonic()
    for address in (ray.get_runtime_context().gcs_address, foreign_server):
        assert ray_private.client_server_refusal(address, 10).startswith("not the port of Ray Client, which is 10001")
    assert time.monotonic() - start < 15
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    server = serve("127.0.0.1", port)
    try:
        assert ray_private.client_server_refusal(f"127.0.0.1:{port}", 30) == ""
    finally:
        server.grpc_server.stop(0)
