"""A final run on a cluster of two worker nodes, one of which is lost, with `notice` after a spot notice.

`python tests/node_loss.py CONFIG SHARDS RUN [notice]`: a program of its own, for it needs its own Ray.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import ray
from ray._private.state import actors
from ray.cluster_utils import Cluster

from tune_ego import experiment
from tune_ego.cluster import _ENVIRONMENT
from tune_ego.config import load_config
from tune_ego.final import train_final


def main(config: str, shards: str, run: str, notice: str = "") -> None:
    os.environ.update(_ENVIRONMENT)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    nodes = {node.node_id: node for node in (cluster.add_node(num_cpus=2) for _ in range(2))}
    ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")

    def lose_the_workers_node() -> None:
        while not experiment.checkpoint_iterations(run):
            time.sleep(0.1)
        workers = [actor for actor in actors().values() if actor["ActorClassName"] == "RayTrainWorker"]
        (node,) = {actor["Address"]["NodeID"] for actor in workers if actor["State"] == "ALIVE"}
        if notice:
            reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            deadline = ["--deadline-remaining-seconds", "60"]
            subprocess.run(["ray", "drain-node", "--address", cluster.address, "--node-id", node, *reason, *deadline])
            while not between_validations():
                time.sleep(0.1)
        cluster.remove_node(nodes[node], allow_graceful=False)
        print(f"lost its node after iteration {experiment.checkpoint_iterations(run)[-1]}")

    def between_validations() -> bool:
        every = load_config(config).train.validate_every
        return any(iteration % every for iteration in experiment.checkpoint_iterations(run))

    thread = threading.Thread(target=lose_the_workers_node)
    thread.start()
    train_final(load_config(config), shards, run, None)
    thread.join()
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
