"""Ray sessions: which cluster is joined or started, and signals within one."""

from __future__ import annotations

import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
import ray

from tune_ego import cluster, ray_private
from tune_ego.cluster import check_address, is_local, ray_session
from tune_ego.driver_signals import end_interrupted, signals_handled
from tune_ego.errors import ClusterLost, UserError


def test_a_cluster_is_local_where_neither_option_nor_environment_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert is_local(None) and not is_local("auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not is_local(None)


def test_a_session_within_another_joins_it_and_leaves_it_running(ray_cluster: None) -> None:
    before = ray.get_runtime_context().get_job_id()
    with ray_session():
        assert ray.get_runtime_context().get_job_id() == before
    assert ray.is_initialized() and ray.get_runtime_context().get_job_id() == before


def test_a_session_s_settings_do_not_replace_the_user_s(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "7")
    monkeypatch.delenv("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS")
    with ray_session():
        assert os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] == "7"
        assert os.environ["TUNE_DISABLE_AUTO_CALLBACK_LOGGERS"] == "1"
        assert os.environ["RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"] == "0"


def test_settings_without_which_nothing_works_are_set_in_any_case(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    required = {
        "RAY_TRAIN_V2_ENABLED": "1",
        "RAY_AIR_NEW_OUTPUT": "0",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    }
    for name, value in required.items():
        monkeypatch.setenv(name, "0" if value == "1" else "1")
    with ray_session():
        assert {name: os.environ[name] for name in required} == required
    code = "import tune_ego.search.tune, ray.train; print(ray.train.RunConfig.__doc__ is not None, ray.train.v2)"
    script = "import tune_ego, ray.train; print(ray.train.FailureConfig(max_preemption_failures=-1))"
    environment = {**os.environ, "RAY_TRAIN_V2_ENABLED": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
    for text in (code, script):  # version 1 has no `max_preemption_failures`
        subprocess.run([sys.executable, "-c", text], env=environment, check=True, capture_output=True)


class Server(threading.Thread):
    """A TCP server that sends `banner` to each client, or nothing."""

    def __init__(self, banner: bytes) -> None:
        super().__init__(daemon=True)
        self.banner, self.socket = banner, socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.socket.getsockname()[1]}"
        self.clients: list[socket.socket] = []
        self.start()

    def run(self) -> None:
        while True:
            client, _ = self.socket.accept()
            self.clients.append(client)
            client.sendall(self.banner)


DEAD = "127.0.0.1:1"


@pytest.mark.parametrize("variable", [False, True])
@pytest.mark.parametrize(
    ("address", "words"),
    [
        (DEAD, "no Ray cluster answers there (.*refused"),
        (f"ray://{DEAD}", "no Ray cluster answers there (.*refused"),
        ("no-such-host.invalid:6379", "no Ray cluster answers there ("),
        ("http://127.0.0.1:8265", "the address of a dashboard"),
        ("here", "not an address; write auto, HOST:PORT or ray://HOST:PORT"),
        ("here:x", "not an address"),
        ("ray://", "not an address"),
    ],
)
def test_an_address_that_does_not_answer_is_named_at_once(
    address: str, words: str, variable: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", address if variable else "10.0.0.1:1")
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        check_address(None if variable else address)
    given = f"RAY_ADDRESS={address}" if variable else f"--address {address}"
    assert re.search(re.escape(f"{given}: ") + ".*" + words.replace("(", r"\("), str(caught.value))
    assert "\n" not in str(caught.value) and time.monotonic() - start < 15


@pytest.mark.parametrize("banner", [b"SSH-2.0-OpenSSH_9.2\r\n", b"HTTP/1.1 400 Bad Request\r\n\r\n", b""])
def test_another_service_at_the_address_is_no_cluster(banner: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_ego.cluster._ANSWER_WITHIN", 0.3)
    server = Server(banner)
    words = "another service answers" if banner else "timed out"
    with pytest.raises(UserError, match=f"--address {server.address}: no Ray cluster answers there .{words}"):
        check_address(server.address)
    monkeypatch.setenv("RAY_USE_TLS", "1")
    assert check_address(server.address) == f"--address {server.address}"  # Ray itself has the certificates


@pytest.mark.slow
def test_another_grpc_server_is_no_cluster() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            start = time.monotonic()
            with pytest.raises(UserError, match=f"--address {address}: no Ray cluster answers there"):
                check_address(address)
            assert time.monotonic() - start < 20
    finally:
        server.stop(0)


def test_a_living_cluster_answers(ray_cluster: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also by `auto`, which is the cluster that Ray has noted last; a note about a dead one is no cluster."""
    address = ray.get_runtime_context().gcs_address
    assert check_address(address) == f"--address {address}"
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    assert check_address("auto") == "--address auto"  # no note: Ray looks for it by itself
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(address)
    assert check_address("auto") == "--address auto"
    (tmp_path / "ray" / "ray_current_cluster").write_text(DEAD)
    with pytest.raises(UserError, match="--address auto: no Ray cluster answers there"):
        check_address("auto")
    monkeypatch.setenv("RAY_ADDRESS", address)  # Ray joins this one
    assert check_address("auto") == "--address auto"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_interrupt_a_session(ray_cluster: None, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with ray_session(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert signal.getsignal(number) == before


def test_a_session_in_another_thread_sets_no_handler(ray_cluster: None) -> None:
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with ray_session():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not errors


def test_an_interrupted_command_says_how_to_resume_and_exits_with_130(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        end_interrupted("tune-ego resume /x")
    assert caught.value.code == 130
    assert capsys.readouterr().out == "Interrupted. To resume from the last checkpoint, run: tune-ego resume /x\n"


def lost(local: bool, started_at: str | None, monkeypatch: pytest.MonkeyPatch) -> str:
    """The message by which `_loss_noticed` ends a body that waits."""
    monkeypatch.setattr(cluster, "_CHECK_EVERY", 0.05)

    def wait() -> None:
        with signals_handled(), cluster._loss_noticed(local) as watch:
            if started_at is not None:
                watch.address = started_at
            time.sleep(20)

    with pytest.raises(ClusterLost) as caught:
        wait()
    return str(caught.value)


def test_a_cluster_that_does_not_start_or_is_silent_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of Ray that dies while Ray starts, a start without end, and a cluster elsewhere that is gone."""
    monkeypatch.setattr(cluster, "ended_processes", lambda: ["dashboard", "gcs_server"])
    start = time.monotonic()
    assert lost(True, None, monkeypatch).startswith("a process of Ray died: gcs_server; its logs: ")
    monkeypatch.setattr(cluster, "ended_processes", lambda: ["dashboard"])
    monkeypatch.setattr(cluster, "_STARTS_WITHIN", 0.2)
    assert lost(True, None, monkeypatch).startswith("Ray has not started in 0 s; its logs: ")
    monkeypatch.setattr(cluster, "_LOST_AFTER", 0.2)
    assert lost(False, DEAD, monkeypatch).startswith(f"the Ray cluster at {DEAD} has not answered for 0 s (")
    assert time.monotonic() - start < 15
    monkeypatch.undo()
    assert (cluster._STARTS_WITHIN, cluster._LOST_AFTER) == (120, 20)


def test_a_process_that_we_end_is_no_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's shutdown ends its processes one after another, and the watching thread looks at them meanwhile."""
    monkeypatch.setattr(cluster, "_CHECK_EVERY", 0.05)
    dead: list[str] = []
    others = {*threading.enumerate()} - {threading.current_thread()}  # one of them watches the Ray of other tests
    monkeypatch.setattr(ray_private, "dead_processes", lambda: [] if threading.current_thread() in others else [*dead])

    def shutdown() -> None:
        dead.append("raylet")
        time.sleep(0.5)

    def leave() -> None:
        with signals_handled(), cluster._loss_noticed(local=True) as watch:
            watch.address = DEAD
            cluster._leave(watch)

    monkeypatch.setattr(ray, "shutdown", shutdown)
    leave()
    with pytest.raises(ClusterLost, match="a process of Ray died: raylet"):  # Ray's shutdown may hang after a loss
        leave()
    dead.clear()
    monkeypatch.setattr(cluster, "_LEAVES_WITHIN", 0.1)
    with pytest.raises(ClusterLost, match="Ray has not ended in 0 s; its logs: "):
        leave()


def test_ray_is_left_whatever_happens_before(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: left.append(gc.isenabled()))
    with cluster._loss_noticed(local=False) as watch:
        cluster._leave(watch)

    def interrupted() -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(cluster, "_describe_dead", lambda names: interrupted())
    with pytest.raises(KeyboardInterrupt), cluster._loss_noticed(local=False) as watch:
        cluster._leave(watch)
    assert left == [False, True]
    assert gc.isenabled()


def test_ray_s_own_exit_at_sigterm_is_an_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    """While Ray starts, its handler of SIGTERM is in place, which exits with 15 without a word."""

    def start(**options: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise SystemExit(15)

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(KeyboardInterrupt):
        cluster._start("", {})
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("given", "words"), [("--address auto", "no Ray cluster answers there"), ("", "its logs: ")])
def test_an_error_of_ray_s_start_is_one_of_the_user_s(given: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example `auto` without a cluster on this machine."""

    def start(**options: object) -> None:
        raise ConnectionError("Could not find any running Ray instance.\nPlease specify the one to connect to.")

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(UserError) as caught:
        cluster._start(given, {})
    assert str(caught.value).startswith(given or "Ray does not start here") and words in str(caught.value)


def test_the_object_store_is_as_large_as_ray_makes_it(ray_cluster: None) -> None:
    """0.3 of the memory; it was 1 GiB once, and seven feeds wrote 11 GB to disk."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert ray.cluster_resources()["object_store_memory"] > 0.1 * min(memory, 16e9)
