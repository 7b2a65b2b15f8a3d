"""Starting, joining and leaving a Ray cluster, quietly."""

from __future__ import annotations

import gc
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from tune_ego import ray_private
from tune_ego.driver_signals import abort, signals_handled
from tune_ego.errors import ClusterLost, UserError
from tune_ego.own_cluster import ended_processes, own_cluster, ray_folder

# Seconds.
_ANSWER_WITHIN = 4.0
"""To connect to a cluster's address, and for its first answer."""
_HEALTHY_WITHIN = 14.0
"""For all of the check of an address: connection, first answer, and a real request by a process of its own."""
_REQUEST_WITHIN = 5.0
"""For the real request at least, where the address itself was slow."""
_STARTS_WITHIN = 120.0
"""For Ray to start on this machine, or to connect."""
_LEAVES_WITHIN = 60.0
"""For Ray on this machine to end."""
_CHECK_EVERY = 2.0
"""Between two checks whether the cluster is still there."""
_LOST_AFTER = 20.0
"""Silence of a cluster elsewhere after which it counts as lost."""
_VITAL_PROCESSES = {"gcs_server", "raylet"}

_REQUIRED_ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # signals are handled by `results.driver`
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # runs keep their own metrics
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # a failed trial reports nothing; its reason is in its files
}
"""Variables that are set in any case: with other values searches and runs fail."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # reports are polled at this rate; the default is 2 s
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
}
_LOCAL_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    # Ray ends idle readers after this time (default: 1 s), and starting a new one takes seconds.
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    # No dashboard runs here, and Ray's background work makes the threads of training wait for each other.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_event_stats": "0",
    "RAY_enable_metrics_collection": "0",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # from this number of files on, the monitor polls less often
    "MALLOC_ARENA_MAX": "1",  # workers train in a thread, whose own arena would hold no large tensors
}


def is_local(address: str | None) -> bool:
    """Return whether `ray_session` starts a cluster on this machine."""
    return address is None and not os.environ.get("RAY_ADDRESS")


def check_address(address: str | None) -> str:
    """Return `--address ...` or `RAY_ADDRESS=...`, whichever names the cluster, after trying to reach it.

    Ray itself waits for minutes and prints pages. Raises `UserError` where nothing answers, or something else than Ray.
    """
    given = f"RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}" if address is None else f"--address {address}"
    value = os.environ.get("RAY_ADDRESS", "") if address is None else address
    scheme, separator, rest = value.rpartition("://")
    if scheme in ("http", "https"):
        raise UserError(
            f"{given}: this is the address of a dashboard, for `ray job submit`; on a machine of the cluster: auto"
        )
    if value == "auto":  # Ray joins the cluster of RAY_ADDRESS first
        named = os.environ.get("RAY_ADDRESS", "auto")
        rest = _running_cluster() if named == "auto" else named.rpartition("://")[2]
    if value == "local" or (separator and scheme != "ray") or (value == "auto" and not rest):
        return given
    host, separator, port = rest.rpartition(":")
    if not separator or not port.isdecimal():
        raise UserError(f"{given}: not an address; write auto, HOST:PORT or ray://HOST:PORT")
    end = time.monotonic() + _HEALTHY_WITHIN
    reason = _refusal(host.strip("[]"), int(port))
    if not reason and os.environ.get("RAY_USE_TLS") != "1":  # with TLS Ray itself has the certificates
        answers = ray_private.client_server_refusal if scheme == "ray" else ray_private.cluster_refusal
        reason = answers(rest, max(_REQUEST_WITHIN, end - time.monotonic()))
    if reason:
        raise UserError(f"{given}: no Ray cluster answers there ({reason})")
    return given


def _running_cluster() -> str:
    """Return HOST:PORT of the cluster that Ray has noted as the last one of this machine; "" without one."""
    file = ray_folder() / "ray_current_cluster"
    return file.read_text().strip() if file.is_file() else ""


def _refusal(host: str, port: int) -> str:
    """Return the reason why no gRPC server answers at an address; "" if one does.

    The greeting is HTTP/2's (RFC 9113, section 3.4): its preface and an empty SETTINGS frame, to which a server answers
    with a SETTINGS frame, of type 4.
    """
    greeting = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
    try:
        with socket.create_connection((host, port), _ANSWER_WITHIN) as connection:
            if os.environ.get("RAY_USE_TLS") == "1":
                return ""
            connection.sendall(greeting)
            answer = connection.recv(9)
    except OSError as error:
        return str(error) or type(error).__name__
    return "" if len(answer) >= 4 and answer[3] == 4 else "another service answers"


@contextmanager
def ray_session(address: str | None = None) -> Iterator[None]:
    """Connect to the Ray cluster at `address` for the body; without one, start a cluster that ends with the body.

    A process that is already connected keeps its connection. Raises `UserError` where no cluster answers or starts.
    """
    local = is_local(address)
    os.environ.update(_REQUIRED_ENVIRONMENT)
    for key, value in {**_ENVIRONMENT, **(_LOCAL_ENVIRONMENT if local else {})}.items():
        os.environ.setdefault(key, value)
    import ray  # late: seconds to import

    if ray.is_initialized():
        with signals_handled():
            yield
        return
    given = "" if local else check_address(address)
    for name in ("ray.data", "ray.train", "ray.tune"):  # tune_ego prints the failures of trials itself
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with signals_handled(), own_cluster() if local else nullcontext(), _loss_noticed(local) as watch:
        _start(given, {"address": "local", "include_dashboard": False} if local else {"address": address})
        watch.address = ray.get_runtime_context().gcs_address
        try:
            yield
        finally:
            _leave(watch)


def _leave(watch: _Watch) -> None:
    """Disconnect from Ray, and end its processes if they were started here.

    Ray ends this process, without a message of ours, if a reference to one of its objects is deleted in another thread
    while it disconnects. Ray Data leaves such references in cycles. So the garbage collector runs before, and is off
    meanwhile.
    """
    import ray  # late: seconds to import

    collects = gc.isenabled()
    try:
        if not _describe_dead(ray_private.dead_processes()):
            watch.leaving.set()
        gc.collect()
        gc.disable()
    finally:
        try:
            ray.shutdown()
        finally:
            if collects:
                gc.enable()


def _start(given: str, options: dict[str, Any]) -> None:
    """Connect to a cluster, or start one where `given`, its address, is empty. Raises `UserError`."""
    import ray  # late: seconds to import

    handler = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except SystemExit as end:  # Ray's own handler of SIGTERM, while it starts
        raise KeyboardInterrupt from end
    except Exception as error:
        if given:
            raise UserError(f"{given}: no Ray cluster answers there ({error})") from error
        raise UserError(f"Ray does not start here ({error}); its logs: {ray_folder()}/session_latest/logs") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, handler)


class _Watch:
    """State of a Ray session, shared with the thread that watches it."""

    def __init__(self) -> None:
        self.address = ""
        """HOST:PORT of the cluster once Ray has started."""
        self.leaving = threading.Event()
        """Set when Ray's processes, all alive until then, are ended on purpose."""
        self.ended = threading.Event()


