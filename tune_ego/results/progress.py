"""Where a search or a run stands, from its files alone: what `status` prints and `tune` and `train` show."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Table

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.console import console, percent, say
from tune_ego.results import driver, experiment
from tune_ego.results.checkpoint_files import MODEL_FILE
from tune_ego.results.experiment import (
    GPU_BYTES,
    METRIC,
    VALIDATION_SECONDS,
    Configuration,
    Experiment,
    Trial,
    config_value,
    trial_table,
)
from tune_ego.search_space import SchedulerSettings, SearchSpace

# Seconds.
_REDRAW_EVERY = 2.0
_REDRAW_REMOTE_EVERY = 15.0
"""Where each look is a request for each file to an object store."""
_LINE_EVERY = 60.0
"""Where there is no terminal."""
_TRIALS_SHOWN = 12


def rungs(settings: SchedulerSettings, budget: int) -> list[int]:
    """The iterations at which ASHA decides, ascending; none for other schedulers."""
    found, rung = [], settings.grace
    while settings.name == "asha" and rung < budget:
        found.append(rung)
        rung *= settings.reduction
    return found


def share_of_iterations(space: SearchSpace, budget: int) -> float | None:
    """The part of all trials' iterations that ASHA runs when at each rung one in `reduction` goes on; None: unknown."""
    if space.scheduler.name == "median":
        return None
    spent, reaching, before = 0.0, 1.0, 0
    for rung in rungs(space.scheduler, budget):
        spent += reaching * (rung - before)
        before, reaching = rung, reaching / space.scheduler.reduction
    return (spent + reaching * (budget - before)) / budget


class Speed(NamedTuple):
    """Of a run, by its last line of metrics."""

    seconds: float
    """An iteration takes, its share of the validations included."""
    clips_per_second: float
    """Without validations."""


def speed(config: Config, metrics: list[dict[str, Any]]) -> Speed | None:
    if not metrics:
        return None
    clips = metrics[-1]["clips_per_second"]
    validations = [line[VALIDATION_SECONDS] for line in metrics if VALIDATION_SECONDS in line]
    validating = mean(validations) / config.train.validate_every if validations else 0.0
    return Speed(config.train.batch_size / clips + validating, clips)


class Standing(NamedTuple):
    """Of a search."""

    states: dict[str, int]
    """State -> trials; those that are not drawn yet are pending."""
    best: Configuration | None
    iterations_per_second: float
    """Of the running trials together."""
    clips_per_second: float
    gpu_bytes: int | None
    """The most that a running trial has had of a GPU's memory."""
    seconds_left: float | None
    """At this pace, and when ASHA stops as many as it is expected to; None: unknown."""


def standing(found: Experiment) -> Standing:
    states = dict.fromkeys(("running", "pending", "interrupted", *experiment.ENDED), 0)
    for trial in found.trials:
        states[trial.state] += 1
    states["pending"] += max(0, found.spec.get("trials", 0) - len(found.trials))
    running = [trial for trial in found.trials if trial.state == "running"]
    speeds = [pace for trial in running if (pace := speed(trial.config, trial.metrics))]
    memory = [
        int(trial.metrics[-1][GPU_BYTES]) for trial in running if trial.metrics and GPU_BYTES in trial.metrics[-1]
    ]
    scored = any(trial.accuracy is not None for trial in found.trials)
    return Standing(
        {state: count for state, count in states.items() if count},
        found.best if scored else None,
        sum(1 / pace.seconds for pace in speeds),
        sum(pace.clips_per_second for pace in speeds),
        max(memory, default=None),
        _seconds_left(found, running, states["pending"], speeds),
    )


def _seconds_left(found: Experiment, running: list[Trial], pending: int, speeds: list[Speed]) -> float | None:
    if not speeds:
        return None
    budget = running[0].config.train.iterations
    share = share_of_iterations(found.space, budget)
    if share is None:
        return None
    iterations = sum(_still_expected(found.space, trial.iteration, budget) for trial in running)
    iterations += pending * share * budget
    return iterations * mean(pace.seconds for pace in speeds) / len(running)


