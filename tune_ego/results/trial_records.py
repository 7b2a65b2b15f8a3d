"""Records of a search about its trials: their draws and states, and the decisions of the scheduler.

<storage>/<name>/trials.json    trial -> state, reason, repeat, sampled
<storage>/<name>/runs/<trial>/decisions.json
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tune_ego import storage
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.results import driver

_READERS = 16
"""Threads that read files."""
MOST = 10**9
"""Bound on counts in records: more is damage."""
_NAME = re.compile(r"[0-9]{5,12}(-[0-9]{1,9})?")
"""Form of `trial_name`."""
TRIALS_FILE = "trials.json"

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
        self._records: dict[str, dict[str, Any]] = valid_records(root)

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
    records = storage.read_json(uri) if storage.exists(uri) else {}
    if not isinstance(records, dict):
        raise UserError(f"{uri}: damaged: expected a mapping from trial names to records")
    return records


class TrialRecord(BaseModel):
    """Entry of a trial in `trials.json`."""

    model_config = ConfigDict(strict=True, extra="forbid")
    state: Literal["pending", "running", "interrupted", "finished", "stopped", "failed"]
    reason: str
    repeat: int = Field(ge=0, le=MOST)
    sampled: dict[str, Any]


def check_record(trial: str, record: Any) -> None:
    """Raise `ValueError` where an entry of `trials.json` is not such as a search writes.

    A trial's name is the name of its folder: another form could lead out of the search.
    """
    if _NAME.fullmatch(trial) is None:
        raise ValueError(f"{trial!r:.80} is no name of a trial")
    try:
        TrialRecord.model_validate(record)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "it"
        raise ValueError(
            f"the trial's entry in {TRIALS_FILE}: {key}: {first['msg']}, found {first['input']!r:.80}"
        ) from error


def valid_records(root: str) -> dict[str, dict[str, Any]]:
    """Return the entries of `trials.json` that are valid. A printed line names each other one."""
    records = read_records(root)
    for trial in list(records):
        try:
            check_record(trial, records[trial])
        except ValueError as error:
            say(f"{storage.join(root, TRIALS_FILE)}: damaged, and left out: {error}")
            del records[trial]
    return records


def run_folder(root: str, trial: str) -> str:
    """Return the folder or URI of a trial's run."""
    return storage.join(root, "runs", trial)
