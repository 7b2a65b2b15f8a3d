"""`tune` and `resume`: a search with Ray Tune, each trial of which is a Ray Train run."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import ray
from ray import tune
from ray._private.state import actors
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from tune_ego import __version__, experiment, storage
from tune_ego.cluster import is_local, ray_session
from tune_ego.config import Config, load_config
from tune_ego.console import percent, print_table, say
from tune_ego.dataset.shards import open_shards
from tune_ego.errors import UserError
from tune_ego.experiment import METRIC, Experiment, Trial
from tune_ego.launch import (
    TRIAL_CPUS,
    Job,
    check_run,
    fit,
    fitting_runs,
    gpus_per_worker,
    initial_weights,
    live_nodes,
    placement_group_prefix,
    with_found_weights,
)
from tune_ego.search_space import SearchSpace, load_space

_SCHEDULER_FILE = "asha.pkl"
# Seconds.
_RELEASE_AFTER = 3.0
"""Between a trial's end and the first removal of its placement groups: Ray Train may do it itself."""
_SWEEP_EVERY = 1.0
_CONTROLLERS_END_WITHIN = 30.0
_LAST_SWEEPS = 5


def start_search(
    space_name: str,
    data: str,
    root: str,
    changes: dict[str, Any],
    seed: int,
    concurrent: int | None,
    address: str | None,
) -> Experiment:
    """Run a new search in the folder or URI `root`; raises `UserError` where that name is taken."""
    space = load_space(space_name, changes)
    if "seed" not in {**space.base, **space.branches}:
        changes = {**changes, "seed": seed}
        space = load_space(space_name, changes)
    # Here and now: workers, and a resumed search, have other working directories.
    weights = with_found_weights(_any_config(space)).init_from.model_dump(exclude_none=True)
    changes = changes | {
        key: path for name, path in weights.items() if (key := f"init_from.{name}") not in space.branches
    }
    space = load_space(space_name, changes)
    data = storage.absolute(data)
    _check_runs(space, data)
    if storage.list_names(root):
        hint = (
            f"; to go on with it: tune-ego resume {root}"
            if storage.exists(storage.join(root, "experiment.json"))
            else ""
        )
        raise UserError(f"{root}: the name is already used{hint}")
    spec = {
        "space": space.text,
        "space_source": space.source,
        "overrides": changes,
        "data": data,
        "data_settings": open_shards(data).info["settings"],
        "seed": seed,
        "trials": space.trials,
        "version": __version__,
        "ray": ray.__version__,
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv),
    }
    with ray_session(address):
        config = _any_config(space)
        gpus = gpus_per_worker(config, live_nodes())
        fits = fitting_runs(config, gpus, live_nodes())
        # What is asked for may exceed what fits now: a cluster that scales starts nodes for the trials that wait.
        at_a_time = min(concurrent or fits, fits if is_local(address) else space.trials, space.trials)
        spec["gpus_per_worker"] = gpus
        storage.write_json(storage.join(root, experiment.EXPERIMENT_FILE), spec)
        say(f"{space.trials} trials of up to {config.train.iterations} iterations, {at_a_time} at a time, in {root}")
        tuner = tune.Tuner(
            _trainable(space, data, root, gpus),
            param_space=space.param_space(),
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=space.samples,
                search_alg=BasicVariantGenerator(random_state=seed, max_concurrent=at_a_time),
                scheduler=_scheduler(space, root),
                reuse_actors=False,  # a stopped trial's process still waits for its run: the next trial would hang
            ),
            run_config=tune.RunConfig(name="tune", storage_path=root, verbose=0, callbacks=[_Watcher(root)]),
        )
        return _finish(tuner, root)


