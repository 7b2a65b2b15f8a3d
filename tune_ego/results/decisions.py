"""Record of the scheduler's decisions, for example of ASHA: `runs/<trial>/decisions.json`.

The driver writes a decision before it takes effect. A resumed search answers the same reports with the recorded
decisions.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, NamedTuple

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from tune_ego import storage
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.results import driver
from tune_ego.results.trial_records import MOST, run_folder

_READERS = 16
"""Threads that read files."""
DECISIONS_FILE = "decisions.json"


class Decision(NamedTuple):
    """A report of a trial to the scheduler, and the scheduler's decision."""

    order: Annotated[int, Field(ge=0, le=MOST)]
    """Position among all decisions of the search."""
    trial: str
    iteration: Annotated[int, Field(ge=0, le=MOST)]
    accuracy: Annotated[float, Field(ge=0, le=1)]
    action: str
    """CONTINUE or STOP."""


_DECISIONS = TypeAdapter(list[Decision], config=ConfigDict(strict=True))


def write_decisions(root: str, trial: str, decisions: list[Decision]) -> None:
    """Replace the record of the decisions about a trial."""
    driver.confirm(root)
    storage.write_json(storage.join(run_folder(root, trial), DECISIONS_FILE), decisions)


def trial_decisions(root: str, trial: str) -> list[Decision]:
    """Return the decisions about a trial, in their order. Raises `UserError` for a damaged file."""
    uri = storage.join(run_folder(root, trial), DECISIONS_FILE)
    lines = storage.read_json(uri) if storage.exists(uri) else []
    try:
        decisions = _DECISIONS.validate_python(lines)
    except ValidationError as error:
        raise UserError(f"{uri}: damaged: expected lists of {', '.join(Decision._fields)}") from error
    if any(decision.trial != trial for decision in decisions):
        raise UserError(f"{uri}: damaged: decisions about another trial")
    return decisions


def read_decisions(root: str) -> list[Decision]:
    """Return all decisions of a search, in the order in which they were made. A printed line names a damaged file."""

    def read(trial: str) -> list[Decision]:
        try:
            return trial_decisions(root, trial)
        except UserError as error:
            say(f"{error}; left out")
            return []

    trials = storage.list_names(storage.join(root, "runs"))
    with ThreadPoolExecutor(_READERS) as pool:
        return sorted(decision for decisions in pool.map(read, trials) for decision in decisions)
