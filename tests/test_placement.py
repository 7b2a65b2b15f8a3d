"""What fits on a cluster, now and when it has grown."""

from __future__ import annotations

from pathlib import Path

import pytest
import ray
import yaml

from tests.conftest import tiny_config
from tune_ego.errors import UserError
from tune_ego.placement import (
    fitting_runs,
    gpus_per_worker,
    nodes_to_come,
    runs_at_a_time,
    trial_resources,
    worker_resources,
)


def test_runs_are_placed_on_nodes_not_on_their_sum() -> None:
    nodes = [{"CPU": 16.0, "GPU": 1.0}] * 8
    assert fitting_runs(tiny_config(), 1.0, nodes) == 8
    assert fitting_runs(tiny_config(compute__workers=2), 1.0, nodes) == 4
    assert fitting_runs(tiny_config(compute__gpus_per_worker=2.0), 2.0, nodes) == 0


@pytest.mark.parametrize("cpus", [0.45, 0.7, 0.85, 1.1, 3.05])
def test_ray_divides_what_a_worker_reserves_without_a_remainder(cpus: float) -> None:
    reserved = worker_resources(tiny_config(compute__cpus_per_worker=cpus), 0)["CPU"]
    assert cpus + 0.25 <= reserved < cpus + 0.25 + 1 / 16
    assert all((n * reserved) // reserved == n for n in range(1, 100))


def test_a_cluster_that_grows_takes_what_it_will_have_room_for(
    tmp_path: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {"max_workers": 8, "resources": {"CPU": 1024, "GPU": 1}}
    cluster = {
        "max_workers": 3,
        "head_node_type": "head",
        "available_node_types": {"head": {"resources": {"CPU": 4}}, "gpu": gpu},
    }
    (tmp_path / "ray_bootstrap_config.yaml").write_text(yaml.safe_dump(cluster))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nodes_to_come(None) == []  # a cluster of this machine alone
    assert nodes_to_come("auto") == [{"CPU": 1024, "GPU": 1}] * 3
    assert gpus_per_worker(tiny_config(), nodes_to_come("auto")) == 1
    assert runs_at_a_time(tiny_config(), 1, "auto", trials=8) == 1
    assert runs_at_a_time(tiny_config(), 1, "auto", trials=8, concurrent=5) == 5
    large = tiny_config(compute__workers=4)
    with pytest.raises(UserError, match=r"4 worker\(s\) ask for 1.25 CPUs and 1 GPUs each.* 3 GPUs on 4 node"):
        runs_at_a_time(large, 1, "auto", trials=8)
    with pytest.raises(UserError, match="0 GPUs on 1 node"):
        runs_at_a_time(tiny_config(), 1, None)


def test_a_trials_own_actor_stays_on_the_head_where_it_has_room(ray_cluster: None) -> None:
    cpus = int(ray.cluster_resources()["CPU"])
    assert trial_resources(1) == {"CPU": 0.1, "node:__internal_head__": 1e-3}
    assert trial_resources(10 * cpus + 1) == {"CPU": 0.1}
