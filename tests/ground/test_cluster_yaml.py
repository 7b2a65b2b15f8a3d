"""`cluster.yaml`, checked offline by Ray's own validator, and its command line through Ray's jobs."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import ray
import yaml

from tests.search.test_search import write_space
from tune_ego.results.experiment import read_experiment

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"


def test_ray_accepts_it_and_every_type_is_used() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(fillout_defaults(config))
    assert config["head_node_type"] in config["available_node_types"]


def test_every_node_has_the_project_s_ray() -> None:
    """`ray[default,train,tune,data]==2.60.*` in pyproject.toml: 2.60.0 on the nodes."""
    setup = " ".join(yaml.safe_load(CLUSTER.read_text())["setup_commands"])
    project = re.search(r'"ray\[[\w,]+\]==([\d.]+)\.\*"', (CLUSTER.parent / "pyproject.toml").read_text())
    installed = re.search(r"ray\[default\]==([\d.]+)", setup)
    assert project is not None and installed is not None
    assert installed[1] == ray.__version__ and installed[1] == f"{project[1]}.0"


def test_strangers_reach_neither_the_dashboard_nor_a_node() -> None:
    """The dashboard on loopback, a token for every node, and no other port open to all."""
    config = yaml.safe_load(CLUSTER.read_text())
    (head,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    (worker,) = [command for command in config["worker_start_ray_commands"] if "ray start" in command]
    assert head.split() == [
        "RAY_AUTH_MODE=token",
        "ray",
        "start",
        "--head",
        "--port=6379",
        "--dashboard-host=127.0.0.1",
        "--autoscaling-config=~/ray_bootstrap_config.yaml",
    ]
    assert worker.split() == ["RAY_AUTH_MODE=token", "ray", "start", "--address=$RAY_HEAD_IP:6379"]
    (notice,) = [command for command in config["worker_start_ray_commands"] if "drain-node" in command]
    assert notice.startswith("RAY_AUTH_MODE=token") and "DRAIN_NODE_REASON_PREEMPTION" in notice
    assert config["file_mounts"]["/home/ubuntu/.ray/auth_token"] == "~/.ray/auth_token"
    assert "0.0.0.0" not in CLUSTER.read_text()


def test_workers_come_and_go_and_the_head_stays() -> None:
    """Spot workers from none to eight; a head on demand, which is no worker."""
    config = yaml.safe_load(CLUSTER.read_text())
    head, worker = (config["available_node_types"][name] for name in ("head", "gpu_worker"))
    assert config["head_node_type"] == "head" and config["max_workers"] == worker["max_workers"] == 8
    assert worker["min_workers"] == 0 and config["idle_timeout_minutes"] == 10
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in head["node_config"]


@pytest.mark.parametrize("kind", ["head_start_ray_commands", "worker_start_ray_commands", "setup_commands"])
def test_the_shell_understands_its_commands(kind: str) -> None:
    for command in yaml.safe_load(CLUSTER.read_text())[kind]:
        subprocess.run(["bash", "-n", "-c", command], check=True)


def test_an_unknown_key_is_rejected() -> None:
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(Exception, match="max_wrokers"):
        validate_config({**yaml.safe_load(CLUSTER.read_text()), "max_wrokers": 3})


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [found.getsockname()[1] for found in sockets]
    for found in sockets:
        found.close()
    return ports


@pytest.mark.slow
def test_a_search_as_a_job(tmp_path: Path, shards: str) -> None:
    """The command line that cluster.yaml tells, submitted to a cluster on this machine, from a folder of its own."""
    command = re.search(r"ray job submit --address \S+ -- (tune-ego tune) full", CLUSTER.read_text())
    assert command is not None
    port, dashboard, agent = free_ports(3)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{environment['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[2]), "RAY_AUTH_MODE": "token"}
    environment["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    space = write_space(tmp_path, grace=4, **{"train.iterations": 4, "compute.cpus_per_worker": 0.5})
    listening = ["--port", str(port), "--dashboard-port", str(dashboard), "--dashboard-agent-listen-port", str(agent)]
    head = subprocess.Popen(
        ["ray", "start", "--head", "--block", "--num-cpus=2", "--dashboard-host=127.0.0.1", *listening],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address = f"http://127.0.0.1:{dashboard}"
        for _ in range(60):
            if (
                subprocess.run(
                    ["ray", "job", "list", "--address", address], env=environment, capture_output=True
                ).returncode
                == 0
            ):
                break
        arguments = [space, "--data", shards, "--storage", str(tmp_path), "--name", "search"]
        job = subprocess.run(
            ["ray", "job", "submit", "--address", address, "--", *command[1].split(), *arguments],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=240,
        )
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait()
    assert job.returncode == 0, job.stdout + job.stderr
    assert "succeeded" in job.stdout
    assert [trial.state for trial in read_experiment(str(tmp_path / "search")).trials] == ["finished", "finished"]