def resume_search(root: str, address: str | None) -> Experiment:
    """Go on with a search: unfinished trials from their last checkpoint, finished ones left alone."""
    root = storage.absolute(root)
    found = experiment.read_experiment(root)
    if found.spec["version"] != __version__:
        say(f"Note: this search was started by tune_ego {found.spec['version']}, and this is {__version__}")
    space = found.space
    if open_shards(found.spec["data"]).info["settings"] != found.spec["data_settings"]:
        raise UserError(f"{found.spec['data']}: not the shards this search was started on: their settings differ")
    gpus = found.spec["gpus_per_worker"]
    with ray_session(address):
        fitting_runs(_any_config(space), gpus, live_nodes())
        for trial in found.trials:
            say(f"  {trial.id}: {trial.state}{_going_on(trial)}")
        path = storage.join(root, "tune")
        trainable = _trainable(space, found.spec["data"], root, gpus)
        if not tune.Tuner.can_restore(path):
            raise UserError(
                f"{root}: the search was killed before its first trial; delete the folder and start it anew"
            )
        return _finish(tune.Tuner.restore(path, trainable, resume_unfinished=True, resume_errored=True), root)


def _going_on(trial: Trial) -> str:
    if trial.state not in ("running", "pending"):
        return ""
    saved = experiment.checkpoints(trial.run)
    return f", goes on from {saved[-1].rpartition('/')[2]}" if saved else ", starts anew"


def _any_config(space: SearchSpace) -> Config:
    """One of the space's configurations; budget and resources are the same in all."""
    return space.config(next(space.draws()))


def _check_runs(space: SearchSpace, data: str) -> None:
    """Check every choice of data and starting weights against the shards."""
    checked = set()
    for sampled in space.draws():
        config = space.config(sampled)
        key = (config.data, config.init_from, config.streams, config.model if initial_weights(config) else None)
        if repr(key) not in checked:
            checked.add(repr(key))
            if with_found_weights(config) != config:
                raise UserError(f"{space.source}: init_from: what is searched must be absolute paths of files")
            check_run(config, data)


def _trainable(space: SearchSpace, data: str, root: str, gpus: float) -> Callable[..., None]:
    def trial(sampled: dict[str, Any]) -> None:
        from ray.tune.integration.ray_train import TuneReportCallback

        config = space.config(sampled)
        run = experiment.run_folder(root, tune.get_context().get_trial_id())
        fit(Job(config, data, run, gpus, final=False), [TuneReportCallback()])

    return tune.with_resources(trial, {"CPU": TRIAL_CPUS})


def _scheduler(space: SearchSpace, root: str) -> AsyncHyperBandScheduler:
    # Above the budget: ASHA would end trials that reach max_t by killing them.
    return _SavedASHA(
        storage.join(root, _SCHEDULER_FILE),
        time_attr="iteration",
        max_t=_any_config(space).train.iterations + 1,
        grace_period=space.grace,
        reduction_factor=space.reduction,
        stop_last_trials=False,
    )


