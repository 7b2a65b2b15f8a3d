"""Content of `experiment.json`."""

from __future__ import annotations

from typing import Any

from tune_ego import __version__


def search_spec(space: str, **changes: Any) -> dict[str, Any]:
    """The record of a search of this version that is about to start."""
    search = {"space": space, "space_source": "s.yaml", "overrides": {}, "samples": 3, "trials": 3, "seed": 0}
    data = {"data": "/shards", "data_settings": {"flow": "dis"}, "gpus_per_worker": 0.0, "concurrent": None}
    return {**search, **data, "version": __version__, "ray": "2.60.0", **changes}
