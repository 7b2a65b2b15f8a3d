"""Choice of the next configuration: a Ray Tune searcher over the draws of a search space.

`trials.json` holds all draws of a search. The next draw depends on these, the seed and its number alone, so a resumed
search draws the same configurations as an uninterrupted one with the same results.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.search import Searcher

from tune_ego.errors import UserError
from tune_ego.results import experiment, reading, trial_records
from tune_ego.results.experiment import Configuration, Trial
from tune_ego.results.trial_records import TrialRecords
from tune_ego.search_space import SearchSpace
from tune_ego.space_io import check_branches
from tune_ego.space_schema import Domain

if TYPE_CHECKING:
    import optuna

_DRAWN_AHEAD = 10_000
"""Most configurations of a random search that are drawn at its start."""


class TrialSource(Searcher):  # type: ignore[misc]
    """Searcher that passes to Tune the trials of a search that have not ended, and then draws new ones.

    Tune's configuration of a trial is `{"trial": id, "repeat": 0, "sampled": {name: value}}`.
    """

    def __init__(
        self,
        root: str,
        space: SearchSpace,
        seed: int,
        records: TrialRecords,
        at_a_time: int,
        interrupted: Callable[[], bool],
    ) -> None:
        super().__init__()
        self._root, self._space, self._seed, self._records = root, space, seed, records
        self._at_a_time, self._interrupted = at_a_time, interrupted
        unfinished = records.draws()
        new = (n for n in range(space.configurations) if any(name not in records for name in self._names(n)))
        self.left = space.trials - sum(records.state(name) in trial_records.ENDED for name in records)
        """Trials that have not ended, drawn or not."""
        if space.searcher == "random":  # draw them now, so that `status` lists the pending trials
            for number in itertools.islice(new, _DRAWN_AHEAD):
                unfinished += self._add(number)
        self._waiting = itertools.chain(unfinished, itertools.chain.from_iterable(map(self._add, new)))
        self._running: set[str] = set()
        """Tune's names of the running trials."""

    def _names(self, number: int) -> list[str]:
        repeats = self._space.repeats
        return [trial_records.trial_name(number, repeat, repeats) for repeat in range(repeats)]

    def _add(self, number: int) -> list[dict[str, Any]]:
        """Draw configuration `number`; record and return those of its trials that are not on record yet."""
        match self._space.searcher:
            case "random":
                sampled = self._space.draw(self._seed, number)
            case "tpe":
                sampled = draw_by_tpe(self._space, self._seed, number, reading.read_experiment(self._root).trials)
            case unknown:
                raise ValueError(f"no searcher {unknown!r}")
        draws = [
            {"trial": name, "repeat": repeat, "sampled": sampled}
            for repeat, name in enumerate(self._names(number))
            if name not in self._records
        ]
        if draws:
            check_branches(self._space, sampled)
        self._records.add(draws)
        return draws

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:
        if self._interrupted():
            return str(self.FINISHED)
        if len(self._running) >= self._at_a_time:
            return None
        suggested = next(self._waiting, None)
        if suggested is None:
            return str(self.FINISHED)
        self._running.add(trial_id)
        return suggested

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        self._running.discard(trial_id)

    def __reduce__(self) -> Any:
        """Pickle an empty searcher: Tune pickles this one but never loads it, as all state is in the search's files."""
        return Searcher, ()

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: all state is in the search's files."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing, like `save`."""


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("searcher: tpe needs Optuna: pip install 'tune_ego[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def draw_by_tpe(space: SearchSpace, seed: int, number: int, trials: list[Trial]) -> dict[str, Any]:
    """Draw configuration `number` with Optuna's TPE, fitted to the trials of the configurations before it.

    The value of a configuration is the mean of its repeats' best accuracies. A stopped or failed one counts as pruned
    at the iteration it reached, and without a validation as the worst. Running ones count as bad ("constant liar"), so
    that draws spread.
    """
    optuna = import_optuna()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(
            seed=int(np.random.SeedSequence(seed, spawn_key=(number,)).generate_state(1)[0]),
            multivariate=True,
            group=True,
            constant_liar=True,
        )
    study = optuna.create_study(direction="maximize", sampler=sampler)
    for configuration in experiment.by_configuration(trials)[:number]:
        study.add_trial(_optuna_trial(space, configuration))
    optuna_trial = study.ask()

    def choose_value(name: str, domain: Domain) -> Any:
        match domain.form:
            case "choice":
                return domain.values[optuna_trial.suggest_categorical(name, range(len(domain.values)))]
            case "randint":
                return optuna_trial.suggest_int(name, int(domain.values[0]), int(domain.values[1]) - 1)
            case "uniform" | "loguniform":
                return optuna_trial.suggest_float(name, *domain.values, log=domain.form == "loguniform")
            case unknown:
                raise ValueError(f"no draw by tpe from {unknown!r}")

    return space.choose(choose_value)


def _optuna_trial(space: SearchSpace, configuration: Configuration) -> optuna.trial.FrozenTrial:
    """Return a configuration and its results as a trial of Optuna."""
    optuna = import_optuna()
    repeats = configuration.trials
    values, distributions = parameters(space, repeats[0].sampled)
    states = optuna.trial.TrialState
    about = {"params": values, "distributions": distributions}
    if len(repeats) < space.repeats or not all(trial.ended for trial in repeats):
        return optuna.trial.create_trial(state=states.RUNNING, **about)
    if all(trial.state == "finished" for trial in repeats):
        return optuna.trial.create_trial(state=states.COMPLETE, value=configuration.accuracy, **about)
    reached = min(trial.iteration for trial in repeats)
    seen = {} if configuration.accuracy is None else {reached: configuration.accuracy}
    return optuna.trial.create_trial(state=states.PRUNED, intermediate_values=seen, **about)


def parameters(space: SearchSpace, sampled: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (values, distributions) of a draw by name, for Optuna. Choices and grids are indices into their values."""
    optuna = import_optuna()
    domains, values, distributions = dict(space.sampled()), {}, {}
    for name, value in sampled.items():
        domain = domains[name]
        match domain.form:
            case "choice" | "grid":
                values[name] = [_as_list(choice) for choice in domain.values].index(_as_list(value))
                distributions[name] = optuna.distributions.CategoricalDistribution(range(len(domain.values)))
            case "randint":
                values[name], ends = value, (int(domain.values[0]), int(domain.values[1]) - 1)
                distributions[name] = optuna.distributions.IntDistribution(*ends)
            case "uniform" | "loguniform":
                values[name], log = value, domain.form == "loguniform"
                distributions[name] = optuna.distributions.FloatDistribution(*domain.values, log=log)
            case unknown:
                raise ValueError(f"no distribution for {unknown!r}")
    return values, distributions


def _as_list(value: Any) -> Any:
    """Return a tuple as the list that it becomes in JSON, another value unchanged."""
    return list(value) if isinstance(value, tuple) else value