class _SavedASHA(AsyncHyperBandScheduler):  # type: ignore[misc]
    """ASHA whose rungs survive the driver: Ray restores a search with empty ones."""

    def __init__(self, uri: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._uri = uri

    def set_search_properties(self, metric: str | None, mode: str | None, **spec: Any) -> bool:
        done = super().set_search_properties(metric, mode, **spec)
        if storage.exists(self._uri):
            with tempfile.TemporaryDirectory(prefix="tune_ego-") as folder:
                path = Path(folder) / _SCHEDULER_FILE
                path.write_bytes(storage.read_bytes(self._uri))
                self.restore(str(path))
        return bool(done)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        action = super().on_trial_result(tune_controller, trial, result)
        with tempfile.TemporaryDirectory(prefix="tune_ego-") as folder:
            path = Path(folder) / _SCHEDULER_FILE
            self.save(str(path))
            storage.write_bytes(self._uri, path.read_bytes())
        return str(action)


class _Watcher(tune.Callback):  # type: ignore[misc]
    """Keeps `trials.json`, tells the user what happens, and removes what stopped trials leave behind."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.states: dict[str, dict[str, Any]] = {}
        self.ended: dict[str, float] = {}
        """Trial -> when, by the monotonic clock."""
        self.next_sweep = 0.0
        self.warned: set[str] = set()

    def setup(self, **info: Any) -> None:
        uri = storage.join(self.root, experiment.TRIALS_FILE)
        if storage.exists(uri):
            self.states = storage.read_json(uri)

    def _note(self, trial: Any, state: str, reason: str = "") -> None:
        self.states[trial.trial_id] = {"state": state, "reason": reason}
        storage.write_json(storage.join(self.root, experiment.TRIALS_FILE), self.states)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._note(trial, "running")
        say(f"  {trial.trial_id}: starts")

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if METRIC in result:
            best = percent(result[METRIC])
            say(f"  {trial.trial_id}: iteration {result['iteration']}, validation mean class accuracy {best}")
            if trial.trial_id not in self.warned:
                self._warn(trial.trial_id)

    def _warn(self, trial_id: str) -> None:
        run = experiment.run_folder(self.root, trial_id)
        config = load_config(storage.join(run, experiment.CONFIG_FILE))
        warning = experiment.collapsed_rate(config, experiment.read_metrics(run))
        if warning:
            self.warned.add(trial_id)
            say(f"  {trial_id}: {warning}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        # Not `trial.last_result`: a trial that was resumed at its end has none.
        run = experiment.run_folder(self.root, trial.trial_id)
        lines = experiment.read_metrics(run)
        budget = load_config(storage.join(run, experiment.CONFIG_FILE)).train.iterations
        stopped = not lines or lines[-1]["iteration"] < budget
        self._note(trial, "stopped" if stopped else "finished")
        say(f"  {trial.trial_id}: {'stopped by ASHA' if stopped else 'finished'}")
        self._ended(trial)

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        error = str(trial.get_pickled_error() or "died").strip().splitlines()
        failure = experiment.read_failure(experiment.run_folder(self.root, trial.trial_id))
        reason = failure.reason if failure else error[-1]
        self._note(trial, "failed", reason)
        say(f"  {trial.trial_id}: failed: {reason}")
        self._ended(trial)

    def _ended(self, trial: Any) -> None:
        self.ended[trial.trial_id] = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Any], **info: Any) -> None:
        now = time.monotonic()
        if now >= self.next_sweep:
            self.next_sweep = now + _SWEEP_EVERY
            self._sweep(trial_id for trial_id, moment in self.ended.items() if now >= moment + _RELEASE_AFTER)

    def on_experiment_end(self, trials: list[Any], **info: Any) -> None:
        end = time.monotonic() + _CONTROLLERS_END_WITHIN
        while _controllers() and time.monotonic() < end:
            time.sleep(0.1)
        for _ in range(_LAST_SWEEPS):  # what a controller asked for with its last breath may come late
            self._sweep(trial.trial_id for trial in trials)
            time.sleep(0.2)

    def _sweep(self, trial_ids: Iterable[str]) -> None:
        """Remove the placement groups of trials that have ended; a controller that still lives may make another."""
        prefixes = tuple(placement_group_prefix(experiment.run_folder(self.root, trial_id)) for trial_id in trial_ids)
        for group, record in placement_group_table().items() if prefixes else ():
            if record["state"] != "REMOVED" and record["name"].startswith(prefixes):
                remove_placement_group(PlacementGroup(ray.PlacementGroupID.from_hex(group)))


def _controllers() -> list[Any]:
    """Ray Train's controllers of this search that live: they end some time after their trials."""
    job = ray.get_runtime_context().get_job_id()
    live = actors(job_id=ray.JobID.from_hex(job), actor_state_name="ALIVE").values()
    return [actor for actor in live if actor["ActorClassName"].endswith("TrainController")]


def _finish(tuner: tune.Tuner, root: str) -> Experiment:
    tuner.fit()
    done = experiment.read_experiment(root)
    columns, rows = experiment.trial_table(done)
    print_table(f"\nTrials of {root}", columns, rows)
    if done.trials and all(trial.state == "failed" for trial in done.trials):
        raise UserError(f"{root}: every trial failed, the first for: {done.trials[0].reason}")
    return done
