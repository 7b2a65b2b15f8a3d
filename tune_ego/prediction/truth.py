"""True actions of untrimmed videos: EGTEA's split files, or a CSV file of segments."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import PurePosixPath

from tune_ego import storage
from tune_ego.dataset.annotations import parse_clip_name, read_split
from tune_ego.dataset.gaze import FPS
from tune_ego.errors import UserError
from tune_ego.prediction.detection_scores import TrueSegment

COLUMNS = ("video", "start", "end", "action")


def read_truth(files: Sequence[str], classes: Sequence[str]) -> dict[str, list[TrueSegment]]:
    """Read the true actions of videos.

    Args:
        files: CSV files with the columns `video` (file name without its ending), `start` and `end` in seconds and
            `action`; or split files of EGTEA, whose clips are placed in the session's video by their frame numbers.
        classes: Names of the model's classes. In split files, id 1 is the first one.

    Returns:
        Video (EGTEA: session) -> its actions by start.

    Raises:
        UserError: A file is neither, or names an action that the model has not.
    """
    truth: dict[str, list[TrueSegment]] = {}
    for file in files:
        first_line = storage.read_bytes(file, 4096).decode("utf-8-sig", "replace").partition("\n")[0]
        is_table = set(COLUMNS) <= {name.strip() for name in first_line.split(",")}
        for video, segment in _read_table(file, classes) if is_table else _read_split(file, classes):
            truth.setdefault(video, []).append(segment)
    return {video: sorted(set(segments)) for video, segments in truth.items()}


def true_segments(truth: dict[str, list[TrueSegment]], source: str) -> list[TrueSegment]:
    """Return the true actions of a video. Raises `UserError` where there are none."""
    stem = PurePosixPath(source).stem
    if stem not in truth:
        raise UserError(f"--truth has no action of {stem}; it has {', '.join(sorted(truth)[:3]) or 'none'} ...")
    return truth[stem]


def _read_split(file: str, classes: Sequence[str]) -> list[tuple[str, TrueSegment]]:
    segments = []
    for line in read_split(file):
        if not 1 <= line.action <= len(classes):
            raise UserError(f"{file}: {line.clip}: the model has no action {line.action}; it has {len(classes)}")
        name = parse_clip_name(line.clip)
        end = name.first_frame + name.frames
        segments.append((name.session, TrueSegment(name.first_frame / FPS, end / FPS, classes[line.action - 1])))
    return segments


def _read_table(file: str, classes: Sequence[str]) -> list[tuple[str, TrueSegment]]:
    segments = []
    try:
        text = storage.read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not a text file in UTF-8 ({error})") from error
    for number, fields in enumerate(csv.DictReader(io.StringIO(text)), start=2):
        row = {str(name).strip(): str(value).strip() for name, value in fields.items()}
        try:
            start, end = float(row["start"]), float(row["end"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{file}:{number}: start and end are seconds, found {row}") from error
        if not 0 <= start < end < math.inf:
            raise UserError(f"{file}:{number}: start {start:g} and end {end:g}: expected 0 <= start < end")
        if row["action"] not in classes:
            raise UserError(f"{file}:{number}: the model has no action {row['action']!r}")
        segments.append((row["video"], TrueSegment(start, end, row["action"])))
    return segments
