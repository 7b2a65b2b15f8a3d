"""The parts of Ray that are not public, all of them: no other file of this package may import one.

Everything here was read in Ray 2.60. `tests/ground/test_ray_private.py` has a test for each entry, named after it: when
one fails after an upgrade of Ray, re-read what its docstring names. No torch is imported here for runs of one worker.
"""

from __future__ import annotations

import functools
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def trainer_class(group_prefix: str, workers: int) -> Any:
    """Return Ray Train's trainer class for a run: named placement groups, and no callbacks that this package replaces.

    Private in Ray: `WorkerGroupCallback`, the base class `DataParallelTrainer`, its methods
    `_create_default_callbacks` and `_register_sigint_handler`, and the function `placement_group` in the module
    `worker_group`.

    - A trial that is stopped or dies leaves its placement group behind. The search removes it by its name
      (`group_prefix`). Ray 2.60 creates the group without a name and has no setting for one: the function
      that creates it is replaced in the process of the run's controller, before each start of the workers.
    - `PlacementGroupCleanerCallback` starts a detached actor for each run, which asks the dashboard whether the run
      is alive. There may be no dashboard, and the actor may outlive the search.
    - `DatasetsCallback` splits data sets between workers. Here every worker reads its own items.
    - Ray's SIGINT handler waits for the end of the run, stays installed after it, and may exit with code 0.
    - A run of one worker needs no process group: without `TorchTrainer`, its two watching processes need no torch.
    """
    from ray.train.v2._internal.execution.callback import WorkerGroupCallback
    from ray.util.placement_group import placement_group

    if workers > 1:
        from ray.train.torch import TorchTrainer as Base
    else:
        from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer as Base

    class NamedPlacementGroups(WorkerGroupCallback):  # type: ignore[misc]
        def before_worker_group_start(self, worker_group_context: Any) -> None:
            from ray.train.v2._internal.execution.worker_group import worker_group

            name = group_prefix + uuid.uuid4().hex
            worker_group.placement_group = functools.partial(placement_group, name=name)

    class TrainerWithNamedGroups(Base):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            replaced = {"PlacementGroupCleanerCallback", "DatasetsCallback"}
            kept = [c for c in super()._create_default_callbacks() if type(c).__name__ not in replaced]
            return [*kept, NamedPlacementGroups()]

        def _register_sigint_handler(self, controller: Any) -> None:
            """Install no handler."""

    return TrainerWithNamedGroups


def preemption_info() -> Any:
    """Return Ray Train's latest preemption notice for this worker's node, or None.

    Private in Ray: `get_train_context().preemption_context`. The public `ray.train.get_preemption_info` is a barrier
    of all workers, too slow to call after every iteration.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    return get_train_context().preemption_context.preemption_info


def live_controllers() -> list[Any]:
    """Return Ray Train's controller actors of this driver's job that are alive.

    Private in Ray: `ray._private.state.actors`. The public `ray.util.state.list_actors` needs the dashboard, which
    a local cluster does not start.
    """
    import ray
    from ray._private.state import actors

    job = ray.get_runtime_context().get_job_id()
    live = actors(job_id=ray.JobID.from_hex(job), actor_state_name="ALIVE").values()
    return [actor for actor in live if actor["ActorClassName"].endswith("TrainController")]


def throttling_callback(pause: Callable[[int], float]) -> type:
    """Return a Ray Data callback class that makes the executor sleep between steps while the trainer needs no data.

    `pause` returns the seconds to sleep, given the number of blocks that are ready.

    Private in Ray: `ExecutionCallback` and the executor's `_output_node`. The executor is a thread of the training
    process; its steps take a millisecond each and follow each other without a pause. That slowed training on two
    cores to a third, and Ray 2.60 has no setting for it.
    """
    from ray.data._internal.execution.execution_callback import ExecutionCallback

    class Throttle(ExecutionCallback):  # type: ignore[misc]
        def on_execution_step(self, executor: Any) -> None:
            _, last = executor._output_node
            time.sleep(pause(len(last.output_queue)))

    return Throttle


@contextmanager
def own_sessions(started: Callable[[], None]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Start each of Ray's processes, which `ray.init` in the body starts, in a session of its own. Yield the processes.

    `started` is called after each start.

    Private in Ray: `services.ConsolePopen`. `timeout`, systemd, Slurm and container runtimes signal the whole process
    group. Ray's processes in it would die before the driver has ended its runs. Ray 2.60 has no setting for it.
    """
    from ray._private import services

    original, processes = services.ConsolePopen, list[subprocess.Popen[bytes]]()

    def start(*arguments: Any, **options: Any) -> Any:
        process = original(*arguments, **{**options, "start_new_session": True})
        processes.append(process)
        started()
        return process

    services.ConsolePopen = start
    try:
        yield processes
    finally:
        services.ConsolePopen = original


def dead_processes() -> list[str]:
    """Return the names of the processes of this driver's own cluster that have died, e.g. `raylet`.

    Private in Ray: `worker._global_node.dead_processes`. Ray itself does not notice them, and calls wait for ever.
    """
    from ray._private import worker

    node = worker._global_node
    try:
        return [name for name, _ in node.dead_processes()] if node is not None and node.is_head() else []
    except RuntimeError:  # another thread starts or ends processes: the dictionary changes
        return []


def cluster_refusal(address: str, seconds: float) -> str:
    """Return the reason why no Ray cluster of this version answers at HOST:PORT within some seconds; "" if one does.

    Private in Ray: the command `ray health-check`, which Ray's own readiness probes run. `ray.init` waits for minutes
    where another gRPC server answers.
    """
    command = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        check = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return f"no answer of a Ray cluster in {seconds:.0f} s"
    lines = [line for line in (check.stdout + check.stderr).splitlines() if line.strip()]
    return "" if check.returncode == 0 else (lines[-1].strip()[:300] if lines else "not a Ray cluster")


def client_server_refusal(address: str, seconds: float) -> str:
    """Return the reason why no server of Ray Client answers at HOST:PORT within some seconds; "" if one does.

    Private in Ray: the gRPC method `/ray.rpc.RayletDriver/ClusterInfo`. `ray.init("ray://...")` waits for half a
    minute where the port is another one, for example that of the cluster itself.
    """
    import grpc

    # As Ray itself connects: never by a proxy.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary("/ray.rpc.RayletDriver/ClusterInfo")(b"", timeout=seconds)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.UNAVAILABLE):
                return f"not the port of Ray Client, which is 10001 by default: {error.details()}"
            if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
                return f"no answer of Ray Client in {seconds:.0f} s"
    return ""
