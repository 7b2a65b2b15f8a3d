"""The trackers TensorBoard, MLflow and Weights & Biases, each with the same three calls."""

from __future__ import annotations

import hashlib
import logging
import netrc
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import cv2
import numpy as np

from tune_ego import storage
from tune_ego.config_io import flatten
from tune_ego.errors import UserError
from tune_ego.results import experiment
from tune_ego.results.experiment import METRIC, Trial

if TYPE_CHECKING:
    from tune_ego.results.event_file import EventFile

_METRICS_A_REQUEST = 900
"""Metrics in one request; MLflow accepts at most 1,000."""
_PARAMS_A_REQUEST = 100
_RUN_TAG = "tune_ego.run"
_MLFLOW_STATUS = {"finished": "FINISHED", "failed": "FAILED"}


class Tracker(Protocol):
    """A tracker for the runs of one search or final run."""

    def begin(self, trial: Trial) -> Any:
        """Open the tracker's own run, the one of an earlier start where there is one."""

    def log(self, run: Any, lines: list[dict[str, float]]) -> None:
        """Write lines of metrics, each with its `iteration`. Lines that the tracker has already are left out."""

    def end(self, run: Any, state: str) -> None: ...


def result_name(root: str) -> str:
    """Return the name of a search or run: the last component of its folder or URI."""
    return root.rpartition("/")[2]


class TensorBoard:
    """Event files in `tensorboard/` of the search or run, each trial in its own folder, with its pictures of attention.

    On an object store they appear whole when a trial ends: `tensorboard --logdir STORAGE/NAME/tensorboard`.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def begin(self, trial: Trial) -> Any:
        from tune_ego.results.event_file import EventFile

        target = storage.join(self._root, "tensorboard", trial.id)
        _forget_events(target)
        folder = target if storage.is_local(target) else tempfile.mkdtemp(prefix="tune-ego-events-")
        return _Events(trial, target, folder, EventFile(folder), {})

    def log(self, run: Any, lines: list[dict[str, float]]) -> None:
        from tensorboardX.summary import image, scalar

        summaries = []
        for line in lines:
            iteration = int(line["iteration"])
            summaries += [(scalar(key, value), iteration) for key, value in line.items() if key != "iteration"]
            picture = storage.join(run.trial.run, experiment.picture_file(iteration))
            if METRIC in line and storage.exists(picture) and (pixels := read_png(picture)) is not None:
                summaries.append((image("attention", pixels, dataformats="HWC"), iteration))
        run.file.append(summaries)
        for accuracy in (line[METRIC] for line in lines if METRIC in line):
            run.last[METRIC] = max(accuracy, run.last.get(METRIC, 0.0))

    def end(self, run: Any, state: str) -> None:
        from tensorboardX.summary import hparams

        values = flatten(run.trial.config).items()
        plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in values}
        run.file.append((part, 0) for part in hparams(plain, run.last))
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
    file: EventFile
    last: dict[str, float]
    """The best accuracy, for the table of hyper-parameters."""


def read_png(uri: str) -> Any:
    """Read a PNG as RGB uint8, [H, W, 3]; None for a damaged file."""
    data = np.frombuffer(storage.read_bytes(uri), np.uint8)
    image = cv2.imdecode(data, cv2.IMREAD_COLOR) if len(data) else None
    return None if image is None else cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class Mlflow:
    """MLflow. Writes to MLFLOW_TRACKING_URI, else to `mlflow.db` in the folder of the search or run."""

    def __init__(self, root: str) -> None:
        if not os.environ.get("MLFLOW_TRACKING_URI") and not storage.is_local(root):
            raise UserError(f"{root} is no place for its database; set MLFLOW_TRACKING_URI")
        self._client = mlflow_client(os.environ.get("MLFLOW_TRACKING_URI") or _database(root))
        existing = mlflow_experiment(self._client, result_name(root))
        with _mlflow_errors():
            self._experiment = self._client.create_experiment(result_name(root)) if existing is None else existing

    def begin(self, trial: Trial) -> Any:
        from mlflow.entities import Param

        earlier = self._client.search_runs([self._experiment], f"tags.`{_RUN_TAG}` = '{trial.run}'")
        if earlier:
            self._client.update_run(earlier[0].info.run_id, status="RUNNING")
            return earlier[0].info.run_id
        tags = {_RUN_TAG: trial.run}
        run = self._client.create_run(self._experiment, run_name=trial.id, tags=tags).info.run_id
        params = [Param(key, str(value)) for key, value in flatten(trial.config).items()]
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


def mlflow_client(uri: str) -> Any:
    """Return a client of the server or database at `uri`, which gives up after some seconds."""
    # MLflow itself tries for a quarter of an hour.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "4")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow import MlflowClient

    with _mlflow_errors():
        return MlflowClient(tracking_uri=uri)


def mlflow_experiment(client: Any, name: str) -> str | None:
    """Return the id of an experiment; None if there is none. Raises `UserError` for one that is deleted."""
    with _mlflow_errors():
        existing = client.get_experiment_by_name(name)
    if existing is None:
        return None
    if existing.lifecycle_stage == "deleted":
        number = existing.experiment_id
        raise UserError(
            f"its experiment {name!r} is deleted; restore it (mlflow experiments restore --experiment-id {number})"
        )
    return str(existing.experiment_id)


@contextmanager
def _mlflow_errors() -> Iterator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = " ".join(str(error).split())  # the cause comes last, after the address
        raise UserError(text if len(text) <= 300 else f"{text[:100]} ... {text[-200:]}") from error


def _database(root: str) -> str:
    Path(root).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{root}/mlflow.db"


class WandB:
    """Weights & Biases, in the mode of WANDB_MODE. Without it, and without a login, offline: a prompt would block.

    Its files go into the folder of a local search or run.
    """

    def __init__(self, root: str) -> None:
        import wandb

        self._wandb, self._project = wandb, result_name(root)
        self._folder = root if storage.is_local(root) else None

    def begin(self, trial: Trial) -> Any:
        return self._wandb.init(
            project=self._project,
            id=hashlib.sha256(trial.run.encode()).hexdigest()[:16],
            name=trial.id,
            config=flatten(trial.config),
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
        hosts = netrc.netrc().hosts
    except (OSError, netrc.NetrcParseError):
        hosts = {}
    return "online" if os.environ.get("WANDB_API_KEY") or any("wandb" in host for host in hosts) else "offline"
