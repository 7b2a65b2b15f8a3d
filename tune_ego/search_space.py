"""Search spaces: YAML -> validated -> drawn values -> a full configuration.

    base: {train: {iterations: 600}}            # differs from Config's defaults, the same for every trial
    space:
      optimizer.name: {choice: [sgd, ranger]}
      optimizer.lr:                             # a list: the first branch whose `when` holds
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
from tune_ego.config import Config, build_config, check_key, override
from tune_ego.errors import UserError
from tune_ego.yaml_files import parse_yaml

FORMS = ("choice", "grid", "uniform", "loguniform", "randint")
_CHECKED_COMBINATIONS = 2000
_TOP_LEVEL = ("base", "space", "samples", "repeats", "searcher", "scheduler")
_SEARCHERS = ("random", "tpe")
_ORDER = 0x5EA2C4
"""Apart from the random streams of the runs, which have the same seeds."""


class Domain(NamedTuple):
    """Where a key's value comes from."""

    form: str
    """One of `FORMS`, or `value`."""
    values: tuple[Any, ...]
    """The values of a choice, grid or value; the two ends of a range."""


class Branch(NamedTuple):
    when: dict[str, tuple[Any, ...]]
    """Key -> values it may have; all must hold. Empty: always."""
    domain: Domain


_SCHEDULERS = {
    "asha": ("grace", "reduction", "keep_stopped"),
    "median": ("grace", "least_trials", "keep_stopped"),
    "fifo": (),
}
"""Name -> its settings."""


class SchedulerSettings(NamedTuple):
    """Which trials are stopped before their end."""

    name: str
    """asha, median (those whose best is under the median of the others' running means) or fifo (none)."""
    grace: int
    """Iterations before a trial may be stopped."""
    reduction: int
    """ASHA keeps one in so many trials at each rung."""
    least_trials: int
    """How many others the median rule compares with at least."""
    keep_stopped: bool
    """Whether stopped trials keep their checkpoints."""


@dataclass(frozen=True)
class SearchSpace:
    """A validated search space."""

    source: str
    text: str
    base: dict[str, Any]
    branches: dict[str, list[Branch]]
    samples: int
    repeats: int
    """Trials of each configuration, over as many seeds."""
    searcher: str
    """`random` (and grid), or `tpe`: Optuna's tree-structured Parzen estimator, which learns from ended trials."""
    scheduler: SchedulerSettings

    def draw(self, seed: int, number: int) -> dict[str, Any]:
        """Name -> value of configuration `number` of the random search with this seed: it needs no other's."""
        from ray import tune

        random = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(_ORDER, number)))
        grids = [(name, domain) for name, domain in self.sampled() if domain.form == "grid"]
        points, point = {}, number % self.grid_points
        for name, domain in reversed(grids):  # the last varies fastest
            point, place = divmod(point, len(domain.values))
            points[name] = domain.values[place]

        def pick(name: str, domain: Domain) -> Any:
            if domain.form == "grid":
                return points[name]
            if domain.form == "choice":
                return domain.values[random.integers(len(domain.values))]
            value = getattr(tune, domain.form)(*domain.values).sample(random_state=random)
            return value.item() if isinstance(value, np.generic) else value

        return self.choose(pick)

    def choose(self, pick: Callable[[str, Domain], Any]) -> dict[str, Any]:
        """Name -> value of what `pick` answers, asked for the branches alone that are taken."""
        sampled: dict[str, Any] = {}

        def note(name: str, domain: Domain) -> Any:
            sampled[name] = pick(name, domain)
            return sampled[name]

        self._walk(note)
        return sampled

    def config(self, sampled: dict[str, Any], repeat: int = 0) -> Config:
        """The full configuration of one draw; the repeats differ in their seeds."""
        tree = override(self.base, self.overrides(sampled))
        return build_config({**tree, "seed": tree.get("seed", 0) + repeat}, self.source)

    def overrides(self, sampled: dict[str, Any]) -> dict[str, Any]:
        """Dotted key -> value of one draw."""
        return self._walk(lambda name, _: sampled[name])[0]

    def branch_of(self, sampled: dict[str, Any]) -> dict[str, int]:
        """Dotted key -> the branch that one draw takes."""
        return self._walk(lambda name, _: sampled[name])[1]

    def _walk(self, pick: Callable[[str, Domain], Any]) -> tuple[dict[str, Any], dict[str, int]]:
        """(dotted key -> value, dotted key -> branch taken) of a draw whose values `pick` gives by name."""
        chosen: dict[str, Any] = {}
        taken: dict[str, int] = {}
        for key, branches in self.branches.items():
            for index, branch in enumerate(branches):
                if all(self._value(name, chosen) in allowed for name, allowed in branch.when.items()):
                    domain = branch.domain
                    value = domain.values[0] if domain.form == "value" else pick(f"{key}@{index}", domain)
                    chosen[key] = tuple(value) if isinstance(value, list) else value
                    taken[key] = index
                    break
        return chosen, taken

    def draws(self) -> Iterator[dict[str, Any]]:
        """Draws that cover the space: all combinations, or 2,000 spread over them; a range gives its two ends."""
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
        """The names under which values are drawn, one for each branch, with their domains."""
        for key, branches in self.branches.items():
            for index, branch in enumerate(branches):
                if branch.domain.form != "value":
                    yield f"{key}@{index}", branch.domain

    @property
    def searched_keys(self) -> list[str]:
        """Keys whose value differs between trials."""
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
    """The path of a search space: as given, or one of the shipped ones by its name (with or without .yaml)."""
    if storage.is_file(name):
        return name
    package = Path(__file__).parent
    folders = [package / "search_spaces", package.parent / "search_spaces"]  # in a wheel; in a checkout
    shipped = {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}
    found = shipped.get(name.removesuffix(".yaml"))
    if found is None:
        raise UserError(f"{name}: no such file, nor a shipped search space ({', '.join(sorted(shipped))})")
    return str(found)


