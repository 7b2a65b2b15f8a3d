"""`cluster.yaml`, checked offline by Ray's own validator, and its command line through Ray's jobs."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import ray
import typer.main
import yaml
from packaging.requirements import Requirement

from tests.search.test_search import write_space
from tune_ego import __version__
from tune_ego.cli import app
from tune_ego.results.reading import read_experiment
from tune_ego.runs.placement import parse_node_type

CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
FILES = CLUSTER.parent / "docs" / "clusters"
CONSTRAINTS = FILES / "constraints.txt"


def test_ray_accepts_it_and_every_type_is_used() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(fillout_defaults(config))
    assert config["head_node_type"] in config["available_node_types"]


def test_every_node_has_the_project_s_versions() -> None:
    """The constraints fit all dependencies, and hold the Ray of these tests."""
    pins = dict(line.split("==") for line in CONSTRAINTS.read_text().lower().splitlines() if not line.startswith("#"))
    needed = [Requirement(text) for text in requires("tune_ego") or []]
    checked = [one for one in needed if one.marker is None or one.marker.evaluate({"extra": "aws"})]
    assert {"torch", "ray", "boto3"} <= {one.name for one in checked}
    for one in checked:
        assert one.specifier.contains(pins[one.name.lower()]), one
    assert pins["ray"] == ray.__version__
    assert pins["opencv-python-headless"] == pins["opencv-python"]
    installs = [
        command for command in yaml.safe_load(CLUSTER.read_text())["setup_commands"] if "pip install" in command
    ]
    assert len(installs) == 2 and all("-c /home/ubuntu/tune_ego/docs/clusters/constraints.txt" in c for c in installs)


def test_a_worker_without_a_usable_gpu_does_not_join() -> None:
    (command,) = yaml.safe_load(CLUSTER.read_text())["worker_setup_commands"]
    code = command.partition(" -c ")[2].strip('"')
    for available, fails in (("True", False), ("False", True)):
        script = f"import torch; torch.cuda.is_available = lambda: {available}; {code}"
        assert bool(subprocess.run([sys.executable, "-c", script], capture_output=True).returncode) == fails


def test_the_nodes_have_an_image_and_the_roles_of_the_policies() -> None:
    """The head may start workers and pass them their role, and no other; both images are one."""
    types = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    head, worker = (types[name]["node_config"] for name in ("head", "gpu_worker"))
    assert head["ImageId"] == worker["ImageId"] and "ubuntu-24.04" in head["ImageId"]
    policy = json.loads((FILES / "head-policy.json").read_text())["Statement"]
    (passes,) = [statement for statement in policy if statement["Action"] == "iam:PassRole"]
    assert passes["Resource"] == f"arn:aws:iam::*:role/{worker['IamInstanceProfile']['Name']}"
    assert head["IamInstanceProfile"]["Name"] == "tune-ego-head"
    for file in FILES.glob("*.json"):
        content = json.loads(file.read_text())
        assert content["Version"] == "2012-10-17" and all("Effect" in one for one in content["Statement"])


def test_the_kubernetes_job_fits_its_schema_and_its_command_the_command_line() -> None:
    """Pods by Kubernetes' schema; one GPU group from none, with shared memory for Ray's store; the versions of here."""
    job = yaml.safe_load((FILES / "rayjob.yaml").read_text())
    spec = job["spec"]["rayClusterSpec"]
    assert spec["rayVersion"] == ray.__version__ and spec["authOptions"] == {"mode": "token"}
    (workers,) = spec["workerGroupSpecs"]
    assert (workers["replicas"], workers["minReplicas"], spec["enableInTreeAutoscaling"]) == (0, 0, True)
    for group in (spec["headGroupSpec"], workers):
        pod = group["template"]["spec"]
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod}, "1.31", strict=True
        )
        (container,) = pod["containers"]
        assert container["image"].endswith(f":{__version__}")
        assert {"name": "shm", "mountPath": "/dev/shm"} in container["volumeMounts"]
        assert [volume["emptyDir"]["medium"] for volume in pod["volumes"]] == ["Memory"]
    _, *words = job["spec"]["entrypoint"].split()
    options = parsed(words)
    nodes = parse_node_type(*options["node_type"])
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert len(nodes) == workers["maxReplicas"] == options["concurrent"]
    assert nodes[0] == {"CPU": float(limits["cpu"]), "GPU": float(limits["nvidia.com/gpu"])}


def parsed(words: list[str]) -> dict[str, Any]:
    """The options of a command, as the command line understands them."""
    group = typer.main.get_command(app)
    command = group.commands[words[0]]  # type: ignore[attr-defined]
    return dict(command.make_context("tune-ego", words[1:]).params)


def test_the_slurm_job_starts_ray_and_a_command() -> None:
    text = (FILES / "slurm.sh").read_text()
    subprocess.run(["bash", "-n", str(FILES / "slurm.sh")], check=True)
    commands = re.findall(r"command=\(tune-ego (.+)\)", text)
    assert [parsed(command.split())["address"] for command in commands] == ["auto", "auto"]
    usage = subprocess.run(
        [f"{Path(sys.executable).parent}/ray", "symmetric-run", "--help"], capture_output=True, text=True
    )
    assert usage.returncode == 0 and "--min-nodes" in usage.stdout


@pytest.mark.parametrize("started_before", [False, True])
def test_the_slurm_job_signals_the_driver_alone_and_resumes_a_search(tmp_path: Path, *, started_before: bool) -> None:
    """Stand-ins for Slurm's and Ray's commands. Slurm sends SIGTERM to the script two minutes before the end."""
    programs = {
        "scontrol": "echo node1",
        "srun": """trap 'echo srun was killed >> "$log"' TERM; shift; "$@" & wait $!""",
        "ray": 'while [ "$1" != -- ]; do shift; done; shift; "$@"; code=$?; echo "ray saw $code" >> "$log"; exit $code',
        "tune-ego": f"""if [ "$1" = status ]; then exit {0 if started_before else 2}; fi
            echo "$@" >> "$log"; trap 'echo checkpoint >> "$log"; exit 130' TERM; while :; do sleep 0.1; done""",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "bin" / "activate").write_text("")
    log = tmp_path / "log"
    slurm = {"SLURM_JOB_NODELIST": "node[1-4]", "SLURM_JOB_NUM_NODES": "4", "SLURM_CPUS_PER_TASK": "16"}
    paths = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}
    job = subprocess.Popen(["bash", str(FILES / "slurm.sh")], env={**os.environ, **slurm, **paths, "log": str(log)})
    end = time.monotonic() + 30
    while not log.exists() and time.monotonic() < end:
        time.sleep(0.05)
    time.sleep(0.3)
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 130
    verb = "resume RESULTS/full" if started_before else "tune full --data SHARDS --storage RESULTS --name full"
    assert log.read_text().splitlines() == [f"{verb} --address auto", "checkpoint", "ray saw 130"]


def test_the_image_has_the_package_with_pinned_versions_and_no_desktop() -> None:
    text = (FILES / "Dockerfile").read_text()
    assert text.count("-c /opt/tune_ego/docs/clusters/constraints.txt") == 2 and "uninstall -y opencv-python" in text
    assert re.search(r"^FROM python:3\.\d+-slim-\w+$", text, re.MULTILINE) and "USER ray" in text


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
    resources: dict[str, Any] = {"compute.cpus_per_worker": 0.5, "compute.gpus_per_worker": 0}
    space = write_space(tmp_path, grace=4, **{"train.iterations": 4, **resources})
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
