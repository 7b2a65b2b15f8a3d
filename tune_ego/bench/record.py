"""Results of a benchmark, with machine and date, as a table and a JSON record."""

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

_RECORDED_PACKAGES = ("torch", "torchvision", "ray", "numpy", "opencv-python", "pyarrow", "av", "simplejpeg")


@dataclass(frozen=True)
class Figure:
    """Measured quantity, with a value for each repeat."""

    name: str
    unit: str
    values: list[float]

    @property
    def median(self) -> float:
        return median(self.values)

    def record(self) -> dict[str, Any]:
        """Return the figure's entry in the JSON record."""
        spread = {"median": self.median, "least": min(self.values), "most": max(self.values)}
        return {"name": self.name, "unit": self.unit, **spread, "repeats": len(self.values)}


@dataclass(frozen=True)
class Ratio:
    """Ratio of the medians of two figures."""

    name: str
    value: float


@dataclass
class Benchmark:
    """Figures and ratios of one benchmark."""

    name: str
    facts: dict[str, Any]
    """Size of the data, settings and other facts, by name; `about` in the JSON record."""
    figures: list[Figure] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)

    def add(self, name: str, unit: str, values: list[float]) -> Figure:
        """Append a figure and return it."""
        figure = Figure(name, unit, values)
        self.figures.append(figure)
        return figure

    def compare(self, name: str, figure: Figure, reference: Figure) -> None:
        """Append the ratio of the median of `figure` to the median of `reference`."""
        self.ratios.append(Ratio(name, figure.median / reference.median))

    def record(self) -> dict[str, Any]:
        """Return the content of the JSON record."""
        return {
            "benchmark": self.name,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": " ".join(["tune-ego", *sys.argv[1:]]),
            "machine": describe_machine(),
            "versions": package_versions(),
            "about": self.facts,
            "figures": [figure.record() for figure in self.figures],
            "ratios": [{"name": ratio.name, "value": ratio.value} for ratio in self.ratios],
        }

    def show(self) -> None:
        """Print machine, facts, figures and ratios."""
        machine = describe_machine()
        gpus = f", {', '.join(machine['gpus'])}" if machine["gpus"] else ""
        facts = "; ".join(f"{key} {value}" for key, value in self.facts.items())
        say(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']:.0f} GB{gpus}; {facts}")
        rows = [
            (
                figure.name,
                _format_number(figure.median),
                f"{_format_number(min(figure.values))} to {_format_number(max(figure.values))}",
            )
            + (str(len(figure.values)), figure.unit)
            for figure in self.figures
        ]
        print_table("", ["figure", "median", "range", "repeats", "unit"], rows)
        if self.ratios:
            print_table("", ["ratio", ""], [(ratio.name, f"{ratio.value:.2f}") for ratio in self.ratios])

    def write(self, out: str) -> None:
        """Write the JSON record to a file or URI."""
        storage.write_json(storage.absolute(out), self.record())


def _format_number(value: float) -> str:
    """Return a number with three significant digits, from 100 on with all digits before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def describe_machine() -> dict[str, Any]:
    """Return `cpu`, `cores` that this process may use, `memory_gb`, `gpus` and `system` of this machine."""
    import torch  # late: torch takes seconds to import, and no other function here needs it

    names = (
        line.partition(":")[2].strip() for line in _lines_if_present("/proc/cpuinfo") if line.startswith("model name")
    )
    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": next(names, platform.processor() or platform.machine()),
        "cores": cores(),
        "memory_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "gpus": gpus,
        "system": platform.platform(terse=True),
    }


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def package_versions() -> dict[str, str]:
    """Return the versions of this package, Python and the installed packages of `_RECORDED_PACKAGES`."""
    versions = {"tune_ego": __version__, "python": platform.python_version()}
    for name in _RECORDED_PACKAGES:
        with suppress(importlib.metadata.PackageNotFoundError):  # e.g. installed as opencv-python-headless
            versions[name] = importlib.metadata.version(name)
    return versions


def _lines_if_present(path: str) -> list[str]:
    """Return the lines of a file; none where the file does not exist."""
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def time_in_turn(repeats: int, *, warm_up: int = 1, **bodies: Callable[[], Any]) -> dict[str, list[float]]:
    """Time functions in alternation, so that a slower period of the machine affects all of them.

    Args:
        repeats: Timed calls of each function.
        warm_up: Calls of each function before the timed ones.
        **bodies: Name -> function without arguments.

    Returns:
        Name -> seconds of each timed call.
    """
    seconds: dict[str, list[float]] = {name: [] for name in bodies}
    for _ in range(warm_up + repeats):
        for name, body in bodies.items():
            gc.collect()
            start = time.perf_counter()
            body()
            seconds[name].append(time.perf_counter() - start)
    return {name: values[warm_up:] for name, values in seconds.items()}
