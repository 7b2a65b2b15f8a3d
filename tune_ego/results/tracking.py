"""`--track`: log the configuration and metrics of trials and final runs to TensorBoard, MLflow or W&B.

The driver reads them from the runs' files, so it does not matter where workers run. Ray Tune's own tracking callbacks
cover no final runs, and of a trial only its validations.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import math
import netrc
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cv2
import numpy as np

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.console import say
from tune_ego.errors import UserError
from tune_ego.results import checkpoint_files, experiment, reading
from tune_ego.results.experiment import METRIC, Trial

_READ_EVERY = 10.0  # seconds
_METRICS_A_REQUEST = 900
"""MLflow takes 1,000."""
_PARAMS_A_REQUEST = 100
_RUN_TAG = "tune_ego.run"
_PACKAGES = {"tensorboard": "tensorboardX", "mlflow": "mlflow", "wandb": "wandb"}
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED"}


class Tracker(Protocol):
    """A tracker for the runs of one search or final run."""

    def begin(self, trial: Trial) -> Any:
        """Open the tracker's own run, the one of an earlier start where there is one."""

    def log(self, run: Any, lines: list[dict[str, float]]) -> None:
        """Write lines of metrics, each with its `iteration`. Lines that the tracker has already are left out."""

    def end(self, run: Any, state: str) -> None: ...


def check_trackers(names: Sequence[str]) -> None:
    """Raise `UserError` for an unknown name, and where its package is not installed."""
    for name in names:
        if name not in _PACKAGES:
            raise UserError(f"--track {name}: expected one of {', '.join(_PACKAGES)}")
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise UserError(f"--track {name}: pip install 'tune_ego[{name}]'")


def make_trackers(names: Sequence[str], root: str) -> dict[str, Tracker]:
    """Create the trackers. Raises `UserError` as `check_trackers` does, and for a place that cannot be written to."""
    check_trackers(names)
    kinds: dict[str, Callable[[str], Tracker]] = {"tensorboard": TensorBoard, "mlflow": Mlflow, "wandb": WandB}
    return {name: kinds[name](root) for name in names}


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
        except Exception:  # an object store did not answer, or a file is damaged: the search itself says so
            return
        for follower in followers:
            follower.hand_on(trials, last)

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
        self._over: set[str] = set()
        self._complaint = ""

    def hand_on(self, trials: list[Trial], last: bool) -> None:
        for trial in trials:
            if trial.id in self._over or not trial.metrics:
                continue
            try:
                self._hand_on(trial, last)
            except Exception as error:  # a failing tracker must not end a search
                complaint = f"{self._name}: {' '.join(str(error).split())[:200]}"
                if complaint != self._complaint:
                    self._complaint = complaint
                    say(f"  {complaint}; training continues")

    def _hand_on(self, trial: Trial, last: bool) -> None:
        if trial.id not in self._runs:
            self._runs[trial.id] = self._tracker.begin(trial)
        last_logged = self._last_logged.get(trial.id, 0)
        lines = [_numbers(line) for line in trial.metrics if line["iteration"] > last_logged]
        self._tracker.log(self._runs[trial.id], lines)
        self._last_logged[trial.id] = trial.iteration
        if trial.ended or last:
            self._tracker.end(self._runs[trial.id], trial.state)
            self._over.add(trial.id)


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if isinstance(value, (int, float)) and math.isfinite(value)}


