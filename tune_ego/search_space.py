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
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tune_ego import storage
from tune_ego.config import Config, build_config, check_key, load_config, override, override_config
from tune_ego.errors import UserError
from tune_ego.space_schema import Domain, Entry, SchedulerEntry, SpaceFile, validated
from tune_ego.yaml_files import parse_yaml

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
        from ray import tune

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
                if all(_as_tuple(self._value(name, chosen)) in allowed for name, allowed in branch.when.items()):
                    domain = branch.domain
                    value = domain.values[0] if domain.form == "value" else choose_value(f"{key}@{index}", domain)
                    chosen[key] = _as_tuple(value)
                    indices[key] = index
                    break
        return chosen, indices

    def draws(self) -> Iterator[dict[str, Any]]:
        """Yield draws that cover the space: all combinations, or 2,000 of them, evenly spread.

        A range contributes its two ends.
        """
        sampled = list(self.sampled())
        options = [(d.values[0], d.values[1] - 1) if d.form == "randint" else d.values for _, d in sampled]
        names = [name for name, _ in sampled]
        if math.prod(map(len, options)) <= _CHECKED_COMBINATIONS:
            yield from (dict(zip(names, draw)) for draw in itertools.product(*options))
            return
        random = np.random.default_rng(0)
        orders = [random.permutation(_CHECKED_COMBINATIONS) for _ in options]
        for n in range(_CHECKED_COMBINATIONS):
            yield {name: values[order[n] % len(values)] for name, values, order in zip(names, options, orders)}

    def _value(self, key: str, chosen: dict[str, Any]) -> Any:
        if key in chosen:
            return chosen[key]
        node: Any = self._defaults
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        return build_config(self.base, self.source).model_dump()

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


def find_space(name: str) -> str:
    """Return the path of a search space: a file, or the name of a shipped one (with or without `.yaml`)."""
    if storage.is_file(name):
        return name
    package = Path(__file__).parent
    folders = [package / "search_spaces", package.parent / "search_spaces"]  # in a wheel; in a checkout
    shipped = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    path = shipped.get(name.removesuffix(".yaml"))
    if path is None:
        raise UserError(f"{name}: no such file, nor a shipped search space ({', '.join(sorted(shipped))})")
    return str(path)


def load_space(name: str, changes: dict[str, Any] | None = None) -> SearchSpace:
    """Read and check a search space; `changes` (dotted key -> value) replace values of its base.

    Raises `UserError` that names the file, the key and what is allowed.
    """
    path = find_space(name)
    try:
        text = storage.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return parse_space(text, path, changes)


def parse_space(text: str, source: str, changes: dict[str, Any] | None = None, *, check: bool = True) -> SearchSpace:
    """Read a search space from YAML text; `source` is its name in errors, `changes` as in `load_space`.

    With `check` every configuration that the space can give is built, to see that it is valid.
    """
    content = parse_yaml(text, source)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{source}: expected the keys {', '.join(SpaceFile.model_fields)}")
    empty = [key for key in ("base", "space", "scheduler") if key in content and content[key] is None]
    file = validated(SpaceFile, {key: value for key, value in content.items() if key not in empty}, source)
    base = _changed_base(file, source, changes or {})
    branches = _read_branches(file, source)
    config = build_config(base, f"{source}: base")
    if not isinstance(config.compute.workers, int):
        raise UserError(f"{source}: compute.workers: the trials of a search have a fixed number of workers")
    space = SearchSpace(
        source=source,
        text=text,
        base=base,
        branches=branches,
        samples=file.samples,
        repeats=file.repeats,
        searcher=file.searcher,
        scheduler=_scheduler_settings(file.scheduler, source, config),
    )
    if check:
        _check_configurations(space)
    return space


