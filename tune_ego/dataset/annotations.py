"""EGTEA's annotation files and folder layout.

    EGTEA/cropped_clips/<session>/<clip>.mp4          or cropped_clips/<clip>.mp4
    EGTEA/action_annotation/{train,test}_split{1,2,3}.txt, {action,verb,noun}_idx.txt
    EGTEA/gaze_data/gaze_data/<session>.txt           or gaze_data/<session>.txt

EGTEA is a path or URI. Class ids in the annotation files count from 1. `ActionParts` counts from 0, as shards and model
do. The split of an action into its verb and nouns is defined here: `action_parts` and `split_actions`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tune_ego import storage
from tune_ego.dataset.foreign_files import WRAPPINGS, describe_foreign_file
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

SPLITS = (1, 2, 3)
FOLDS = 10
_CLIP_NAME = re.compile(
    r"(?P<subject>[A-Za-z]+\d+)-R(?P<run>\d+)-(?P<recipe>[^-]+)-(?P<start>\d+)-(?P<end>\d+)-F(?P<first>\d+)-F(?P<last>\d+)"
)


class ClipName(NamedTuple):
    """Fields of a clip's name."""

    name: str
    session: str
    """`<subject>-R<nn>-<Recipe>`, which is also the name of the session's gaze file."""
    subject: str
    recipe: str
    start_ms: int
    end_ms: int
    first_frame: int
    """Frame of the session (24 fps); the clip spans [first_frame, last_frame)."""
    last_frame: int

    @property
    def frames(self) -> int:
        """Number of session frames."""
        return self.last_frame - self.first_frame


def parse_clip_name(name: str) -> ClipName:
    """Split a clip's name into its fields. Raises `UserError` for a name that is not of EGTEA's form."""
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
    """Read a split file with lines of the form `ClipName ActionID VerbID Noun1 [Noun2 [Noun3]]`."""
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
    """Read the class names of an `*_idx.txt` file, ordered by id (1, 2, ...). Names may hold spaces and slashes."""
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
        raw = storage.read_bytes(path)
        if foreign := describe_foreign_file(raw):
            raise UserError(f"{path}: no annotation file but {foreign}")
        return raw.decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


class AnnotatedClip(NamedTuple):
    """Clip with its labels (ids from 1), its role in each official split and its validation folds."""

    name: ClipName
    action: int
    verb: int
    nouns: tuple[int, ...]
    roles: tuple[str, str, str]
    """`train`, `test` or `` (not in the split), for the official splits 1, 2, 3."""
    stratified_fold: int
    session_fold: int


class ActionParts(NamedTuple):
    """Verb and first noun of each action class, indexed by action; all ids count from 0.

    -1 stands for an action that no annotated clip shows.
    """

    verbs: list[int]
    nouns: list[int]


@dataclass(frozen=True)
class Annotations:
    """Class names and annotated clips of EGTEA, all official splits together."""

    actions: list[str]
    verbs: list[str]
    nouns: list[str]
    clips: list[AnnotatedClip]
    """Sorted by clip name."""


def read_annotations(egtea: str | Path) -> Annotations:
    """Read the three official splits and the class names of an EGTEA folder.

    Raises:
        UserError: Annotation files are absent or contradict each other.
    """
    folder = storage.join(egtea, "action_annotation")
    files = [f"{role}_split{split}.txt" for split in SPLITS for role in ("train", "test")]
    required = [*files, "action_idx.txt", "verb_idx.txt", "noun_idx.txt"]
    present = storage.list_names(folder)
    absent = [name for name in required if name not in present]
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


def action_parts(annotations: Annotations) -> ActionParts:
    """Return the verb and the first noun of each action, taken from the labels of its clips."""
    verbs, nouns = ([-1] * len(annotations.actions) for _ in range(2))
    for clip in annotations.clips:
        verbs[clip.action - 1], nouns[clip.action - 1] = clip.verb - 1, clip.nouns[0] - 1
    return ActionParts(verbs, nouns)


