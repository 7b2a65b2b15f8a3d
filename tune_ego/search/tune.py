"""`tune` and `resume`: a search with Ray Tune, each trial of which is a Ray Train run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Sequence, Set
from datetime import datetime, timezone
from typing import Any

import ray
from ray import tune

from tune_ego import __version__, storage
from tune_ego.cluster import ray_session
from tune_ego.config import Config
from tune_ego.console import print_table, say
from tune_ego.dataset.shards import open_shards
from tune_ego.driver_signals import end_interrupted
from tune_ego.errors import Interrupted, UserError
from tune_ego.results import checkpoint_files, driver, experiment, reading, trial_records
from tune_ego.results.checkpoint_files import last_whole_iteration
from tune_ego.results.decisions import trial_decisions
from tune_ego.results.experiment import METRIC, Experiment, Trial
from tune_ego.results.progress import search_shown
from tune_ego.results.tables import configuration_table, trial_table
from tune_ego.results.tracking import check_trackers, search_tracked
from tune_ego.results.trial_records import TrialRecords
from tune_ego.runs.concurrency import runs_at_a_time
from tune_ego.runs.job import Job
from tune_ego.runs.launch import check_run, check_same_data, fit, initial_weights, resolve_weights
from tune_ego.runs.placement import cluster_nodes, gpus_per_worker, trial_resources
from tune_ego.search.scheduler import STOP, RecordedScheduler
from tune_ego.search.searcher import TrialSource, import_optuna
from tune_ego.search.watcher import Watcher
from tune_ego.search_space import SearchSpace
from tune_ego.space_io import load_space


def start_search(
    space_name: str,
    data: str,
    root: str,
    changes: dict[str, Any],
    seed: int,
    concurrent: int | None,
    address: str | None,
    *,
    track: Sequence[str] = (),
    node_types: Sequence[str] = (),
    resume_command: str = "",
) -> Experiment:
    """Run a new search in the folder or URI `root`. Raises `UserError` where the folder is in use.

    `changes` are keys of the search space set on the command line. `track` names the trackers
    (`tracking.make_trackers`) that record the trials. `resume_command` is printed if the search was interrupted;
    `tune-ego resume` by default.
    """
    check_trackers(track, root)
    space, changes = resolved_space(space_name, changes, seed)
    data = storage.absolute(data)
    check_runs(space, data)
    shards = open_shards(data)
    if set(storage.list_names(root)) - {driver.DRIVER_FILE}:
        hint = (
            f"; to resume that search: tune-ego resume {root}"
            if storage.exists(storage.join(root, experiment.EXPERIMENT_FILE))
            else ""
        )
        raise UserError(f"{root}: the name is already used{hint}")
    driver.refuse_driven(root)
    with ray_session(address):
        spec = {
            "space": space.text,
            "space_source": space.source,
            "overrides": changes,
            "samples": space.samples,
            "trials": space.trials,
            "data": data,
            "data_settings": shards.info["settings"],
            "data_fingerprint": shards.fingerprint,
            "seed": seed,
            "concurrent": concurrent,
            "track": list(track),
            "gpus_per_worker": gpus_per_worker(any_config(space), cluster_nodes(address, node_types)),
            "node_types": list(node_types),
            "version": __version__,
            "ray": ray.__version__,
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(sys.argv),
        }
        return _drive(Experiment(root, spec, []), address, resume_command)


def resume_search(
    root: str,
    address: str | None,
    *,
    data: str | None = None,
    node_types: Sequence[str] = (),
    samples: int | None = None,
    iterations: int | None = None,
    concurrent: int | None = None,
    resume_command: str = "",
) -> Experiment:
    """Resume a search: unfinished trials from their last checkpoint; trials that have ended stay as they are.

    `data` is the new place of the shards if they were moved. With more `samples` further configurations are drawn. With
    more `iterations` finished trials continue to the new budget; trials that the scheduler stopped stay stopped.
    `resume_command` is that of `start_search`.
    """
    search = reading.read_experiment(root)
    if search.spec["version"] != __version__:
        say(f"Note: this search was started by tune_ego {search.spec['version']}, and this is {__version__}")
    search.spec = experiment.note_version(search.spec)
    check_trackers(search.spec.get("track", ()), search.root)
    search.spec["data"] = _checked_data(search, data)
    again = {"pending", "running", "interrupted", "failed"}
    if iterations is not None:
        before = any_config(search.space).train.iterations
        if iterations <= before:
            raise UserError(f"--iterations {iterations}: the search has {before} already; it can only be raised")
        search.spec["overrides"]["train.iterations"] = iterations
        again.add("finished")
    if samples is not None:
        if samples <= search.spec["samples"]:
            raise UserError(
                f"--samples {samples}: the search has {search.spec['samples']} already; it can only be raised"
            )
        search.spec["samples"] = samples
    if concurrent is not None:
        search.spec["concurrent"] = concurrent
    resumed = Experiment(search.root, search.spec, search.trials)
    resumed.spec["trials"] = resumed.space.trials
    for trial in search.trials:
        say(f"  {trial.id}: {trial.state}{_resume_note(trial) if trial.state in again else ''}")
    for name, damage in search.damaged.items():
        say(f"  {name}: its records are damaged: {damage}")
    driver.refuse_driven(search.root)
    with ray_session(address):
        _decide_gpus(resumed, address, node_types)
        return _drive(resumed, address, resume_command, again)


def _checked_data(search: Experiment, data: str | None) -> str:
    """Return the place of a search's shards, `data` if it is given. Raises `UserError` for another data set."""
    spec = search.spec
    try:
        shards = open_shards(spec["data"] if data is None else storage.absolute(data))
    except UserError as error:
        raise UserError(f"{error}; if the shards were moved: tune-ego resume {search.root} --data NEW") from error
    if "data_fingerprint" in spec:
        check_same_data(shards, spec["data_fingerprint"], search.root)
    elif shards.info["settings"] != spec["data_settings"]:  # of an earlier version
        raise UserError(f"{search.root}: {shards.root} has other settings than the shards it was started on")
    return shards.root


