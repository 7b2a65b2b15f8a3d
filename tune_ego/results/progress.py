"""Progress of a search or run, read from its files, for `status`, `tune` and `train`."""

from __future__ import annotations

import math
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
from tune_ego.results import driver, experiment, reading, trial_records
from tune_ego.results.checkpoint_files import MODEL_FILE
from tune_ego.results.experiment import GPU_BYTES, METRIC, VALIDATION_SECONDS, Configuration, Experiment, Trial
from tune_ego.results.tables import config_value, trial_table
from tune_ego.search_space import SearchSpace

# Seconds.
_REDRAW_EVERY = 2.0
_REDRAW_REMOTE_EVERY = 15.0
"""On object stores, where each redraw requests every file."""
_LINE_EVERY = 60.0
"""Without a terminal."""
_TRIALS_SHOWN = 12


def share_of_iterations(space: SearchSpace, budget: int) -> float | None:
    """Return the expected share of iterations if one trial in `reduction` continues at each rung; None: unknown."""
    match space.scheduler.name:
        case "fifo":
            return 1.0
        case "median":
            return None
        case "asha":
            spent, reaching, before = 0.0, 1.0, 0
            for rung in space.scheduler.rungs(budget):
                spent += reaching * (rung - before)
                before, reaching = rung, reaching / space.scheduler.reduction
            return (spent + reaching * (budget - before)) / budget
        case unknown:
            raise ValueError(f"no expected share for scheduler {unknown!r}")


class Speed(NamedTuple):
    """Speed of a run in its last line of metrics."""

    seconds: float
    """Seconds of an iteration, with its share of the validations."""
    clips_per_second: float
    """Clips per second, validations not counted."""


def speed(config: Config, metrics: list[dict[str, Any]]) -> Speed | None:
    if not metrics:
        return None
    clips = metrics[-1]["clips_per_second"]
    validations = [line[VALIDATION_SECONDS] for line in metrics if VALIDATION_SECONDS in line]
    validating = mean(validations) / config.train.validate_every if validations else 0.0
    return Speed(config.train.batch_size / clips + validating, clips)


class Standing(NamedTuple):
    """State and speed of a search."""

    states: dict[str, int]
    """State -> number of trials; trials that are not drawn yet are pending."""
    best: Configuration | None
    iterations_per_second: float
    """Sum over the running trials."""
    clips_per_second: float
    gpu_bytes: int | None
    """Peak GPU memory of a running trial."""
    seconds_left: float | None
    """Estimate at this speed, if ASHA stops as many trials as expected; None: unknown."""


def standing(search: Experiment) -> Standing:
    states = dict.fromkeys(("running", "pending", "interrupted", *trial_records.ENDED), 0)
    for trial in search.trials:
        states[trial.state] += 1
    states["pending"] += max(0, search.spec.get("trials", 0) - len(search.trials))
    running = [trial for trial in search.trials if trial.state == "running"]
    speeds = [pace for trial in running if (pace := speed(trial.config, trial.metrics))]
    memory = [
        int(trial.metrics[-1][GPU_BYTES]) for trial in running if trial.metrics and GPU_BYTES in trial.metrics[-1]
    ]
    scored = any(trial.accuracy is not None for trial in search.trials)
    return Standing(
        {state: count for state, count in states.items() if count},
        search.best if scored else None,
        sum(1 / pace.seconds for pace in speeds),
        sum(pace.clips_per_second for pace in speeds),
        max(memory, default=None),
        _seconds_left(search, running, states["pending"], speeds),
    )


def _seconds_left(search: Experiment, running: list[Trial], pending: int, speeds: list[Speed]) -> float | None:
    if not speeds:
        return None
    budget = running[0].config.train.iterations
    share = share_of_iterations(search.space, budget)
    if share is None:
        return None
    iterations = sum(_still_expected(search.space, trial.iteration, budget) for trial in running)
    iterations += pending * share * budget
    return iterations * mean(pace.seconds for pace in speeds) / len(running)


def _still_expected(space: SearchSpace, done: int, budget: int) -> float:
    """Return a trial's expected further iterations if one trial in `reduction` continues at each rung ahead."""
    ahead, reaching, before = 0.0, 1.0, done
    for rung in [rung for rung in space.scheduler.rungs(budget) if rung > done]:
        ahead += reaching * (rung - before)
        before, reaching = rung, reaching / space.scheduler.reduction
    return ahead + reaching * (budget - before)


def rung_of(space: SearchSpace, trial: Trial) -> str:
    """Return the last of ASHA's rungs that a trial has reached, e.g. `2 of 4`; `-` for other schedulers."""
    steps = space.scheduler.rungs(trial.config.train.iterations)
    reached = sum(any(line["iteration"] >= rung for line in trial.validations) for rung in steps)
    return f"{reached} of {len(steps)}" if steps else "-"


def search_state(search: Experiment, alive: bool) -> str:
    """Return the state of a search in words, with the command that resumes an interrupted one."""
    ended = sum(trial.ended for trial in search.trials)
    if alive:
        return "running"
    return "over" if ended >= search.spec["trials"] else f"interrupted; resume with: tune-ego resume {search.root}"


def run_state(run: str) -> str:
    """Return the state of a run of `train` or of a trial, from its files."""
    root, _, trial = run.rpartition("/runs/")
    if root and storage.exists(storage.join(root, trial_records.TRIALS_FILE)):
        state = str(trial_records.read_records(root).get(trial, {}).get("state", "unknown"))
        return "interrupted" if state == "running" and not driver.is_alive(root) else state
    if storage.exists(storage.join(run, MODEL_FILE)):
        return "finished"
    return "running" if driver.is_alive(run) else "interrupted; resume with the same tune-ego train command"


