"""What a benchmark measured, where and when: a table and a JSON file."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from statistics import median
from typing import Any

from tune_ego import __version__, storage
from tune_ego.console import print_table, say

_PACKAGES = ("torch", "torchvision", "ray", "numpy", "opencv-python", "pyarrow", "av", "simplejpeg")


@dataclass(frozen=True)
class Figure:
    """One measured quantity over its repeats."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return median(self.values)

    def record(self) -> dict[str, Any]:
        spread = {"median": self.median, "least": min(self.values), "most": max(self.values)}
        return {"name": self.name, "unit": self.unit, **spread, "repeats": len(self.values)}


@dataclass(frozen=True)
class Ratio:
    name: str
    value: float


@dataclass
class Benchmark:
    name: str
    about: dict[str, Any]
    """What was measured on: the data's size, settings."""
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)

    def add(self, name: str, unit: str, values: list[float]) -> Figure:
        figure = Figure(name, unit, values)
        self.figures.append(figure)
        return figure

    def compare(self, name: str, figure: Figure, yardstick: Figure) -> None:
        """Note the ratio of two medians."""
        self.ratios.append(Ratio(name, figure.median / yardstick.median))

    def record(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["tune-ego", *sys.argv[1:]]),
            "machine": machine(),
            "versions": versions(),
            "about": self.about,
            "figures": [figure.record() for figure in self.figures],
            "ratios": [{"name": ratio.name, "value": ratio.value} for ratio in self.ratios],
        }

    def show(self) -> None:
        here = machine()
        gpus = f", {', '.join(here['gpus'])}" if here["gpus"] else ""
        about = "; ".join(f"{key} {value}" for key, value in self.about.items())
        say(f"{here['cpu']}, {here['cores']} cores, {here['memory_gb']:.0f} GB{gpus}; {about}")
        rows = [
            (figure.name, _number(figure.median), f"{_number(min(figure.values))} to {_number(max(figure.values))}")
            + (str(len(figure.values)), figure.unit)
            for figure in self.figures
        ]
        print_table("", ["measured", "median", "from to", "repeats", "unit"], rows)
        if self.ratios:
            print_table("", ["ratio", ""], [(ratio.name, f"{ratio.value:.2f}") for ratio in self.ratios])

    def write(self, out: str) -> None:
        storage.write_json(storage.absolute(out), self.record())


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine() -> dict[str, Any]:
    """This machine: `cpu`, `cores` that this process may use, `memory_gb`, `gpus`."""
    import torch

    names = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": cores(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "gpus": gpus,
        "system": platform.platform(terse=True),
    }


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Of this package, Python and what it computes with; without those that are installed under another name."""
    found = {"tune_ego": __version__, "python": platform.python_version()}
    for name in _PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # there are opencv-python-headless and its like
            found[name] = importlib.metadata.version(name)
    return found


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def in_turn(repeats: int, *, warm_up: int = 1, **bodies: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each body, each run `repeats` times in turn with the others, after `warm_up` runs that do not count.

    In turn, so that a machine that slows down slows them all.
    """
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(warm_up + repeats):
        for name, body in bodies.items():
            gc.collect()
            start = time.perf_counter()
            body()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[warm_up:] for name, values in seconds.items()}