def load_space(name: str, changes: dict[str, Any] | None = None) -> SearchSpace:
    """Read and check a search space; `changes` (dotted keys) replace what its base says.

    Raises `UserError` naming file, key and what is allowed.
    """
    path = find_space(name)
    try:
        text = storage.read_text(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return parse_space(text, path, changes)


def parse_space(text: str, source: str, changes: dict[str, Any] | None = None, *, check: bool = True) -> SearchSpace:
    """With `check` every configuration that it can give is built; a space that was checked needs that no more."""
    content = parse_yaml(text, source)
    if not isinstance(content, dict) or not content:
        raise UserError(f"{source}: expected the keys {', '.join(_TOP_LEVEL)}")
    for key in content:
        if key not in _TOP_LEVEL:
            raise UserError(f"{source}: unknown key {key!r}; allowed: {', '.join(_TOP_LEVEL)}")
    base = _mapping(content.get("base") or {}, source, "base")
    for key in changes or {}:
        check_key(key, "--set")
    base = override(base, changes or {})
    entries = _mapping(content.get("space") or {}, source, "space")
    fixed_twice = [key for key in changes or {} if key in entries]
    if fixed_twice:
        raise UserError(f"--set {fixed_twice[0]}: {source} searches this key; change it there")
    branches: dict[str, list[Branch]] = {}
    for key, entry in entries.items():
        check_key(key, source)
        if key in ("train.iterations", "data.decode") or key.startswith("compute."):
            raise UserError(f"{source}: {key} is the same for all trials of a search; set it in base")
        later = [name for name in entries if name not in branches]
        branches[key] = _branches(entry, f"{source}: space.{key}", later)
    config = build_config(base, f"{source}: base")
    if not isinstance(config.compute.workers, int):
        raise UserError(f"{source}: compute.workers: the trials of a search have a fixed number of workers")
    repeats = _count(content.get("repeats", 1), 1, f"{source}: repeats")
    if repeats > 1 and "seed" in branches:
        raise UserError(f"{source}: space.seed: repeats are over seeds; leave one of the two out")
    searcher = content.get("searcher", "random")
    if searcher not in _SEARCHERS:
        raise UserError(f"{source}: searcher: expected one of {', '.join(_SEARCHERS)}, found {searcher!r}")
    for key, found in branches.items():
        if searcher == "tpe" and any(branch.domain.form == "grid" for branch in found):
            raise UserError(f"{source}: space.{key}: a grid has no place in a search by tpe; use choice")
    space = SearchSpace(
        source=source,
        text=text,
        base=base,
        branches=branches,
        samples=_count(content.get("samples", 1), 1, f"{source}: samples"),
        repeats=repeats,
        searcher=searcher,
        scheduler=_scheduler(content.get("scheduler") or {}, source, config),
    )
    if check:
        _check_configurations(space)
    return space


def _scheduler(value: Any, source: str, config: Config) -> SchedulerSettings:
    settings = _mapping(value, source, "scheduler")
    name = settings.get("name", "asha")
    if name not in _SCHEDULERS:
        raise UserError(f"{source}: scheduler.name: expected one of {', '.join(_SCHEDULERS)}, found {name!r}")
    for key in settings:
        if key not in ("name", *_SCHEDULERS[name]):
            allowed = ", ".join(_SCHEDULERS[name]) or "none"
            raise UserError(f"{source}: unknown key 'scheduler.{key}'; the settings of {name}: {allowed}")
    place = f"{source}: scheduler."
    grace = _count(settings.get("grace", config.train.validate_every), 1, f"{place}grace")
    if name == "asha" and grace > config.train.iterations:
        raise UserError(f"{place}grace {grace} is over base.train.iterations {config.train.iterations}")
    return SchedulerSettings(
        name,
        grace,
        _count(settings.get("reduction", 3), 2, f"{place}reduction"),
        _count(settings.get("least_trials", 3), 1, f"{place}least_trials"),
        _flag(settings.get("keep_stopped", False), f"{place}keep_stopped"),
    )


def _mapping(value: Any, source: str, key: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source}: {key}: expected keys and values, found {value!r}")
    return value


def _count(value: Any, least: int, place: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise UserError(f"{place}: expected a whole number of at least {least}, found {value!r}")
    return value


def _flag(value: Any, place: str) -> bool:
    if not isinstance(value, bool):
        raise UserError(f"{place}: expected true or false, found {value!r}")
    return value


def _branches(entry: Any, place: str, later: list[str]) -> list[Branch]:
    if not (isinstance(entry, list) and any(isinstance(item, dict) for item in entry)):
        return [Branch({}, _domain(entry, place))]
    branches = []
    for number, item in enumerate(entry, start=1):
        if not isinstance(item, dict) or len({*item} - {"when"}) != 1:
            raise UserError(f"{place}: branch {number}: expected 'when' and one of {', '.join((*FORMS, 'value'))}")
        when = {}
        for name, allowed in _mapping(item.get("when", {}), place, "when").items():
            check_key(name, place)
            if name in later:
                raise UserError(f"{place}: 'when' needs {name}, which must stand above it in the space")
            when[name] = tuple(allowed) if isinstance(allowed, list) else (allowed,)
        form, value = next((form, value) for form, value in item.items() if form != "when")
        domain = Domain("value", (_plain(value, place),)) if form == "value" else _domain({form: value}, place)
        if when and domain.form == "grid":
            raise UserError(
                f"{place}: branch {number}: a grid has no 'when' (it would repeat other trials); use choice"
            )
        branches.append(Branch(when, domain))
    return branches


def _domain(entry: Any, place: str) -> Domain:
    if not isinstance(entry, dict):
        return Domain("value", (_plain(entry, place),))
    if len(entry) != 1 or next(iter(entry)) not in FORMS:
        found = ", ".join(map(repr, entry))
        raise UserError(
            f"{place}: unknown form {found or 'without a name'}; allowed: {', '.join(FORMS)}, or a plain value"
        )
    form, values = next(iter(entry.items()))
    if not isinstance(values, list):
        raise UserError(f"{place}: {form}: expected a list, found {values!r}")
    if form in ("choice", "grid"):
        if not values:
            raise UserError(f"{place}: {form}: the list is empty")
        return Domain(form, tuple(_plain(value, place) for value in values))
    return Domain(form, _range(form, values, place))


def _range(form: str, values: list[Any], place: str) -> tuple[float, float]:
    kinds = (int,) if form == "randint" else (int, float)
    if len(values) != 2 or not all(isinstance(value, kinds) and not isinstance(value, bool) for value in values):
        raise UserError(
            f"{place}: {form}: expected [low, high] as {'whole ' if form == 'randint' else ''}numbers, found {values!r}"
        )
    low, high = values
    if max(abs(low), abs(high)) > 1e300:
        raise UserError(f"{place}: {form}: the range {values!r:.80} is not finite")
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise UserError(f"{place}: {form}: the range {values!r} is empty")
    if form == "loguniform" and low <= 0:
        raise UserError(f"{place}: loguniform: the lower end must be above 0, found {low!r}")
    return (low, high) if form == "randint" else (float(low), float(high))


def _plain(value: Any, place: str) -> Any:
    items = value if isinstance(value, list) else [value]
    if not all(isinstance(item, (str, int, float, bool)) for item in items):
        raise UserError(f"{place}: expected a number, a word, or a list of them, found {value!r}")
    return value


def _check_configurations(space: SearchSpace) -> None:
    """Build what the space can give; a branch that is never taken is a condition that was mistyped."""
    taken: set[tuple[str, int]] = set()
    for sampled in space.draws():
        taken |= space.branch_of(sampled).items()
        space.config(sampled)
    for key, branches in space.branches.items():
        for index, branch in enumerate(branches):
            if branch.when and (key, index) not in taken:
                raise UserError(f"{space.source}: space.{key}: branch {index + 1} is never taken (when: {branch.when})")
