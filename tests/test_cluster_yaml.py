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

from tests.test_search import write_space
from tune_ego.experiment import read_experiment

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def test_ray_accepts_it_and_every_type_is_used() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(fillout_defaults(config))
    assert config["head_node_type"] in config["available_node_types"]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])
    installed = re.search(r"ray\[default\]==([\d.]+)", " ".join(config["setup_commands"]))
    assert installed is not None and installed[1] == ray.__version__


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
    environment |= {"PYTHONPATH": str(Path(__file__).parents[1]), "RAY_AUTH_MODE": "token"}
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
