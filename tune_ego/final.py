"""`train`: one run of a given configuration, followed on screen."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tune_ego import __version__, experiment, storage
from tune_ego.cluster import ray_session
from tune_ego.config import Config, load_config
from tune_ego.console import percent, say
from tune_ego.errors import UserError
from tune_ego.experiment import METRIC

_LOOK_EVERY = 1.0  # seconds


def train_final(config: Config, data: str, run: str, address: str | None) -> str:
    """Train `config` in the folder or URI `run`, going on where an earlier start of the same run stopped.

    Returns the URI of the weights. Raises `UserError` where the folder holds another run.
    """
    from tune_ego.launch import Job, check_run, fit, fitting_runs, gpus_per_worker, live_nodes, with_found_weights

    run, data = storage.absolute(run), storage.absolute(data)
    config = with_found_weights(config, _started(run))
    check_run(config, data)
    _check_same_run(config, data, run)
    model = storage.join(run, experiment.MODEL_FILE)
    if storage.exists(model):
        say(f"{run} is finished already: {model}")
        return model
    with ray_session(address):
        gpus = gpus_per_worker(config, live_nodes())
        fitting_runs(config, gpus, live_nodes())
        storage.write_json(storage.join(run, experiment.RUN_FILE), {"data": data, "version": __version__})
        with _followed(config, run):
            fit(Job(config, data, run, gpus, final=True))
    say(f"Weights: {model}")
    return model


def _started(run: str) -> Config | None:
    """The configuration of a run that was started before."""
    uri = storage.join(run, experiment.CONFIG_FILE)
    return load_config(uri) if storage.exists(uri) else None


def _check_same_run(config: Config, data: str, run: str) -> None:
    before = _started(run)
    if before is not None:
        if before != config:
            raise UserError(f"{run}: the name is already used by a run of another configuration; choose another --name")
        started_on = storage.read_json(storage.join(run, experiment.RUN_FILE))["data"]
        if started_on != data:
            raise UserError(f"{run}: this run was started on the shards {started_on}, not {data}")
        metrics = experiment.read_metrics(run)
        say(f"{run} goes on{' after iteration ' + str(metrics[-1]['iteration']) if metrics else ''}")
    elif set(storage.list_names(run)) - {experiment.RUN_FILE}:
        raise UserError(f"{run}: the folder is not empty and holds no run; choose another --name")


@contextmanager
def _followed(config: Config, run: str) -> Iterator[None]:
    """Print a run's validations while the body runs: they are read from its files, wherever its workers are."""
    ended = threading.Event()
    shown = sum(METRIC in line for line in experiment.read_metrics(run))
    warned = False

    def follow() -> None:
        nonlocal shown, warned
        while True:
            last = ended.wait(_LOOK_EVERY)
            lines = experiment.read_metrics(run)
            for line in [line for line in lines if METRIC in line][shown:]:
                shown += 1
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