def _decide_gpus(search: Experiment, address: str | None, node_types: Sequence[str]) -> None:
    """Decide again how many GPUs a worker has: the cluster may be another one than at the start."""
    spec = search.spec
    spec["node_types"] = list(node_types) or spec.get("node_types", [])
    before = spec["gpus_per_worker"]
    spec["gpus_per_worker"] = gpus_per_worker(any_config(search.space), cluster_nodes(address, spec["node_types"]))
    if spec["gpus_per_worker"] != before:
        say(f"Workers have {spec['gpus_per_worker']:g} GPUs on this cluster; they had {before:g} before")


def _resume_note(trial: Trial) -> str:
    failure = experiment.read_failure(trial.run)
    if failure is not None and failure.final:
        return f" for good: {failure.reason}"
    saved = last_whole_iteration(trial.run)
    return ", starts from scratch" if saved is None else f", resumes from iteration {saved}"


def _drive(search: Experiment, address: str | None, resume_command: str, again: Set[str] = frozenset()) -> Experiment:
    """Run the trials of a search that have not ended, and trials in one of the states `again`."""
    root, spec, space = search.root, search.spec, search.space
    config, gpus = any_config(space), spec["gpus_per_worker"]
    nodes = cluster_nodes(address, spec.get("node_types", ()))
    at_a_time = runs_at_a_time(config, gpus, nodes, space.trials, spec["concurrent"])
    resume_command = resume_command or shlex.join(["tune-ego", "resume", root])
    with driver.driving(root, resume_command) as interruption:
        records = TrialRecords(root)
        if again:  # before the budget is raised: a trial that has finished with less is taken for damaged
            records.reopen(again)
        storage.write_json(storage.join(root, experiment.EXPERIMENT_FILE), spec)
        source = TrialSource(root, space, spec["seed"], records, at_a_time, interruption.__bool__)
        if source.left:
            say(f"{source.left} trials of up to {config.train.iterations} iterations, {at_a_time} at a time, in {root}")
            tuner = tune.Tuner(
                tune.with_resources(
                    _trainable(space, spec["data"], root, gpus, driver.claim_id(root)), trial_resources(at_a_time)
                ),
                tune_config=tune.TuneConfig(
                    metric=METRIC,
                    mode="max",
                    num_samples=source.left,
                    search_alg=source,
                    scheduler=RecordedScheduler(root, space, config.train.iterations),
                    reuse_actors=False,  # the process of a stopped trial waits for its run: the next one would hang
                ),
                run_config=tune.RunConfig(
                    name="tune",
                    storage_path=root,
                    verbose=0,
                    failure_config=tune.FailureConfig(max_failures=config.compute.max_failures),
                    callbacks=[Watcher(root, space, config.train.iterations, records)],
                ),
            )
            with search_tracked(spec.get("track", ()), root), search_shown(root):
                tuner.fit()
        done = reading.read_experiment(root)
        _show(done)
        if interruption and not all(trial.ended for trial in done.trials):
            end_interrupted(resume_command)
    if done.trials and all(trial.state == "failed" for trial in done.trials):
        raise UserError(f"{root}: every trial failed, the first for: {done.trials[0].reason}")
    return done