def _still_expected(space: SearchSpace, done: int, budget: int) -> float:
    """The iterations that a trial goes on for when at each rung ahead one in `reduction` goes on."""
    ahead, reaching, before = 0.0, 1.0, done
    for rung in [rung for rung in rungs(space.scheduler, budget) if rung > done]:
        ahead += reaching * (rung - before)
        before, reaching = rung, reaching / space.scheduler.reduction
    return ahead + reaching * (budget - before)


def rung_of(space: SearchSpace, trial: Trial) -> str:
    """The last of ASHA's rungs that a trial has come to: `2 of 4`; `-` for other schedulers."""
    steps = rungs(space.scheduler, trial.config.train.iterations)
    reached = sum(any(line["iteration"] >= rung for line in trial.validations) for rung in steps)
    return f"{reached} of {len(steps)}" if steps else "-"


def search_state(found: Experiment, alive: bool) -> str:
    """In words, and how to go on where nobody drives the search."""
    ended = sum(trial.ended for trial in found.trials)
    if alive:
        return "running"
    return "over" if ended >= found.spec["trials"] else f"interrupted; to go on: tune-ego resume {found.root}"


def run_state(run: str) -> str:
    """Of a run of `train`, or of a trial's, from its files."""
    root, _, trial = run.rpartition("/runs/")
    if root and storage.exists(storage.join(root, experiment.TRIALS_FILE)):
        state = str(experiment.read_records(root).get(trial, {}).get("state", "unknown"))
        return "interrupted" if state == "running" and not driver.is_alive(root) else state
    if storage.exists(storage.join(run, MODEL_FILE)):
        return "finished"
    return "running" if driver.is_alive(run) else "interrupted; to go on: the same tune-ego train again"


def facts(found: Experiment) -> list[tuple[str, str]]:
    """What stands above the table of trials: (what, value)."""
    now = standing(found)
    rows = [("trials", ", ".join(f"{count} {state}" for state, count in now.states.items()))]
    if now.best is not None:
        chosen = ", ".join(f"{key} {config_value(now.best.config, key)}" for key in found.space.searched_keys)
        rows.append(("best so far", f"{percent(now.best.accuracy)} ({now.best.id}: {chosen})"))
        data = now.best.config.data
        rows.append(
            ("on", f"validation fold {data.fold} ({data.validation}) of split {data.split}, mean class accuracy")
        )
    if now.iterations_per_second:
        memory = "" if now.gpu_bytes is None else f", {now.gpu_bytes / 2**30:.1f} GiB of GPU memory a trial"
        pace = f"{now.iterations_per_second:.2f} iterations/s, {now.clips_per_second:.1f} clips/s{memory}"
        rows.append(("speed", pace))
    if now.seconds_left is not None:
        rows.append(("left, about", duration(now.seconds_left)))
    return [*rows, ("results", found.root)]


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def search_view(found: Experiment) -> RenderableType:
    """What `tune` shows of its search while it runs."""
    live = [trial for trial in found.trials if trial.state == "running"]
    ended = sorted((trial for trial in found.trials if trial.ended), key=lambda trial: -(trial.accuracy or 0))
    chosen = [*live, *ended][:_TRIALS_SHOWN]
    names, rows = ["trial", "state", "rung", "iteration", "best"], []
    for trial in chosen:
        done = f"{trial.iteration} of {trial.config.train.iterations}"
        rows.append([trial.id, trial.state, rung_of(found.space, trial), done, percent(trial.accuracy)])
    left = console.width - sum(_width(column) for column in zip(names, *rows))
    keys = found.space.searched_keys
    for place, key in enumerate(keys):
        column = [key.replace(".", ".\n"), *(config_value(trial.config, key) for trial in chosen)]
        left -= _width(column)
        if left < 0:
            more = f"and {len(keys) - place} searched parameters more, for which the terminal is too narrow"
            return Group("", _grid(facts(found)), "", _table(names, rows), more)
        names.append(column[0])
        for row, value in zip(rows, column[1:]):
            row.append(value)
    return Group("", _grid(facts(found)), "", _table(names, rows))


