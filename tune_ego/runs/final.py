"""`train`: one run of a given configuration, followed on screen."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tune_ego import storage
from tune_ego.cluster import ray_session
from tune_ego.config import Config
from tune_ego.config_io import different_keys, load_config
from tune_ego.console import console, percent, say
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.results import checkpoint_files, experiment
from tune_ego.results.checkpoint_files import last_whole_iteration
from tune_ego.results.driver import DRIVER_FILE, claim_id, driving, refuse_driven, stop_uri
from tune_ego.results.experiment import METRIC
from tune_ego.results.progress import run_shown
from tune_ego.results.tracking import check_trackers, run_tracked
from tune_ego.runs.concurrency import runs_at_a_time
from tune_ego.runs.job import Job
from tune_ego.runs.launch import check_same_data, fit, resolve_run
from tune_ego.runs.placement import cluster_nodes, gpus_per_worker
from tune_ego.runs.worker_task import call_on_worker

_READ_EVERY = 1.0
"""Seconds between two reads of the run's files."""
_RESUME_COMMAND = "the same command"
_MAY_CHANGE = ("label", "data.cache_dir", "data.cache_gb", "compute.readers", "compute.max_failures")
"""Keys that change nothing in what a run computes. A run resumes under their new values."""


def train_final(
    config: Config,
    data: str,
    run: str,
    address: str | None,
    *,
    test: bool = False,
    track: Sequence[str] = (),
    node_types: Sequence[str] = (),
) -> str:
    """Train `config` in the folder or URI `run`; an interrupted run resumes from its last checkpoint.

    With `test` the final weights are tested at the end, on one worker's CPUs and GPUs. `track` names the trackers
    (`tracking.make_trackers`) that record the run, `node_types` nodes that the cluster may start. Returns the URI of
    the weights. Raises `UserError` where the folder holds another run.
    """
    check_trackers(track, run)
    run, data = storage.absolute(run), storage.absolute(data)
    config = resolve_run(config, data, before=_started(run))
    _check_same_run(config, data, run)
    model = storage.join(run, checkpoint_files.MODEL_FILE)
    test = test and not storage.exists(storage.join(run, experiment.EVALUATION_FILE))
    trained = storage.exists(model)
    if trained:
        say(f"{run} is finished already: {model}")
        if not test:
            return model
    elif _started(run) is not None:
        saved = last_whole_iteration(run)
        say(f"{run}: {'starts from scratch' if saved is None else f'resumes from iteration {saved}'}")
    refuse_driven(run)
    with ray_session(address):
        nodes = cluster_nodes(address, node_types)
        gpus = gpus_per_worker(config, nodes)
        runs_at_a_time(config, gpus, nodes, beside=0)
        if not trained:
            with driving(run, _RESUME_COMMAND):
                _write_record(run, data)
                with run_tracked(track, config, run), run_shown(config, run), _print_validations(config, run):
                    fit(Job(config, data, run, gpus, stop_uri(run), final=True, claim=claim_id(run)))
            say(f"Weights: {model}")
        if test:
            _test(config, data, run, gpus)
    return model


def _test(config: Config, data: str, run: str, gpus: float) -> None:
    """Test a run's final weights."""
    from tune_ego.evaluation.tables import show  # torch

    def work() -> dict[str, Any]:
        from tune_ego.evaluation.evaluate import evaluate  # torch

        return evaluate(run, data)

    say(f"Testing on the test clips of split {config.data.split}")
    show(call_on_worker(work, config, gpus, _RESUME_COMMAND))


def _started(run: str) -> Config | None:
    """Return the configuration of a run that was started before; None for a new run."""
    uri = storage.join(run, experiment.CONFIG_FILE)
    return load_config(uri) if storage.exists(uri) else None


def _check_same_run(config: Config, data: str, run: str) -> None:
    before = _started(run)
    if before is not None:
        other = [key for key in different_keys(before, config) if key not in _MAY_CHANGE]
        if other:
            raise UserError(
                f"{run}: the name is already used by a run of another configuration ({', '.join(other)}); choose "
                f"another --name, or train {storage.join(run, experiment.CONFIG_FILE)} to resume it"
            )
        record = experiment.read_run_record(run)
        if record is None:
            uri = storage.join(run, experiment.RUN_FILE)
            raise UserError(
                f"{uri}: absent or damaged; it says on which shards the run was started. Choose another --name"
            )
        if "data_fingerprint" in record:
            check_same_data(open_shards(data), record["data_fingerprint"], run)
        elif record["data"] != data:  # of an earlier version
            raise UserError(f"{run}: this run was started on the shards {record['data']}, not {data}")
    elif set(storage.list_names(run)) - {experiment.RUN_FILE, DRIVER_FILE}:
        raise UserError(f"{run}: the folder is not empty and holds no run; choose another --name")


def _write_record(run: str, data: str) -> None:
    uri = storage.join(run, experiment.RUN_FILE)
    before = experiment.read_run_record(run) or {}
    record = {**before, "data": data, "data_fingerprint": open_shards(data).fingerprint}
    storage.write_json(uri, experiment.note_version(record))


@contextmanager
def _print_validations(config: Config, run: str) -> Iterator[None]:
    """Print a run's validations while the body runs, read from the run's files.

    On a terminal, where the progress display shows them, print warnings only.
    """
    ended = threading.Event()
    shown = sum(METRIC in line for line in experiment.read_metrics(run))
    warned = False

    def follow() -> None:
        nonlocal shown, warned
        while True:
            last = ended.wait(_READ_EVERY)
            try:
                lines = experiment.read_metrics(run)
            except (OSError, UserError):  # the object store did not answer: the next read may succeed
                lines = []
            for line in [line for line in lines if METRIC in line][shown:]:
                shown += 1
                if console.is_terminal:
                    continue
                rates = ", ".join(f"{rate:.2g}" for rate in dict.fromkeys(experiment.learning_rates(line).values()))
                say(
                    f"  iteration {line['iteration']}: loss {line['train_loss']:.3f}, learning rate {rates}, "
                    f"validation mean class accuracy {percent(line[METRIC])}, {line['clips_per_second']:.1f} clips/s"
                )
            warning = "" if warned else experiment.collapsed_rate(config, lines)
            if warning:
                warned = True
                say(f"  {warning}")
            if last:
                return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
