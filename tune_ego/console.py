"""Output on the screen: lines, tables and progress, all through one rich console."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import lru_cache

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

_WIDTH = None if sys.stdout.isatty() else 140  # columns of a file or pipe
console = Console(highlight=False, width=_WIDTH)

_SPEED_PERIOD = 600  # seconds over which the speed is averaged: clips advance by whole shards
_LINE_EVERY = 60  # seconds between two lines where there is no terminal


def say(text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


@lru_cache
def say_once(text: str) -> None:
    """Print a line, unless this process has printed it before."""
    say(text)


def heading(text: str) -> None:
    console.print(f"\n{text}", style="bold", markup=False)


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table. Without column names there is no header row; columns of numbers are aligned to the right."""
    if title:  # printed apart: rich wraps a table's own title at the width of the table
        console.print(title, style="bold", markup=False, soft_wrap=True)
    table = Table(show_header=any(columns), box=None, pad_edge=False)
    for index, name in enumerate(columns):
        numeric = bool(rows) and all(_is_number(row[index]) for row in rows)
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    console.print(table)


def _is_number(cell: str) -> bool:
    return cell.strip("-+%.,0123456789e ") == ""


def percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{100 * fraction:.1f} %"


@contextmanager
def progress(unit: str, total: int | None, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show progress with the time left: a bar on a terminal, else a line every minute.

    Args:
        unit: What is counted, e.g. `clips`.
        total: Number of units; None where it is not known.
        done: Units that were finished before.

    Yields:
        A function that takes the number of units just finished. Any thread may call it.
    """
    columns = (
        TextColumn(unit),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    with Progress(*columns, console=console, speed_estimate_period=_SPEED_PERIOD) as bar:
        task = bar.add_task(unit, total=total, completed=done, speed="")
        last_line = time.monotonic()

        def advance(count: int) -> None:
            nonlocal last_line
            bar.advance(task, count)
            state = bar.tasks[0]
            speed = f"{state.speed:.1f} {unit}/s" if state.speed else ""
            bar.update(task, speed=speed)
            if not console.is_terminal and time.monotonic() - last_line > _LINE_EVERY and speed:
                last_line = time.monotonic()
                of = f" of {total:,}" if total is not None else ""
                left = f", {timedelta(seconds=round(state.time_remaining))} left" if state.time_remaining else ""
                say(f"{int(state.completed):,}{of} {unit}, {speed}{left}")

        yield advance
