"""`cluster.yaml`, checked offline by Ray's own validator."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "cluster.yaml"


def test_ray_accepts_it_and_every_type_is_used() -> None:
    from ray.autoscaler._private.util import fillout_defaults, validate_config

    config = yaml.safe_load(CLUSTER.read_text())
    validate_config(fillout_defaults(config))
    assert config["head_node_type"] in config["available_node_types"]
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_an_unknown_key_is_rejected() -> None:
    from ray.autoscaler._private.util import validate_config

    with pytest.raises(Exception, match="max_wrokers"):
        validate_config({**yaml.safe_load(CLUSTER.read_text()), "max_wrokers": 3})