def _changed_base(file: SpaceFile, source: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Return the base with the changes of the command line. Raises `UserError` for a change of a searched key."""
    for key in changes:
        check_key(key, "--set")
        if key in file.space:
            raise UserError(f"--set {key}: {source} searches this key; change it there")
    return override(file.base, changes)


def _read_branches(file: SpaceFile, source: str) -> dict[str, list[Branch]]:
    branches: dict[str, list[Branch]] = {}
    for key, entry in file.space.items():
        check_key(key, source)
        if key in ("train.iterations", "data.decode") or key.startswith("compute."):
            raise UserError(f"{source}: {key} is the same for all trials of a search; set it in base")
        if key == "seed" and file.repeats > 1:
            raise UserError(f"{source}: space.seed: repeats are over seeds; leave one of the two out")
        not_yet_drawn = [name for name in file.space if name not in branches]
        branches[key] = _branches(entry, f"{source}: space.{key}", not_yet_drawn)
        if file.searcher == "tpe" and any(branch.domain.form == "grid" for branch in branches[key]):
            raise UserError(f"{source}: space.{key}: a grid has no place in a search by tpe; use choice")
    return branches


def _scheduler_settings(entry: SchedulerEntry, source: str, config: Config) -> SchedulerSettings:
    """Return the settings with the default of `grace` filled in."""
    grace = config.train.validate_every if entry.grace is None else entry.grace
    if entry.name == "asha" and grace > config.train.iterations:
        raise UserError(f"{source}: scheduler.grace {grace} is over base.train.iterations {config.train.iterations}")
    return SchedulerSettings(entry.name, grace, entry.reduction, entry.least_trials, entry.keep_stopped)


def _branches(entry: Any, place: str, not_yet_drawn: list[str]) -> list[Branch]:
    """Return the branches of one key; `not_yet_drawn` are keys whose value a condition cannot depend on."""
    if not (isinstance(entry, list) and any(isinstance(item, dict) for item in entry)):
        if not isinstance(entry, dict):
            entry = {"value": entry}
        elif "when" in entry or "value" in entry:
            raise UserError(f"{place}: 'when' and 'value' belong into a list of branches")
        return [Branch({}, validated(Entry, entry, place).domain)]
    branches = []
    for number, item in enumerate(entry, start=1):
        branch = validated(Entry, item, f"{place}: branch {number}")
        for name in branch.when:
            check_key(name, place)
            if name in not_yet_drawn:
                raise UserError(f"{place}: 'when' needs {name}, which must stand above it in the space")
        if branch.when and branch.domain.form == "grid":
            raise UserError(
                f"{place}: branch {number}: a grid has no 'when' (it would repeat other trials); use choice"
            )
        when = {
            name: tuple(map(_as_tuple, allowed)) if isinstance(allowed, list) else (allowed,)
            for name, allowed in branch.when.items()
        }
        branches.append(Branch(when, branch.domain))
    return branches


def _as_tuple(value: Any) -> Any:
    """Return a list as a tuple, the form in which configurations hold lists; any other value as it is."""
    return tuple(value) if isinstance(value, list) else value


def _check_configurations(space: SearchSpace) -> None:
    """Build the configurations of the space.

    Raises `UserError` for a branch that never holds, whose condition is mistyped, and for a key without a branch for
    some of the drawn values.
    """
    reached: set[tuple[str, int]] = set()
    for sampled in space.draws():
        branch_indices = space.branch_of(sampled)
        reached |= branch_indices.items()
        config = space.config(sampled)
        for key in space.branches.keys() - branch_indices.keys():
            _check_not_applicable(key, config, space)
    for key, branches in space.branches.items():
        for index, branch in enumerate(branches):
            if branch.when and (key, index) not in reached:
                raise UserError(f"{space.source}: space.{key}: branch {index + 1} is never taken (when: {branch.when})")


def _check_not_applicable(key: str, config: Config, space: SearchSpace) -> None:
    """Raise `UserError` if no branch of a key holds in a configuration that has the key: its default would be used."""
    part, _, leaf = key.rpartition(".")
    node = getattr(config, part) if part else config
    if leaf in type(node).model_fields:
        conditions = {name for branch in space.branches[key] for name in branch.when}
        drawn = ", ".join(f"{name}: {_value_of(config, name)}" for name in sorted(conditions))
        raise UserError(
            f"{space.source}: space.{key}: no branch for {drawn}; add a branch, or one without 'when' at the end, "
            f"for example {{value: {getattr(node, leaf)}}}"
        )


def _value_of(config: Config, key: str) -> Any:
    part, _, leaf = key.rpartition(".")
    return getattr(getattr(config, part) if part else config, leaf, None)
