"""A final run or a search on a cluster of two worker nodes, one of which is lost, with `notice` after a spot notice.

`python tests/node_loss.py train CONFIG SHARDS RUN [notice]` or `... tune SPACE SHARDS ROOT [notice]`: a program of its
own, for it needs its own Ray. Prints the last iteration that was saved, and raises where something is left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from typing import Any

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from tests.search.test_search import assert_it_went_on, assert_nothing_is_left
from tune_ego.cluster import _ENVIRONMENT, _REQUIRED_ENVIRONMENT
from tune_ego.config_io import load_config
from tune_ego.results import checkpoint_files, experiment, trial_records
from tune_ego.runs.final import train_final
from tune_ego.search.tune import start_search


def main(command: str, source: str, shards: str, root: str, notice: str = "") -> None:
    # The session that started this program may have a cluster of its own, which does not watch for spot notices.
    os.environ.update({**_REQUIRED_ENVIRONMENT, **_ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"})
    head = {"num_cpus": 1, "include_dashboard": False}  # for a trial's own actor, and too few for a worker
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=2) for _ in range(2))}
    os.environ["RAY_ADDRESS"] = cluster.address
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
    run = root if command == "train" else trial_records.run_folder(root, "00000")
    before: list[dict[str, Any]] = []

    def lose_the_workers_node() -> None:
        while not checkpoint_files.checkpoint_iterations(run):
            time.sleep(0.1)
        workers = [actor for actor in actors().values() if actor["ActorClassName"] == "RayTrainWorker"]
        (node,) = {actor["Address"]["NodeID"] for actor in workers if actor["State"] == "ALIVE"}
        if notice:
            known = checkpoint_files.checkpoint_iterations(run)
            reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            deadline = ["--deadline-remaining-seconds", "60"]
            # Its own end may take longer than two more checkpoints, of which the second removes the one looked for.
            drain = subprocess.Popen(
                ["ray", "drain-node", "--address", cluster.address, "--node-id", node, *reason, *deadline]
            )
            while all(iteration in known or is_validation(iteration) for iteration in saved()):
                time.sleep(0.05)
            assert drain.wait() == 0
            print("a checkpoint was written out of turn")
        cluster.remove_node(nodes[node], allow_graceful=False)
        last = saved()[-1]
        before.extend(line for line in experiment.read_metrics(run) if line["iteration"] <= last)
        print(f"lost its node after iteration {last}")

    def saved() -> list[int]:
        return checkpoint_files.checkpoint_iterations(run)

    def is_validation(iteration: int) -> bool:
        return iteration % load_config(f"{run}/{experiment.CONFIG_FILE}").train.validate_every == 0

    thread = threading.Thread(target=lose_the_workers_node, daemon=True)
    thread.start()
    if command == "train":
        train_final(load_config(source), shards, root, None)
    else:
        found = start_search(source, shards, root, {}, 0, 1, cluster.address)
        print([trial.state for trial in found.trials])
    thread.join(10)
    assert_it_went_on(before, experiment.read_metrics(run))
    assert_nothing_is_left()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
