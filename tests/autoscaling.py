"""A search on a cluster without a worker node, on Ray's fake autoscaler. `tests/search/test_search.py` runs it.

Writes `result.json` beside the search: the numbers of live nodes that were seen, in order, without repetitions; the
trials' states; how many nodes are left a while after the end.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray

from tune_ego.cluster import check_address
from tune_ego.errors import UserError
from tune_ego.search.tune import start_search

CONFIG: dict[str, Any] = {
    "cluster_name": "fake",
    "max_workers": 3,
    "idle_timeout_minutes": 0.1,
    "upscaling_speed": 1.0,
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "cluster_synced_files": [],
    "file_mounts_sync_continuously": False,
    "rsync_exclude": [],
    "rsync_filter": [],
    "initialization_commands": [],
    "setup_commands": [],
    "head_setup_commands": [],
    "worker_setup_commands": [],
    "head_start_ray_commands": [],
    "worker_start_ray_commands": [],
    "head_node_type": "ray.head.default",
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "worker": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 3},
    },
}


def live() -> int:
    return sum(node["Alive"] for node in ray.nodes())


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def start_head(folder: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Start a head with the fake autoscaler, in a process group of its own; return it and its address."""
    config, port = folder / "cluster.json", free_port()
    address = f"{ray.util.get_node_ip_address()}:{port}"
    provider = {**CONFIG["provider"], "gcs_address": address}
    config.write_text(json.dumps({**CONFIG, "provider": provider}))
    command = ["ray", "start", "--head", "--block", "--num-cpus=1", f"--port={port}", "--include-dashboard=false"]
    command += [f"--autoscaling-config={config}", f"--temp-dir={tempfile.mkdtemp()}"]  # short: sockets lie in it
    environment = {**os.environ, "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    log = (folder / "head.log").open("wb")
    head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    for _ in range(60):
        try:
            check_address(address)
            return head, address
        except UserError:
            time.sleep(1)
    raise RuntimeError((folder / "head.log").read_text())


def main(space: str, shards: str, root: str) -> None:
    folder = Path(root).parent
    head, address = start_head(folder)
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
        seen = [live()]
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.2):
                if (count := live()) != seen[-1]:
                    seen.append(count)

        watcher = threading.Thread(target=watch)
        watcher.start()
        search = start_search(space, shards, root, {}, 0, 3, address)
        end = time.monotonic() + 120
        while live() > 1 and time.monotonic() < end:
            time.sleep(1)
        over.set()
        watcher.join()
        result = {"nodes": seen, "states": [trial.state for trial in search.trials], "left": live()}
        (folder / "result.json").write_text(json.dumps(result))
    finally:
        ray.shutdown()
        os.killpg(head.pid, signal.SIGKILL)


if __name__ == "__main__":
    main(*sys.argv[1:])