def facts(search: Experiment) -> list[tuple[str, str]]:
    """Return the lines above the table of trials, as (name, value)."""
    now = standing(search)
    rows = [("trials", ", ".join(f"{count} {state}" for state, count in now.states.items()))]
    if now.best is not None:
        chosen = ", ".join(f"{key} {config_value(now.best.config, key)}" for key in search.space.searched_keys)
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
    if versions := experiment.describe_versions(search.spec):
        rows.append(("versions", versions))
    return [*rows, ("results", search.root)]


def duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def search_view(search: Experiment) -> RenderableType:
    """Return the display of `tune` for a running search."""
    live = [trial for trial in search.trials if trial.state == "running"]
    ended = sorted((trial for trial in search.trials if trial.ended), key=lambda trial: -(trial.accuracy or 0))
    chosen = [*live, *ended][:_TRIALS_SHOWN]
    names, rows = ["trial", "state", "rung", "iteration", "best"], []
    for trial in chosen:
        done = f"{trial.iteration} of {trial.config.train.iterations}"
        rows.append([trial.id, trial.state, rung_of(search.space, trial), done, percent(trial.accuracy)])
    left = console.width - sum(_width(column) for column in zip(names, *rows))
    keys = search.space.searched_keys
    for place, key in enumerate(keys):
        column = [key.replace(".", ".\n"), *(config_value(trial.config, key) for trial in chosen)]
        left -= _width(column)
        if left < 0:
            more = f"and {len(keys) - place} searched parameters more, for which the terminal is too narrow"
            return Group("", _grid(facts(search)), "", _table(names, rows), more)
        names.append(column[0])
        for row, value in zip(rows, column[1:]):
            row.append(value)
    return Group("", _grid(facts(search)), "", _table(names, rows))


def _width(column: Sequence[str]) -> int:
    """Return the width of a column in characters, with the gap after it."""
    return 2 + max(len(part) for cell in column for part in cell.split("\n"))


def _table(names: list[str], rows: list[list[str]]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in names:
        table.add_column(name.replace("[", "\\["), no_wrap=True)
    for row in rows:
        table.add_row(*(cell.replace("[", "\\[") for cell in row))
    return table


def status_table(search: Experiment) -> tuple[list[str], list[list[str]]]:
    """Return (column names, rows) of the trials, best first, with the rungs that they have reached, without reasons."""
    plain = Experiment(search.root, search.spec, [replace(trial, reason="") for trial in search.trials])
    names, rows = trial_table(plain)
    rungs_of = {trial.id: rung_of(search.space, trial) for trial in search.trials}
    names = [*names[:2], "rung", *(name.replace(".", ".\n") for name in names[2:])]
    return names, [[*row[:2], rungs_of[row[0]], *row[2:]] for row in rows]


def run_facts(config: Config, run: str, state: str = "running") -> list[tuple[str, str]]:
    lines = experiment.read_metrics(run)
    record = experiment.read_run_record(run)
    versions = "" if record is None else experiment.describe_versions(record)
    ending = [*([("versions", versions)] if versions else []), ("results", run)]
    if not lines:
        return [("run", "starts" if state == "running" else f"{state}; nothing is logged"), *ending]
    last, total = lines[-1], config.train.iterations
    rows = [] if state == "running" else [("run", state)]
    rows.append(("iteration", f"{last['iteration']:,} of {total:,}"))
    rows.append(("training loss", f"{last.get('train_loss', math.nan):.3f}"))
    validated = [line for line in lines if METRIC in line]
    if validated:
        best = max(validated, key=lambda line: line[METRIC])
        accuracies = (
            f"{percent(validated[-1][METRIC])}, best {percent(best[METRIC])} at iteration {best['iteration']:,}"
        )
        rows.append(("validation mean class accuracy", accuracies))
    pace = speed(config, lines)
    if pace is not None and state == "running":
        memory = f", {last[GPU_BYTES] / 2**30:.1f} GiB of GPU memory" if GPU_BYTES in last else ""
        rows.append(("speed", f"{1 / pace.seconds:.2f} iterations/s, {pace.clips_per_second:.1f} clips/s{memory}"))
        rows.append(("left, about", duration((total - last["iteration"]) * pace.seconds)))
    return [*rows, *ending]


def run_view(config: Config, run: str) -> RenderableType:
    """Return the display of `train` for its running run."""
    return Group("", _grid(run_facts(config, run)))


def _grid(rows: list[tuple[str, str]]) -> Table:
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(name, value.replace("[", "\\["))
    return grid


@contextmanager
def shown(root: str, view: Callable[[], RenderableType], line: Callable[[], str]) -> Iterator[None]:
    """Show `view` on a terminal while the body runs, redrawn every few seconds; elsewhere print `line` every minute."""
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
        except Exception:  # an object store did not answer, or a file is damaged: the display must not end a search
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
    """Show the progress of the search at `root` (`shown`)."""
    read_search = reading.repeated_reader(root)
    with shown(root, lambda: search_view(read_search()), lambda: _line(facts(read_search()))):
        yield


@contextmanager
def run_shown(config: Config, run: str) -> Iterator[None]:
    """Show the progress of one run (`shown`)."""
    with shown(run, lambda: run_view(config, run), lambda: _line(run_facts(config, run))):
        yield


def _line(rows: list[tuple[str, str]]) -> str:
    """Return all but the last line, the place of the results, as one line of text."""
    return "  " + "; ".join(f"{name} {value}" for name, value in rows[:-1])