@contextmanager
def _loss_noticed(local: bool) -> Iterator[_Watch]:
    """Raise `ClusterLost` in the main thread if the cluster does not start, or is lost while the body runs.

    Ray itself would wait for ever, or end the process without a message. The body sets `address` of the yielded
    `_Watch` once Ray has started, and `leaving` before it leaves Ray.
    """
    watch, deadline = _Watch(), time.monotonic() + _STARTS_WITHIN

    def look() -> None:
        while not watch.ended.wait(_CHECK_EVERY):
            if watch.address:
                reason = _describe_dead(ray_private.dead_processes()) if local else _silence(watch)
            elif time.monotonic() > deadline:
                reason = f"Ray has not started in {_STARTS_WITHIN:.0f} s"
            else:  # Ray's own client would end this process after 60 s without a line of ours
                reason = _describe_dead(ended_processes()) if local else ""
            if local and watch.leaving.is_set():  # checked last: it may have been set during the checks above
                reason = "" if watch.ended.wait(_LEAVES_WITHIN) else f"Ray has not ended in {_LEAVES_WITHIN:.0f} s"
            if reason and not watch.ended.is_set():
                logs = f"; its logs: {ray_folder()}/session_latest/logs" if local else ""
                abort(ClusterLost(f"{reason}{logs}"), watch.ended)
                return

    if threading.current_thread() is threading.main_thread():
        threading.Thread(target=look, daemon=True).start()
    try:
        yield watch
    finally:
        watch.ended.set()


def _describe_dead(names: list[str]) -> str:
    dead = sorted(set(names) & _VITAL_PROCESSES)
    return f"a process of Ray died: {', '.join(dead)}" if dead else ""


def _silence(watch: _Watch) -> str:
    """Return a message if a cluster does not answer for `_LOST_AFTER` seconds; "" as soon as it answers."""
    host, _, port = watch.address.rpartition(":")
    end = time.monotonic() + _LOST_AFTER
    while (reason := _refusal(host.strip("[]"), int(port))) and not watch.ended.wait(_CHECK_EVERY):
        if time.monotonic() > end:
            return f"the Ray cluster at {watch.address} has not answered for {_LOST_AFTER:.0f} s ({reason})"
    return ""