def flat(config: Config) -> dict[str, Any]:
    """Dotted key -> value, of the whole configuration."""

    def walk(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        for key, value in node.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    return dict(walk(config.model_dump(mode="json"), ""))


def _name(root: str) -> str:
    return root.rpartition("/")[2]


class TensorBoard:
    """Event files in `tensorboard/` of the search or run, each trial in its own folder, with its pictures of attention.

    On an object store they appear whole when a trial ends: `tensorboard --logdir STORAGE/NAME/tensorboard`.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def begin(self, trial: Trial) -> Any:
        from tensorboardX import SummaryWriter

        target = storage.join(self._root, "tensorboard", trial.id)
        _forget_events(target)
        folder = target if storage.is_local(target) else tempfile.mkdtemp(prefix="tune-ego-events-")
        return _Events(trial, target, folder, SummaryWriter(folder), {})

    def log(self, run: Any, lines: list[dict[str, float]]) -> None:
        for line in lines:
            iteration = int(line["iteration"])
            for key, value in line.items():
                if key != "iteration":
                    run.writer.add_scalar(key, value, iteration)
            picture = storage.join(run.trial.run, experiment.picture_file(iteration))
            if METRIC in line:
                run.last[METRIC] = max(line[METRIC], run.last.get(METRIC, 0.0))
                if storage.exists(picture):
                    run.writer.add_image("attention", read_png(picture), iteration, dataformats="HWC")
        run.writer.flush()

    def end(self, run: Any, state: str) -> None:
        from tensorboardX.summary import hparams

        values = flat(run.trial.config).items()
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values}
        for part in hparams(plain, run.last):
            run.writer.file_writer.add_summary(part)
        run.writer.close()
        if run.folder != run.target:
            for file in Path(run.folder).iterdir():
                storage.write_bytes(storage.join(run.target, file.name), file.read_bytes())
            shutil.rmtree(run.folder)


def _forget_events(target: str) -> None:
    """Remove what an earlier start has written of a trial: all of it is written again."""
    for name in storage.list_names(target):
        if "tfevents" in name:
            storage.remove(storage.join(target, name))


class _Events(NamedTuple):
    trial: Trial
    target: str
    folder: str
    """Local folder of the event files: TensorBoard's writer writes local files only."""
    writer: Any
    last: dict[str, float]
    """The best accuracy, for the table of hyper-parameters."""


def read_png(uri: str) -> Any:
    """Read a PNG as RGB uint8, [H, W, 3]."""
    image = cv2.imdecode(np.frombuffer(storage.read_bytes(uri), np.uint8), cv2.IMREAD_COLOR)
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class Mlflow:
    """At MLFLOW_TRACKING_URI, else in `mlflow.db` in the folder of the search or run."""

    def __init__(self, root: str) -> None:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException

        logging.getLogger("mlflow").setLevel(logging.WARNING)
        logging.getLogger("alembic").setLevel(logging.WARNING)
        if not os.environ.get("MLFLOW_TRACKING_URI") and not storage.is_local(root):
            raise UserError(f"--track mlflow: {root} is no place for its database; set MLFLOW_TRACKING_URI")
        try:
            storage_uri = os.environ.get("MLFLOW_TRACKING_URI") or _database(root)
            self._client = MlflowClient(tracking_uri=storage_uri)
            existing = self._client.get_experiment_by_name(_name(root))
            self._experiment = (
                self._client.create_experiment(_name(root)) if existing is None else existing.experiment_id
            )
        except MlflowException as error:
            raise UserError(f"--track mlflow: {' '.join(str(error).split())[:300]}") from error

    def begin(self, trial: Trial) -> Any:
        from mlflow.entities import Param

        known = self._client.search_runs([self._experiment], f"tags.`{_RUN_TAG}` = '{trial.run}'")
        if known:
            self._client.update_run(known[0].info.run_id, status="RUNNING")
            return known[0].info.run_id
        tags = {_RUN_TAG: trial.run}
        run = self._client.create_run(self._experiment, run_name=trial.id, tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in flat(trial.config).items()]
        for start in range(0, len(params), _PARAMS_A_REQUEST):
            self._client.log_batch(run, params=params[start : start + _PARAMS_A_REQUEST])
        return run

    def log(self, run: Any, lines: list[dict[str, float]]) -> None:
        from mlflow.entities import Metric

        history = self._client.get_metric_history(run, "train_loss")
        last = max((point.step for point in history), default=0)
        now = int(1000 * time.time())
        metrics = [
            Metric(key, float(value), now, int(line["iteration"]))
            for line in lines
            if line["iteration"] > last
            for key, value in line.items()
            if key != "iteration"
        ]
        for start in range(0, len(metrics), _METRICS_A_REQUEST):
            self._client.log_batch(run, metrics=metrics[start : start + _METRICS_A_REQUEST])

    def end(self, run: Any, state: str) -> None:
        self._client.set_tag(run, "tune_ego.state", state)
        self._client.set_terminated(run, _MLFLOW_STATUS.get(state, "KILLED"))


def _database(root: str) -> str:
    Path(root).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root}/mlflow.db"


class WandB:
    """Weights & Biases, in the mode of WANDB_MODE. Without it, and without a login, offline: a prompt would block.

    Its files go into the folder of a local search or run.
    """

    def __init__(self, root: str) -> None:
        import wandb

        self._wandb, self._project = wandb, _name(root)
        self._folder = root if storage.is_local(root) else None

    def begin(self, trial: Trial) -> Any:
        return self._wandb.init(
            project=self._project,
            id=hashlib.sha256(trial.run.encode()).hexdigest()[:16],
            name=trial.id,
            config=flat(trial.config),
            dir=self._folder,
            mode=_wandb_mode(),
            resume="allow",
            reinit="create_new",  # several trials at a time
            settings=self._wandb.Settings(silent=True, console="off"),
        )

    def log(self, run: Any, lines: list[dict[str, float]]) -> None:
        for line in lines:
            if line["iteration"] >= run.step:
                run.log({key: value for key, value in line.items() if key != "iteration"}, step=int(line["iteration"]))

    def end(self, run: Any, state: str) -> None:
        run.summary["state"] = state
        run.finish(exit_code=0 if state in ("finished", "stopped") else 1)


def _wandb_mode() -> Any:
    mode = os.environ.get("WANDB_MODE")
    if mode:
        return mode
    try:
        known = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        known = {}
    return "online" if os.environ.get("WANDB_API_KEY") or any("wandb" in host for host in known) else "offline"


def search_tracked(names: Sequence[str], root: str) -> Any:
    """Track the search at `root` (`tracked`)."""
    read_search = reading.repeated_reader(root)
    return tracked(make_trackers(names, root), lambda: read_search().trials)


def run_tracked(names: Sequence[str], config: Config, run: str) -> Any:
    """Track one run (`tracked`)."""

    def read_trials() -> list[Trial]:
        done = storage.exists(storage.join(run, checkpoint_files.MODEL_FILE))
        state = "finished" if done else "interrupted"
        return [Trial(_name(run), state, run, {}, 0, config, experiment.read_metrics(run))]

    return tracked(make_trackers(names, run), read_trials)
