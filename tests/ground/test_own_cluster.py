"""What a Ray cluster of our own leaves behind, with real processes: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.drivers import ended_process
from tune_ego import own_cluster
from tune_ego.own_cluster import _Folders, ray_folder
from tune_ego.processes import processes_of_sessions, this_process

SCRIPT = """
import os, signal, sys, threading
from tune_ego.cluster import ray_session
from tune_ego.errors import ClusterLost
from tune_ego.own_cluster import ray_folder
asked = threading.Event()
signal.signal(signal.SIGUSR1, lambda *_: asked.set())
try:
    with ray_session():
        import ray
        ray.get(ray.remote(num_cpus=0)(lambda: 1).remote())
        print(*ray_folder().glob(f"session_*_{os.getpid()}"), flush=True)
        asked.wait(100)
except ClusterLost as error:
    print(error, file=sys.stderr)
    sys.exit(2)
except KeyboardInterrupt:
    sys.exit(130)
"""


GARBAGE = """
import gc, threading, time
import ray
from tune_ego.cluster import ray_session
shutdown = ray.shutdown
def collect():
    time.sleep(0.1)
    gc.collect()
def leave():
    print("off", gc.isenabled())
    threading.Thread(target=collect, daemon=True).start()
    shutdown()
ray.shutdown = leave
with ray_session():
    cycles = [[ray.put(number)] for number in range(100)]
    for cycle in cycles:
        cycle.append(cycle)
    gc.collect()  # now only a full collection looks at them
    del cycles, cycle
print("on", gc.isenabled())
"""


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Ray's folder, with a path that is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="te") as root:
        monkeypatch.setenv("RAY_TMPDIR", root)
        (Path(root) / "ray").mkdir()
        yield Path(root) / "ray"


def test_ray_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._common.utils import get_default_ray_temp_dir

    for variables in ({"RAY_TMPDIR": "/a", "TMPDIR": "/b"}, {"TMPDIR": "/b"}, {}):
        for name in ("RAY_TMPDIR", "TMPDIR"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        assert str(ray_folder()) == get_default_ray_temp_dir()


def test_the_folders_of_three_failures_are_kept(folder: Path) -> None:
    """Only those of sessions that were started here and are over, whatever their drivers' ends."""
    dead, alive = {**this_process(), **ended_process()}, this_process()
    for name, mark in [("1", dead), ("2", dead), ("3", alive), ("4", dead), ("5", dead), ("6", None), ("7", "{")]:
        (folder / f"session_2026_{name}").mkdir()
        if mark is not None:
            text = mark if isinstance(mark, str) else json.dumps(mark)
            (folder / f"session_2026_{name}" / "tune_ego.json").write_text(text)
    (folder / "session_latest").symlink_to(folder / "session_2026_1")
    with own_cluster.own_cluster():  # at its start: a killed process cannot remove them at its end
        remaining = sorted(path.name[-1] for path in folder.glob("session_2*"))
    assert remaining == ["2", "3", "4", "5", "6", "7"]
    assert sorted(path.name[-1] for path in folder.glob("session_2*")) == ["2", "3", "4", "5", "6", "7"]
    assert not (folder / "session_latest").is_symlink()


def test_processes_that_end_while_ray_starts_are_known_by_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a raylet that ends at once, and a process that runs."""
    from ray._private import services

    monkeypatch.setattr(own_cluster, "_started", [])  # without the processes of the cluster that these tests share
    (folder / "raylet").symlink_to("/bin/true")
    with own_cluster.own_cluster():
        services.ConsolePopen([str(folder / "raylet"), "--node"]).wait()
        running = services.ConsolePopen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        assert own_cluster.ended_processes() == ["raylet"]
        running.communicate(b"\n")
    assert own_cluster.ended_processes() == []


def test_a_folder_of_another_process_with_the_same_pid_stays(folder: Path) -> None:
    (folder / f"session_1_{os.getpid()}").mkdir()
    ours = _Folders()
    (folder / f"session_2_{os.getpid()}").mkdir()
    ours.mark()
    assert [path.parent.name[:9] for path in folder.glob("*/tune_ego.json")] == ["session_2"]
    ours.remove()
    assert [path.name[:9] for path in folder.iterdir()] == ["session_1"]
    assert own_cluster._KEPT_FAILURES == 3


@pytest.mark.parametrize(
    ("victim", "code"),
    [
        ("nobody", 0),
        pytest.param("group", 130, marks=pytest.mark.slow),
        ("raylet", 2),
        pytest.param("gcs_server", 2, marks=pytest.mark.slow),
    ],
    ids=["nobody", "group", "raylet", "gcs_server"],
)
def test_nothing_is_left_of_a_session(victim: str, code: int, folder: Path) -> None:
    """After its end, SIGTERM to the driver's process group, and the death of a process of Ray, within 30 s."""
    driver = subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert driver.stdout is not None
    session = Path(driver.stdout.readline().strip())
    assert session.is_dir() and (session / "tune_ego.json").exists()
    commands = {int(path.name): _command(path) for path in Path("/proc").glob("[0-9]*")}
    pids = {pid for pid, command in commands.items() if str(session) in command}
    groups = {os.getsid(pid) for pid in pids}
    assert len(pids) >= 4 and driver.pid not in groups
    start = time.monotonic()
    if victim == "nobody":
        driver.send_signal(signal.SIGUSR1)  # the body ends
    elif victim == "group":
        os.killpg(driver.pid, signal.SIGTERM)
    else:
        target = min(pid for pid in pids if f"/{victim} " in commands[pid])  # a fork of it may be there, too
        os.kill(target, signal.SIGKILL)
    _, errors = driver.communicate(timeout=40)
    assert driver.returncode == code and time.monotonic() - start < 30
    assert session.exists() == (code == 2)
    if code == 2:
        assert f"a process of Ray died: {victim}; its logs: {folder}/session_latest/logs" in errors
    end = time.monotonic() + 5
    while left := [pid for pid in processes_of_sessions(groups) if _command(Path(f"/proc/{pid}"))]:
        assert time.monotonic() < end, left
        time.sleep(0.1)


def test_references_in_cycles_do_not_end_the_process_when_it_leaves_ray(folder: Path) -> None:
    """`prepare` once ended here without a word, and without its last files."""
    run = subprocess.run([sys.executable, "-c", GARBAGE], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "off False\non True\n"), run.stderr


def test_ray_that_does_not_start_is_one_line(folder: Path) -> None:
    """Sockets in a folder with a path of over 107 bytes cannot be opened."""
    long = folder / ("x" * 100)
    code = "from tune_ego.cluster import ray_session\nwith ray_session(): pass"
    environment = {**os.environ, "RAY_TMPDIR": str(long)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    last = run.stderr.splitlines()[-1]
    assert last.startswith("tune_ego.errors.UserError: Ray does not start here (")
    assert last.endswith(f"; its logs: {long}/ray/session_latest/logs")


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
