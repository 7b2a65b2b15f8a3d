"""EGTEA's annotation files and folder layout.

    EGTEA/cropped_clips/<session>/<clip>.mp4          or cropped_clips/<clip>.mp4
    EGTEA/action_annotation/{train,test}_split{1,2,3}.txt, {action,verb,noun}_idx.txt
    EGTEA/gaze_data/gaze_data/<session>.txt           or gaze_data/<session>.txt

EGTEA is a path or URI. Ids are EGTEA's own here: they count from 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tune_ego import storage
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

SPLITS = (1, 2, 3)
FOLDS = 10
_CLIP_NAME = re.compile(
    r"(?P<subject>[A-Za-z]+\d+)-R(?P<run>\d+)-(?P<recipe>[^-]+)-(?P<start>\d+)-(?P<end>\d+)-F(?P<first>\d+)-F(?P<last>\d+)"
)


class ClipName(NamedTuple):
    """What a clip's name says."""

    name: str
    session: str
    """`<subject>-R<nn>-<Recipe>`, as the gaze files are named."""
    subject: str
    recipe: str
    start_ms: int
    end_ms: int
    first_frame: int
    """Session frames (24 fps); the clip spans [first_frame, last_frame)."""
    last_frame: int


def parse_clip_name(name: str) -> ClipName:
    """Take a clip's name apart; raises `UserError` where it is not of EGTEA's form."""
    match = _CLIP_NAME.fullmatch(name)
    if match is None:
        raise UserError(
            f"{name!r} is not a clip name of the form <subject>-R<nn>-<Recipe>-<start ms>-<end ms>-F<first>-F<last>"
        )
    session = f"{match['subject']}-R{match['run']}-{match['recipe']}"
    numbers = (int(match[key]) for key in ("start", "end", "first", "last"))
    return ClipName(name, session, match["subject"], match["recipe"], *numbers)


class SplitLine(NamedTuple):
    """One line of a split file; ids count from 1."""

    clip: str
    action: int
    verb: int
    nouns: tuple[int, ...]


def read_split(path: str | Path) -> list[SplitLine]:
    """The clips of one split file: `ClipName ActionID VerbID Noun1 [Noun2 [Noun3]]` a line."""
    lines = []
    for number, text in enumerate(_read_lines(path), start=1):
        fields = text.split()
        if not fields:
            continue
        if not 4 <= len(fields) <= 6 or not all(field.isdecimal() for field in fields[1:]):
            raise UserError(
                f"{path}:{number}: expected 'ClipName ActionID VerbID Noun1 [Noun2 [Noun3]]', found {text!r}"
            )
        try:
            parse_clip_name(fields[0])
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        action, verb, *nouns = map(int, fields[1:])
        lines.append(SplitLine(fields[0], action, verb, tuple(nouns)))
    return lines


def read_index(path: str | Path) -> list[str]:
    """Names of an `*_idx.txt` file in the order of their ids (1, 2, ...); names may hold spaces and slashes."""
    names: dict[int, str] = {}
    for number, text in enumerate(_read_lines(path), start=1):
        if text.strip():
            name, _, identifier = text.strip().rpartition(" ")
            if not name or not identifier.isdecimal() or int(identifier) in names:
                raise UserError(f"{path}:{number}: expected 'name id' with ids that differ, found {text!r}")
            names[int(identifier)] = name.strip()
    if sorted(names) != list(range(1, len(names) + 1)):
        raise UserError(f"{path}: ids are not 1 to {len(names)} without gaps")
    return [names[identifier] for identifier in sorted(names)]


def _read_lines(path: str | Path) -> list[str]:
    try:
        return storage.read_bytes(path).decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


class AnnotatedClip(NamedTuple):
    """A clip with its labels (ids from 1) and where the protocol puts it."""

    name: ClipName
    action: int
    verb: int
    nouns: tuple[int, ...]
    roles: tuple[str, str, str]
    """`train`, `test` or `` (not in it), for the official splits 1, 2, 3."""
    stratified_fold: int
    session_fold: int


@dataclass(frozen=True)
class Annotations:
    actions: list[str]
    verbs: list[str]
    nouns: list[str]
    clips: list[AnnotatedClip]
    """In order of their names."""


