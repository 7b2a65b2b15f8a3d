"""Read and check search spaces (`tune_ego.search_space`)."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

from tune_ego import storage
from tune_ego.config import Config
from tune_ego.config_io import build_config, check_key, override
from tune_ego.errors import UserError
from tune_ego.search_space import Branch, SchedulerSettings, SearchSpace, as_tuple
from tune_ego.space_schema import Entry, SchedulerEntry, SpaceFile, validated
from tune_ego.yaml_files import parse_yaml

_COUNTS = ("samples", "repeats")
"""Keys beside the base that `changes` may hold."""
_CHECKED_CONDITIONS = 20_000
"""Combinations of values that conditions depend on, at most, that are checked before a search starts."""


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
    """Read and check a search space.

    `changes` (dotted key -> value) replace values of its base, and `samples` and `repeats`. Raises `UserError` that
    names the file, the key and what is allowed.
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
    changes = changes or {}
    content = {**content, **{key: changes[key] for key in _COUNTS if key in changes}}
    empty = [key for key in ("base", "space", "scheduler") if key in content and content[key] is None]
    file = validated(SpaceFile, {key: value for key, value in content.items() if key not in empty}, source)
    base = _changed_base(file, source, {key: value for key, value in changes.items() if key not in _COUNTS})
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
        if key == "loss.gaze_sigma":
            _check_unit(branches[key], f"{source}: space.{key}")
        if file.searcher == "tpe" and any(branch.domain.form == "grid" for branch in branches[key]):
            raise UserError(f"{source}: space.{key}: a grid has no place in a search by tpe; use choice")
    return branches


def _check_unit(branches: list[Branch], place: str) -> None:
    """Raise `UserError` where values are fractions and, from 1 on, cells (`config_io.build_config`)."""
    values = [value for branch in branches for value in branch.domain.values if isinstance(value, (int, float))]
    if values and min(values) < 1 <= max(values):
        raise UserError(
            f"{place}: values below 1 are fractions of the map's side, values from 1 on cells: use one unit"
        )


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
            name: tuple(map(as_tuple, allowed)) if isinstance(allowed, list) else (allowed,)
            for name, allowed in branch.when.items()
        }
        branches.append(Branch(when, branch.domain))
    return branches


def _check_configurations(space: SearchSpace) -> None:
    """Build the configurations of the space.

    Raises `UserError` for a branch that never holds, whose condition is mistyped, and for a key without a branch for
    some of the drawn values.
    """
    reached: set[tuple[str, int]] = set()
    for sampled in space.draws():
        reached |= space.branch_of(sampled).items()
        space.config(sampled)
        check_branches(space, sampled)
    for sampled in itertools.islice(space.conditional_draws(), _CHECKED_CONDITIONS):
        reached |= space.branch_of(sampled).items()
        check_branches(space, sampled)
    all_checked = space.conditional_combinations <= _CHECKED_CONDITIONS
    for key, branches in space.branches.items():
        for index, branch in enumerate(branches):
            if branch.when and (key, index) not in reached and (all_checked or not _may_hold(space, branch)):
                raise UserError(f"{space.source}: space.{key}: branch {index + 1} is never taken (when: {branch.when})")


def _may_hold(space: SearchSpace, branch: Branch) -> bool:
    """Return whether each condition of a branch names a value that its key may have."""
    return all(any(space.may_have(key, value) for value in values) for key, values in branch.when.items())


def check_branches(space: SearchSpace, sampled: dict[str, Any]) -> None:
    """Raise `UserError` if a key of a draw's configuration has no branch that holds: its default would be used."""
    without_branch = space.branches.keys() - space.branch_of(sampled).keys()
    if without_branch:
        config = space.config(sampled)
        for key in without_branch:
            _check_not_applicable(key, config, space)


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