def _show(done: Experiment) -> None:
    print_table(f"\nTrials of {done.root}", *trial_table(done))
    if done.space.repeats > 1:
        print_table("\nConfigurations, over their repeats", *configuration_table(done))


def resolved_space(name: str, changes: dict[str, Any], seed: int) -> tuple[SearchSpace, dict[str, Any]]:
    """Return a search space with a seed and absolute paths, and the changes to its file that set them."""
    space = load_space(name, changes)
    if "seed" not in {**space.base, **space.branches}:
        changes = {**changes, "seed": seed}
        space = load_space(name, changes)
    if space.searcher == "tpe":
        import_optuna()
    # Paths are resolved here: workers and a resumed search have other working directories.
    weights = resolve_weights(any_config(space)).init_from.model_dump(exclude_none=True)
    changes = changes | {
        key: path for name, path in weights.items() if (key := f"init_from.{name}") not in space.branches
    }
    return load_space(name, changes), changes


def any_config(space: SearchSpace) -> Config:
    """Return one of the space's configurations. Budget and resources are the same in all."""
    return space.config(next(space.draws()))


def check_runs(space: SearchSpace, data: str) -> None:
    """Check every choice of data and starting weights against the shards."""
    checked = set()
    for sampled in space.draws():
        config = space.config(sampled)
        key = (
            *(config.data, config.init_from, config.streams, config.model if initial_weights(config) else None),
            *(config.optimizer.name, config.train.freeze_trunk_for > 0),
        )
        if repr(key) not in checked:
            checked.add(repr(key))
            if resolve_weights(config) != config:
                raise UserError(f"{space.source}: init_from: values that are searched must be absolute paths of files")
            check_run(config, data)


def _trainable(space: SearchSpace, data: str, root: str, gpus: float, claim: str) -> Callable[..., None]:
    def trial(draw: dict[str, Any]) -> None:
        from ray.tune.integration.ray_train import TuneReportCallback  # in the trial's own process

        run = trial_records.run_folder(root, draw["trial"])
        try:
            config = space.resumed_config(storage.join(run, experiment.CONFIG_FILE), draw["sampled"], draw["repeat"])
            ended = last_report(root, run, config)
        except UserError as error:
            experiment.write_failure(run, experiment.Failure(str(error), final=False))
            return
        if ended is not None:  # the driver died before it recorded the end
            tune.report(ended)
            return
        try:
            job = Job(config, data, run, gpus, driver.stop_uri(root), final=False, claim=claim)
            fit(job, [TuneReportCallback()])
        except UserError as error:  # Tune must not try again
            if experiment.read_failure(run) is None:
                experiment.write_failure(run, experiment.Failure(str(error), final=False))
        except Interrupted:
            return  # the checkpoint is written

    return trial


def last_report(root: str, run: str, config: Config) -> dict[str, Any] | None:
    """Return the last report of a trial that has ended; None for a trial that has not."""
    decisions = trial_decisions(root, run.rpartition("/")[2])
    if decisions and decisions[-1].action == STOP:
        return {"iteration": decisions[-1].iteration, METRIC: decisions[-1].accuracy}
    last = config.train.iterations
    if last in checkpoint_files.checkpoint_iterations(run) and last_whole_iteration(run) == last:
        validations = [line for line in experiment.read_metrics(run, whole=False) if METRIC in line]
        if validations and validations[-1]["iteration"] == last:
            return validations[-1]
        raise UserError(f"{run}: the trial has finished, but its {experiment.METRICS_FILE} is damaged")
    return None