def read_annotations(egtea: str | Path) -> Annotations:
    """All three splits and the class names of an EGTEA folder.

    Raises `UserError` where files are absent or contradict each other.
    """
    folder = storage.join(egtea, "action_annotation")
    files = [f"{role}_split{split}.txt" for split in SPLITS for role in ("train", "test")]
    needed = [*files, "action_idx.txt", "verb_idx.txt", "noun_idx.txt"]
    present = storage.list_names(folder)
    absent = [name for name in needed if name not in present]
    if absent:
        raise UserError(f"{folder}: EGTEA's annotations are not here: no {', '.join(absent)}")
    names = {kind: read_index(storage.join(folder, f"{kind}_idx.txt")) for kind in ("action", "verb", "noun")}
    lines: dict[str, SplitLine] = {}
    roles: dict[str, dict[int, str]] = {}
    for split in SPLITS:
        for role in ("train", "test"):
            path = storage.join(folder, f"{role}_split{split}.txt")
            for line in read_split(path):
                _check_line(line, lines, names, path)
                lines[line.clip] = line
                if roles.setdefault(line.clip, {}).setdefault(split, role) != role:
                    raise UserError(f"{path}: {line.clip} is in both train and test of split {split}")
    ordered = [lines[clip] for clip in sorted(lines)]
    parsed = [parse_clip_name(line.clip) for line in ordered]
    clip_roles = [tuple(roles[line.clip].get(split, "") for split in SPLITS) for line in ordered]
    stratified = stratified_folds([line.action for line in ordered], clip_roles)
    by_session = session_folds([name.session for name in parsed])
    clips = [
        AnnotatedClip(name, line.action, line.verb, line.nouns, role, s_fold, b_fold)  # type: ignore[arg-type]
        for name, line, role, s_fold, b_fold in zip(parsed, ordered, clip_roles, stratified, by_session)
    ]
    return Annotations(names["action"], names["verb"], names["noun"], clips)


def _check_line(line: SplitLine, seen: dict[str, SplitLine], names: dict[str, list[str]], path: str) -> None:
    if seen.setdefault(line.clip, line) != line:
        raise UserError(f"{path}: {line.clip} has other labels here than in another split file")
    for kind, identifiers in (("action", (line.action,)), ("verb", (line.verb,)), ("noun", line.nouns)):
        for identifier in identifiers:
            if not 1 <= identifier <= len(names[kind]):
                raise UserError(f"{path}: {line.clip}: {kind} id {identifier} is not in {kind}_idx.txt")


def stratified_folds(actions: list[int], roles: list[tuple[str, ...]]) -> list[int]:
    """Ten folds with every class spread evenly, and its training clips of each official split too.

    Clips are dealt out in an order that is shuffled (always the same way) inside each (class, roles) group; every
    class starts three folds on, or classes of equal size would all put their test clips into the same folds.
    """
    order = np.random.default_rng(0).permutation(len(actions))
    dealt = sorted(order, key=lambda index: (actions[index], roles[index]))
    folds = [0] * len(actions)
    for place, index in enumerate(dealt):
        folds[index] = (place + 3 * actions[index]) % FOLDS
    return folds


def session_folds(sessions: list[str]) -> list[int]:
    """Ten folds of whole sessions of about equal clip counts (largest session first, to the emptiest fold)."""
    unique, counts = np.unique(sessions, return_counts=True)
    sizes = [0] * FOLDS
    fold_of = {}
    for index in sorted(range(len(unique)), key=lambda index: (-counts[index], unique[index])):
        fold_of[unique[index]] = sizes.index(min(sizes))
        sizes[fold_of[unique[index]]] += int(counts[index])
    return [fold_of[session] for session in sessions]


def find_clips(egtea: str | Path) -> dict[str, SourceFile]:
    """Every mp4 under `cropped_clips`, nested or flat, by clip name; of some of one name, the first not empty."""
    return _by_name(_clip_files(egtea))


def find_doubled_clips(egtea: str | Path) -> dict[str, list[SourceFile]]:
    """The files of every name that more than one mp4 has."""
    files: dict[str, list[SourceFile]] = {}
    for file in _clip_files(egtea):
        files.setdefault(Path(file.uri).stem, []).append(file)
    return {name: found for name, found in files.items() if len(found) > 1}


def _clip_files(egtea: str | Path) -> list[SourceFile]:
    return storage.find_files(storage.join(egtea, "cropped_clips"), ".mp4")


def find_gaze(egtea: str | Path) -> dict[str, SourceFile]:
    """Every gaze file under `gaze_data`, nested or flat, by session; of some of one name, the first not empty."""
    return _by_name(storage.find_files(storage.join(egtea, "gaze_data"), ".txt"))


def _by_name(files: list[SourceFile]) -> dict[str, SourceFile]:
    # Of one name the last one counts: those that are not empty behind those that are, the first path behind the others.
    ordered = files[::-1]
    ordered.sort(key=lambda file: bool(file.bytes))
    return {Path(file.uri).stem: file for file in ordered}
