"""Starting, joining and leaving a Ray cluster, quietly."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from tune_ego.console import say
from tune_ego.errors import UserError

_ANSWER_WITHIN = 5.0
"""Seconds to connect to a cluster's address, and for its first answer."""

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
    if value == "auto":
        rest = _running_cluster()
    if value == "local" or (separator and scheme != "ray") or not rest:
        return given
    host, separator, port = rest.rpartition(":")
    if not separator or not port.isdecimal():
        raise UserError(f"{given}: not an address; write auto, HOST:PORT or ray://HOST:PORT")
    reason = _refusal(host.strip("[]"), int(port))
    if reason:
        raise UserError(f"{given}: no Ray cluster answers there ({reason})")
    return given


def _running_cluster() -> str:
    """Return HOST:PORT of the cluster that was started last on this machine, "" without one (Ray says so itself)."""
    file = Path(os.environ.get("RAY_TMPDIR", "/tmp"), "ray", "ray_current_cluster")
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
    import ray

    if ray.is_initialized():
        with _sigterm_as_sigint():
            yield
        return
    alone = {"address": "local", "include_dashboard": False}
    options: dict[str, Any] = alone if local else {"address": address}
    given = "" if local else check_address(address)
    for name in ("ray.data", "ray.train", "ray.tune"):  # tune_ego prints the failures of trials itself
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        ray.init(log_to_driver=False, logging_level="ERROR", **options)
    except (ConnectionError, ValueError) as error:
        where = "Ray does not start here" if local else f"{given}: no Ray cluster answers there"
        raise UserError(f"{where} ({error})") from error
    try:
        with _sigterm_as_sigint():
            yield
    finally:
        ray.shutdown()


@contextmanager
def _sigterm_as_sigint() -> Iterator[None]:
    """Handle SIGTERM, which schedulers and clouds send, as Ctrl+C."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        handler = signal.getsignal(signal.SIGINT)
        if not callable(handler):  # a shell's background process ignores Ctrl+C
            raise KeyboardInterrupt
        handler(number, frame)

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


INTERRUPTED = 130
"""Exit code of a command that was interrupted, as shells have it."""


def end_interrupted(resume_command: str) -> NoReturn:
    """Print how to resume, and end this process with the exit code of an interrupted command."""
    say(f"Interrupted. To resume from the last checkpoint, run: {resume_command}")
    raise SystemExit(INTERRUPTED)
