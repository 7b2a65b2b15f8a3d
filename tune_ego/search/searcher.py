"""Choice of the next configuration: a Ray Tune searcher over the draws of a search space.

What a search has drawn is in its `trials.json`; what is drawn next follows from that, the seed and a number. So a
resumed search draws what an uninterrupted one would have drawn, given the same results.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from ray.tune.search import Searcher

from tune_ego.errors import UserError
from tune_ego.results import experiment
from tune_ego.results.experiment import Configuration, Trial, TrialRecords
from tune_ego.search_space import SearchSpace
from tune_ego.space_schema import Domain

if TYPE_CHECKING:
    import optuna


class TrialSource(Searcher):  # type: ignore[misc]
    """Gives Tune the trials of an experiment that have not ended, and draws new ones until all are there.

    What Tune gets as a trial's configuration: `{"trial": id, "repeat": 0, "sampled": {name: value}}`.
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
        new = [n for n in range(space.configurations) if any(name not in records for name in self._names(n))]
        self.left = len(unfinished) + sum(name not in records for n in new for name in self._names(n))
        """Trials that have not ended, drawn or not."""
        if space.searcher == "random":  # all of them now: whoever looks sees what will come
            for number in new:
                unfinished += self._add(number)
            new = []
        self._waiting = itertools.chain(unfinished, itertools.chain.from_iterable(map(self._add, new)))
        self._running: set[str] = set()
        """Tune's names."""

    def _names(self, number: int) -> list[str]:
        repeats = self._space.repeats
        return [experiment.trial_name(number, repeat, repeats) for repeat in range(repeats)]

    def _add(self, number: int) -> list[dict[str, Any]]:
        """Draw configuration `number`, and note its trials that are not on record yet."""
        if self._space.searcher == "tpe":
            sampled = draw_by_tpe(self._space, self._seed, number, experiment.read_experiment(self._root).trials)
        else:
            sampled = self._space.draw(self._seed, number)
        draws = [
            {"trial": name, "repeat": repeat, "sampled": sampled}
            for repeat, name in enumerate(self._names(number))
            if name not in self._records
        ]
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
        """Tune pickles it, and nobody reads that back: everything is in the experiment's files."""
        return Searcher, ()

    def save(self, checkpoint_path: str) -> None:
        """Nothing, as above."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as above."""


def import_optuna() -> Any:
    try:
        import optuna
    except ImportError as error:
        raise UserError("searcher: tpe needs Optuna: pip install 'tune_ego[optuna]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


def draw_by_tpe(space: SearchSpace, seed: int, number: int, trials: list[Trial]) -> dict[str, Any]:
    """Configuration `number`, drawn by Optuna's TPE that knows the trials of the configurations before it.

    A configuration is worth the mean of its repeats' best accuracies; a stopped one counts as pruned at the iteration
    that it reached, a diverged one as the worst; running ones are taken for bad, so that others go elsewhere.
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
    asked = study.ask()

    def pick(name: str, domain: Domain) -> Any:
        if domain.form == "choice":
            return domain.values[asked.suggest_categorical(name, range(len(domain.values)))]
        if domain.form == "randint":
            return asked.suggest_int(name, int(domain.values[0]), int(domain.values[1]) - 1)
        return asked.suggest_float(name, *domain.values, log=domain.form == "loguniform")

    return space.choose(pick)


def _optuna_trial(space: SearchSpace, configuration: Configuration) -> optuna.trial.FrozenTrial:
    """Return a configuration and its results as a trial of Optuna."""
    optuna = import_optuna()
    repeats = configuration.trials
    values, distributions = parameters(space, repeats[0].sampled)
    states = optuna.trial.TrialState
    known = {"params": values, "distributions": distributions}
    if len(repeats) < space.repeats or not all(trial.ended for trial in repeats):
        return optuna.trial.create_trial(state=states.RUNNING, **known)
    if all(trial.state == "finished" for trial in repeats):
        return optuna.trial.create_trial(state=states.COMPLETE, value=configuration.accuracy, **known)
    reached = min(trial.iteration for trial in repeats)
    seen = {} if configuration.accuracy is None else {reached: configuration.accuracy}
    return optuna.trial.create_trial(state=states.PRUNED, intermediate_values=seen, **known)


def parameters(space: SearchSpace, sampled: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(values, distributions) by name of a draw, as Optuna has them; a choice or grid by the places of its values."""
    optuna = import_optuna()
    domains, values, distributions = dict(space.sampled()), {}, {}
    for name, value in sampled.items():
        domain = domains[name]
        if domain.form in ("choice", "grid"):
            values[name] = [_plain(choice) for choice in domain.values].index(_plain(value))
            distributions[name] = optuna.distributions.CategoricalDistribution(range(len(domain.values)))
        elif domain.form == "randint":
            values[name], ends = value, (int(domain.values[0]), int(domain.values[1]) - 1)
            distributions[name] = optuna.distributions.IntDistribution(*ends)
        else:
            values[name], log = value, domain.form == "loguniform"
            distributions[name] = optuna.distributions.FloatDistribution(*domain.values, log=log)
    return values, distributions


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
