"""Search spaces: a YAML file, the values drawn from it, and the full configuration of a trial.

    base: {train: {iterations: 600}}            # differs from Config's defaults, the same for every trial
    space:
      optimizer.name: {choice: [sgd, ranger]}
      optimizer.lr:                             # a list of branches: the first whose `when` holds
        - {when: {optimizer.name: sgd}, loguniform: [1e-2, 0.3]}
        - {when: {optimizer.name: ranger}, loguniform: [1e-4, 1e-2]}
      model.stam_depth: {grid: [1, 3]}          # every value, for each of the samples
      loss.gaze_weight: 0.1                     # fixed
    samples: 8                                  # configurations; times the grid's points
    repeats: 3                                  # trials of each, over seeds
    searcher: random                            # or tpe
    scheduler: {name: asha, grace: 100, reduction: 3}

Forms: choice, grid, uniform, loguniform, randint (upper end left out), value (in a branch), or a plain value.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.config_io import build_config, load_config, override, override_config
from tune_ego.space_schema import Domain

_CHECKED_COMBINATIONS = 2000
_DRAW_KEY = 0x5EA2C4
"""Spawn key of the draws: it separates them from the random numbers of runs, which use the same seeds."""


class Branch(NamedTuple):
    """A domain, and the conditions under which a key has it."""

    when: dict[str, tuple[Any, ...]]
    """Key -> the values that it may have. All conditions must hold; without any, the branch always holds."""
    domain: Domain


class SchedulerSettings(NamedTuple):
    """Rule by which trials are stopped before their end."""

    name: str
    """asha, median (stops trials whose best is under the median of the others' running means) or fifo (stops none)."""
    grace: int
    """Iterations before a trial may be stopped."""
    reduction: int
    """ASHA keeps one in so many trials at each rung."""
    least_trials: int
    """The fewest other trials that the median rule compares with."""
    keep_stopped: bool
    """Whether stopped trials keep their checkpoints."""

    def rungs(self, budget: int) -> list[int]:
        """Return the iterations at which ASHA decides, ascending; none for other schedulers."""
        match self.name:
            case "asha":
                iterations, rung = [], self.grace
                while rung < budget:
                    iterations.append(rung)
                    rung *= self.reduction
                return iterations
            case "median" | "fifo":
                return []
            case unknown:
                raise ValueError(f"no rungs for scheduler {unknown!r}")


@dataclass(frozen=True)
class SearchSpace:
    """A validated search space."""

    source: str
    text: str
    base: dict[str, Any]
    branches: dict[str, list[Branch]]
    samples: int
    repeats: int
    """Trials of each configuration, each with its own seed."""
    searcher: str
    """`random` (with grids), or `tpe`: Optuna's tree-structured Parzen estimator, fitted to the trials that ended."""
    scheduler: SchedulerSettings

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """Return name -> value of configuration `number` of a random search, independent of other configurations."""
        from ray import tune  # late: seconds to import

        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_DRAW_KEY, number)))
        grids = [(name, domain) for name, domain in self.sampled() if domain.form == "grid"]
        points, point = {}, number % self.grid_points
        for name, domain in reversed(grids):  # the last varies fastest
            point, place = divmod(point, len(domain.values))
            points[name] = domain.values[place]

        def choose_value(name: str, domain: Domain) -> Any:
            if domain.form == "grid":
                return points[name]
            if domain.form == "choice":
                return domain.values[random.integers(len(domain.values))]
            value = getattr(tune, domain.form)(*domain.values).sample(random_state=random)
            return value.item() if isinstance(value, np.generic) else value

        return self.choose(choose_value)

    def choose(self, choose_value: Callable[[str, Domain], Any]) -> dict[str, Any]:
        """Return name -> value for the branches that hold; `choose_value(name, domain)` chooses each value."""
        sampled: dict[str, Any] = {}

        def note(name: str, domain: Domain) -> Any:
            sampled[name] = choose_value(name, domain)
            return sampled[name]

        self._resolve_branches(note)
        return sampled

    def config(self, sampled: dict[str, Any], repeat: int = 0) -> Config:
        """Return the full configuration of a draw; repeat `n` has the seed plus `n`."""
        tree = override(self.base, self.overrides(sampled))
        return build_config({**tree, "seed": tree.get("seed", 0) + repeat}, self.source)

    def resumed_config(self, uri: str, sampled: dict[str, Any], repeat: int = 0) -> Config:
        """Return the configuration of a trial that has started: that of its `config.yaml`, at `uri`.

        The file holds every key, so a later version of the package with other defaults resumes the same trial. Only the
        number of iterations is the search's, which may have been raised. Without the file this is `config`.
        Raises `UserError` for keys that this version does not have.
        """
        drawn = self.config(sampled, repeat)
        if not (uri and storage.exists(uri)):
            return drawn
        return override_config(load_config(uri), {"train.iterations": drawn.train.iterations}, uri)

    def overrides(self, sampled: dict[str, Any]) -> dict[str, Any]:
        """Return dotted key -> value of a draw."""
        return self._resolve_branches(lambda name, _: sampled[name])[0]

    def branch_of(self, sampled: dict[str, Any]) -> dict[str, int]:
        """Return dotted key -> index of the branch that a draw takes."""
        return self._resolve_branches(lambda name, _: sampled[name])[1]

    def _resolve_branches(self, choose_value: Callable[[str, Domain], Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """Return (dotted key -> value, dotted key -> index of its branch); `choose_value` gets the names."""
        chosen: dict[str, Any] = {}
        indices: dict[str, int] = {}
        for key, branches in self.branches.items():
            for index, branch in enumerate(branches):
                if all(as_tuple(self._value(name, chosen)) in allowed for name, allowed in branch.when.items()):
                    domain = branch.domain
                    value = domain.values[0] if domain.form == "value" else choose_value(f"{key}@{index}", domain)
                    chosen[key] = as_tuple(value)
                    indices[key] = index
                    break
        return chosen, indices

    def draws(self) -> Iterator[dict[str, Any]]:
        """Yield draws that cover the space: all combinations, or 2,000 of them, evenly spread.

        A range contributes its two ends, and the values that conditions distinguish.
        """
        options = {name: self._distinct_values(name, domain) for name, domain in self.sampled()}
        if math.prod(map(len, options.values())) <= _CHECKED_COMBINATIONS:
            yield from _combinations(options)
            return
        random = np.random.default_rng(0)
        orders = [random.permutation(_CHECKED_COMBINATIONS) for _ in options]
        for n in range(_CHECKED_COMBINATIONS):
            yield {name: values[order[n] % len(values)] for (name, values), order in zip(options.items(), orders)}

    def conditional_draws(self) -> Iterator[dict[str, Any]]:
        """Yield a draw for each combination of the values on which conditions depend; other values are the same."""
        yield from _combinations(self._conditional_options)

    @property
    def conditional_combinations(self) -> int:
        """Number of `conditional_draws`."""
        return math.prod(map(len, self._conditional_options.values()))

    @property
    def _conditional_options(self) -> dict[str, list[Any]]:
        options = {name: self._distinct_values(name, domain) for name, domain in self.sampled()}
        conditions = self._named_in_conditions
        return {name: values if _key(name) in conditions else values[:1] for name, values in options.items()}

    def may_have(self, key: str, value: Any) -> bool:
        """Return whether some branch of a key, or the base, may give it a value."""
        if key not in self.branches:
            return bool(as_tuple(self._value(key, {})) == value)
        for branch in self.branches[key]:
            low, high = branch.domain.values[0], branch.domain.values[-1]
            match branch.domain.form:
                case "uniform" | "loguniform" | "randint":
                    if isinstance(value, (int, float)) and low <= value <= high:
                        return True
                case _:
                    if value in map(as_tuple, branch.domain.values):
                        return True
        return False

    @cached_property
    def _named_in_conditions(self) -> dict[str, list[Any]]:
        """Key -> the values of it that conditions name."""
        named: dict[str, list[Any]] = {}
        for branch in itertools.chain.from_iterable(self.branches.values()):
            for key, values in branch.when.items():
                named.setdefault(key, []).extend(values)
        return named

    def _distinct_values(self, name: str, domain: Domain) -> list[Any]:
        """Return the values of a domain that may lead to different branches: all, or for a range some of each kind."""
        named = self._named_in_conditions.get(_key(name))
        match domain.form:
            case "choice" | "grid":
                return list(domain.values)
            case "randint":
                low, high = domain.values
                values = {low, high - 1}
                if named is not None:
                    inside = {value for value in named if isinstance(value, int) and low <= value < high}
                    unnamed = (value for value in range(low, high) if value not in inside)
                    values |= inside | set(itertools.islice(unnamed, 1))
                return sorted(values)
            case "uniform" | "loguniform":
                low, high = domain.values
                return [low, high] if named is None else [low, (low + high) / 2, high]
            case unknown:
                raise ValueError(f"no values of the form {unknown!r}")

    def _value(self, key: str, chosen: dict[str, Any]) -> Any:
        if key in chosen:
            return chosen[key]
        name_key = f"{key.rpartition('.')[0]}.name"
        node: Any = self._defaults(name_key, chosen.get(name_key, self._name_in_base(name_key)))
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def _name_in_base(self, key: str) -> Any:
        part = key.rpartition(".")[0]
        return self._base_config.get(part, {}).get("name") if part else None

    @cached_property
    def _base_config(self) -> dict[str, Any]:
        return build_config(self.base, self.source).model_dump()

    def _defaults(self, name_key: str, name: Any) -> dict[str, Any]:
        """Return the values of the base; where `name_key`, e.g. `optimizer.name`, has another name, its defaults."""
        if name == self._name_in_base(name_key):
            return self._base_config
        if (name_key, name) not in self._other_defaults:
            changed = override(self.base, {name_key: name})
            self._other_defaults[name_key, name] = build_config(changed, self.source).model_dump()
        return self._other_defaults[name_key, name]

    @cached_property
    def _other_defaults(self) -> dict[tuple[str, Any], dict[str, Any]]:
        return {}

    def sampled(self) -> Iterator[tuple[str, Domain]]:
        """Yield the names under which values are drawn, `key@branch`, with their domains."""
        for key, branches in self.branches.items():
            for index, branch in enumerate(branches):
                if branch.domain.form != "value":
                    yield f"{key}@{index}", branch.domain

    @property
    def searched_keys(self) -> list[str]:
        """Keys whose values differ between trials."""
        return [
            key for key, branches in self.branches.items() if len(branches) > 1 or branches[0].domain.form != "value"
        ]

    @property
    def grid_points(self) -> int:
        return math.prod(len(domain.values) for _, domain in self.sampled() if domain.form == "grid")

    @property
    def configurations(self) -> int:
        return self.samples * self.grid_points

    @property
    def trials(self) -> int:
        return self.configurations * self.repeats


def as_tuple(value: Any) -> Any:
    """Return a list as a tuple, the form in which configurations hold lists; any other value as it is."""
    return tuple(value) if isinstance(value, list) else value


def _key(name: str) -> str:
    """Return the key of a name `key@branch`."""
    return name.rpartition("@")[0]


def _combinations(options: dict[str, list[Any]]) -> Iterator[dict[str, Any]]:
    """Yield every combination of the options."""
    return (dict(zip(options, values)) for values in itertools.product(*options.values()))