def _width(column: Sequence[str]) -> int:
    """Characters of a column, with the gap after it."""
    return 2 + max(len(part) for cell in column for part in cell.split("\n"))


def _table(names: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name.replace("[", "\\["), no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table


def status_table(found: Experiment) -> tuple[list[str], list[list[str]]]:
    """(column names, rows) of the trials, best first, with the rung that each has come to; reasons stand elsewhere."""
    plain = Experiment(found.root, found.spec, [replace(trial, reason="") for trial in found.trials])
    names, rows = trial_table(plain)
    rungs_of = {trial.id: rung_of(found.space, trial) for trial in found.trials}
    names = [*names[:2], "rung", *(name.replace(".", ".\n") for name in names[2:])]
    return names, [[*row[:2], rungs_of[row[0]], *row[2:]] for row in rows]


def run_facts(config: Config, run: str, state: str = "running") -> list[tuple[str, str]]:
    lines = experiment.read_metrics(run)
    if not lines:
        return [("run", "starts" if state == "running" else f"{state}; nothing is logged"), ("results", run)]
    last, total = lines[-1], config.train.iterations
    rows = [] if state == "running" else [("run", state)]
    rows += [("iteration", f"{last['iteration']:,} of {total:,}"), ("training loss", f"{last['train_loss']:.3f}")]
    validated = [line for line in lines if METRIC in line]
    if validated:
        best = max(validated, key=lambda line: line[METRIC])
        told = f"{percent(validated[-1][METRIC])}, best {percent(best[METRIC])} at iteration {best['iteration']:,}"
        rows.append(("validation mean class accuracy", told))
    pace = speed(config, lines)
    if pace is not None and state == "running":
        memory = f", {last[GPU_BYTES] / 2**30:.1f} GiB of GPU memory" if GPU_BYTES in last else ""
        rows.append(("speed", f"{1 / pace.seconds:.2f} iterations/s, {pace.clips_per_second:.1f} clips/s{memory}"))
        rows.append(("left, about", duration((total - last["iteration"]) * pace.seconds)))
    return [*rows, ("results", run)]


def run_view(config: Config, run: str) -> RenderableType:
    """What `train` shows of its run while it runs."""
    return Group("", _grid(run_facts(config, run)))


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for what, value in rows:
        grid.add_row(what, value.replace("[", "\\["))
    return grid


@contextmanager
def shown(root: str, view: Callable[[], RenderableType], line: Callable[[], str]) -> Iterator[None]:
    """While the body runs: `view` on a terminal, drawn anew every few seconds; elsewhere `line` every minute."""
    terminal = console.is_terminal
    every = _REDRAW_REMOTE_EVERY if not storage.is_local(root) else _REDRAW_EVERY
    every = every if terminal else _LINE_EVERY
    live = Live(console=console, auto_refresh=False, transient=True) if terminal else None
    ended = threading.Event()

    def show() -> None:
        try:
            if live is not None:
                live.update(view(), refresh=True)
            else:
                say(line())
        except Exception:  # an object store did not answer, or a file is damaged: what is shown must not end a search
            return

    def follow() -> None:
        while not ended.wait(every):
            show()

    thread = threading.Thread(target=follow, daemon=True)
    if live is not None:
        live.start()
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if live is not None:
            live.stop()


@contextmanager
def search_shown(root: str) -> Iterator[None]:
    """`shown` for the search at `root`."""
    look = experiment.follower(root)
    with shown(root, lambda: search_view(look()), lambda: _line(facts(look()))):
        yield


@contextmanager
def run_shown(config: Config, run: str) -> Iterator[None]:
    """`shown` for one run."""
    with shown(run, lambda: run_view(config, run), lambda: _line(run_facts(config, run))):
        yield


def _line(rows: list[tuple[str, str]]) -> str:
    """All but the last, where the results are."""
    return "  " + "; ".join(f"{what} {value}" for what, value in rows[:-1])
