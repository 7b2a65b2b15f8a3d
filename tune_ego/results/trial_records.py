"""Records of a search about its trials: their draws and states, and the decisions of the scheduler.

<storage>/<name>/trials.json    trial -> state, reason, repeat, sampled
<storage>/<name>/runs/<trial>/decisions.json
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.results import driver

_READERS = 16
"""Threads that read files."""
TRIALS_FILE = "trials.json"
DECISIONS_FILE = "decisions.json"
ENDED = ("finished", "stopped", "failed")
"""States of trials that have ended."""
_REPEAT = "-"  # between configuration and repeat in the name of a trial


def trial_name(number: int, repeat: int, repeats: int) -> str:
    """Return the name of repeat `repeat` of configuration `number`: 00007, or 00007-2."""
    return f"{number:05d}" + (f"{_REPEAT}{repeat}" if repeats > 1 else "")


def configuration_name(trial: str) -> str:
    """Return the name of a trial without the index of its repeat."""
    return trial.partition(_REPEAT)[0]


class TrialRecords:
    """The file `trials.json` for the driver, its only writer: each trial's draw, state and reason."""

    def __init__(self, root: str) -> None:
        self._root, self._uri = root, storage.join(root, TRIALS_FILE)
        self._records: dict[str, dict[str, Any]] = read_records(root)

    def __contains__(self, trial: str) -> bool:
        return trial in self._records

    def __iter__(self) -> Iterator[str]:
        return iter(self._records)

    def state(self, trial: str) -> str:
        """Return the state of a trial."""
        return str(self._records[trial]["state"])

    def draws(self) -> list[dict[str, Any]]:
        """Return the trials that have not ended, as the configurations that Tune passes to them."""
        return [
            {"trial": trial, "repeat": record["repeat"], "sampled": record["sampled"]}
            for trial, record in self._records.items()
            if record["state"] not in ENDED
        ]

    def add(self, draws: list[dict[str, Any]]) -> None:
        """Record new trials as pending."""
        for draw in draws:
            rest = {"repeat": draw["repeat"], "sampled": draw["sampled"]}
            self._records[draw["trial"]] = {"state": "pending", "reason": "", **rest}
        self._write()

    def note(self, trial: str, state: str, reason: str = "") -> None:
        """Record the state of a trial."""
        self._records[trial] |= {"state": state, "reason": reason}
        self._write()

    def reopen(self, states: Container[str]) -> None:
        """Make the trials in one of these states pending again."""
        for record in self._records.values():
            if record["state"] in states:
                record |= {"state": "pending", "reason": ""}
        self._write()

    def _write(self) -> None:
        driver.confirm(self._root)
        storage.write_json(self._uri, self._records)


def read_records(root: str) -> dict[str, dict[str, Any]]:
    """Return the content of `trials.json`: trial -> state, reason, repeat, sampled."""
    uri = storage.join(root, TRIALS_FILE)
    return storage.read_json(uri) if storage.exists(uri) else {}


def run_folder(root: str, trial: str) -> str:
    """Return the folder or URI of a trial's run."""
    return storage.join(root, "runs", trial)


class Decision(NamedTuple):
    """A report of a trial to the scheduler, and the scheduler's decision."""

    order: int
    """Position among all decisions of the search."""
    trial: str
    iteration: int
    accuracy: float
    action: str
    """CONTINUE or STOP."""


def write_decisions(root: str, trial: str, decisions: list[Decision]) -> None:
    """Replace the record of the decisions about a trial."""
    driver.confirm(root)
    storage.write_json(storage.join(run_folder(root, trial), DECISIONS_FILE), decisions)


def trial_decisions(root: str, trial: str) -> list[Decision]:
    """Return the decisions about a trial, in their order."""
    uri = storage.join(run_folder(root, trial), DECISIONS_FILE)
    return [Decision(*line) for line in storage.read_json(uri)] if storage.exists(uri) else []


def read_decisions(root: str) -> list[Decision]:
    """Return all decisions of a search, in the order in which they were made."""
    trials = storage.list_names(storage.join(root, "runs"))
    with ThreadPoolExecutor(_READERS) as pool:
        by_trial = pool.map(lambda trial: trial_decisions(root, trial), trials)
        return sorted(decision for decisions in by_trial for decision in decisions)