def split_actions(action_N: np.ndarray, parts: ActionParts) -> tuple[np.ndarray, np.ndarray]:
    """Split actions into (verbs, first nouns); all are int64 [N] and count from 0."""
    verb_K, noun_K = np.array(parts.verbs), np.array(parts.nouns)
    return verb_K[action_N], noun_K[action_N]


def _check_line(line: SplitLine, seen: dict[str, SplitLine], names: dict[str, list[str]], path: str) -> None:
    if seen.setdefault(line.clip, line) != line:
        raise UserError(f"{path}: {line.clip} has other labels here than in another split file")
    for kind, identifiers in (("action", (line.action,)), ("verb", (line.verb,)), ("noun", line.nouns)):
        for identifier in identifiers:
            if not 1 <= identifier <= len(names[kind]):
                raise UserError(f"{path}: {line.clip}: {kind} id {identifier} is not in {kind}_idx.txt")


def stratified_folds(actions: list[int], roles: list[tuple[str, ...]]) -> list[int]:
    """Return a fold from 0 to 9 for each clip, so that the folds hold about equal parts of each class.

    The training clips of each official split are spread evenly, too. Inside each (class, roles) group the clips are
    shuffled with a fixed seed and assigned to the folds in turn. Each class starts three folds after the class before:
    otherwise classes of equal size would all put their test clips into the same folds.
    """
    order = np.random.default_rng(0).permutation(len(actions))
    grouped = sorted(order, key=lambda index: (actions[index], roles[index]))
    folds = [0] * len(actions)
    for place, index in enumerate(grouped):
        folds[index] = (place + 3 * actions[index]) % FOLDS
    return folds


def session_folds(sessions: list[str]) -> list[int]:
    """Return a fold from 0 to 9 for each clip: folds of whole sessions with about equal numbers of clips.

    Sessions are assigned from the largest to the smallest, each to the fold with the fewest clips so far.
    """
    unique, counts = np.unique(sessions, return_counts=True)
    sizes = [0] * FOLDS
    fold_of = {}
    for index in sorted(range(len(unique)), key=lambda index: (-counts[index], unique[index])):
        fold_of[unique[index]] = sizes.index(min(sizes))
        sizes[fold_of[unique[index]]] += int(counts[index])
    return [fold_of[session] for session in sessions]


def find_clips(egtea: str | Path) -> dict[str, SourceFile]:
    """Return clip name -> mp4 file, for all mp4 files under `cropped_clips`, nested or flat.

    Of several files with the same name, the first file that is not empty is used. Without any, a compressed file or a
    pointer (`X.mp4.dvc`) stands for it: reading it names what it is.
    """
    return _by_name(storage.join(egtea, "cropped_clips"), ".mp4")


def find_duplicate_clips(egtea: str | Path) -> dict[str, list[SourceFile]]:
    """Return clip name -> mp4 files, for the names that more than one mp4 file has."""
    files: dict[str, list[SourceFile]] = {}
    for file in storage.find_files(storage.join(egtea, "cropped_clips"), ".mp4"):
        files.setdefault(Path(file.uri).stem, []).append(file)
    return {name: duplicates for name, duplicates in files.items() if len(duplicates) > 1}


def find_gaze(egtea: str | Path) -> dict[str, SourceFile]:
    """Return session -> gaze file, for all gaze files under `gaze_data`, chosen as in `find_clips`."""
    return _by_name(storage.join(egtea, "gaze_data"), ".txt")


def _by_name(folder: str, suffix: str) -> dict[str, SourceFile]:
    endings = (suffix, *(suffix + wrapping for wrapping in WRAPPINGS))
    files = storage.find_files(folder, endings)
    # A later file replaces an earlier file of the same name. So wrapped files come first, then empty ones, and paths
    # are in reverse order.
    ordered = files[::-1]
    ordered.sort(key=lambda file: (file.uri.lower().endswith(suffix), bool(file.bytes)))
    return {_name_before(suffix, file): file for file in ordered}


def _name_before(suffix: str, file: SourceFile) -> str:
    name = Path(file.uri).name
    return name[: name.lower().rindex(suffix)]
