"""`--track`: log the configuration and metrics of trials and final runs to TensorBoard, MLflow or W&B.

The driver reads them from the runs' files, so it does not matter where workers run. Ray Tune's own tracking callbacks
cover no final runs, and of a trial only its validations.
"""

from __future__ import annotations

import importlib.util
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.results import checkpoint_files, experiment, reading
from tune_ego.results.experiment import Trial
from tune_ego.results.trackers import Mlflow, TensorBoard, Tracker, WandB, mlflow_client, mlflow_experiment, result_name

_READ_EVERY = 10.0  # seconds
_PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}


def check_trackers(names: Sequence[str], root: str) -> None:
    """Check, before anything starts, that trackers can be used for the search or run at `root`.

    A name that ends in `?` is optional: if it cannot be used, a printed line says so.

    Raises:
        UserError: An unknown name; a tracker that is not optional whose package is not installed, or whose server does
            not answer within 10 s.
    """
    for name, tracker, required in _parsed(names):
        with _optional(name, required):
            if importlib.util.find_spec(_PACKAGES[tracker]) is None:
                raise UserError(f"pip install 'tune_ego[{tracker}]'")
            if tracker == "mlflow" and (uri := os.environ.get("MLFLOW_TRACKING_URI")):
                mlflow_experiment(mlflow_client(uri), result_name(root))


def _parsed(names: Sequence[str]) -> list[tuple[str, str, bool]]:
    """Return (name as it is given, tracker, whether it is required) of each name. Raises `UserError`."""
    for name in names:
        if name.removesuffix("?") not in _PACKAGES:
            raise UserError(
                f"--track {name}: expected one of {', '.join(_PACKAGES)}; with a ? at its end it is optional"
            )
    return [(name, name.removesuffix("?"), not name.endswith("?")) for name in names]


@contextmanager
def _optional(name: str, required: bool) -> Iterator[None]:
    """Name the tracker in a `UserError` of the body; print the error of one that is not required."""
    try:
        yield
    except UserError as error:
        if required:
            raise UserError(f"--track {name}: {error}; to make it optional: --track {name}?") from error
        say(f"--track {name}: {error}; continuing without it")


def make_trackers(names: Sequence[str], root: str) -> dict[str, Tracker]:
    """Create the trackers. Raises `UserError` as `check_trackers` does, and for a place that cannot be written to."""
    kinds: dict[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard, "mlflow": Mlflow, "wandb": WandB}
    trackers = {}
    for name, tracker, required in _parsed(names):
        with _optional(name, required):
            if importlib.util.find_spec(_PACKAGES[tracker]) is None:
                raise UserError(f"pip install 'tune_ego[{tracker}]'")
            trackers[tracker] = kinds[tracker](root)
    return trackers


@contextmanager
def tracked(trackers: dict[str, Tracker], read_trials: Callable[[], list[Trial]]) -> Iterator[None]:
    """Log the metrics of `read_trials()` to the trackers every few seconds and at the end, while the body runs."""
    if not trackers:
        yield
        return
    followers = [_Follower(name, tracker) for name, tracker in trackers.items()]
    ended = threading.Event()

    def follow(last: bool = False) -> None:
        try:
            trials = read_trials()
        except Exception:  # an unreachable store or a damaged file: the search prints this error itself
            return
        for follower in followers:
            follower.log_trials(trials, last)

    def keep_following() -> None:
        while not ended.wait(_READ_EVERY):
            follow()

    thread = threading.Thread(target=keep_following, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        follow(last=True)


class _Follower:
    """Passes new lines of metrics to one tracker."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self._name, self._tracker = name, tracker
        self._runs: dict[str, Any] = {}
        self._last_logged: dict[str, int] = {}
        """Trial -> the last iteration that was logged."""
        self._ended_trials: set[str] = set()
        self._last_error = ""

    def log_trials(self, trials: list[Trial], last: bool) -> None:
        for trial in trials:
            if trial.id in self._ended_trials or not trial.metrics:
                continue
            try:
                self._log_trial(trial, last)
            except Exception as error:  # a failing tracker must not end a search
                complaint = f"{self._name}: {' '.join(str(error).split())[:200]}"
                if complaint != self._last_error:
                    self._last_error = complaint
                    say(f"  {complaint}; training continues")

    def _log_trial(self, trial: Trial, last: bool) -> None:
        if trial.id not in self._runs:
            self._runs[trial.id] = self._tracker.begin(trial)
        last_logged = self._last_logged.get(trial.id, 0)
        lines = [_numbers(line) for line in trial.metrics if line["iteration"] > last_logged]
        self._tracker.log(self._runs[trial.id], lines)
        self._last_logged[trial.id] = trial.iteration
        if trial.ended or last:
            self._tracker.end(self._runs[trial.id], trial.state)
            self._ended_trials.add(trial.id)


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def search_tracked(names: Sequence[str], root: str) -> Any:
    """Track the search at `root` (`tracked`)."""
    read_search = reading.repeated_reader(root)
    return tracked(make_trackers(names, root), lambda: read_search().trials)


def run_tracked(names: Sequence[str], config: Config, run: str) -> Any:
    """Track one run (`tracked`)."""

    def read_trials() -> list[Trial]:
        done = storage.exists(storage.join(run, checkpoint_files.MODEL_FILE))
        state = "finished" if done else "interrupted"
        return [Trial(result_name(run), state, run, {}, 0, config, experiment.read_metrics(run))]

    return tracked(make_trackers(names, run), read_trials)
