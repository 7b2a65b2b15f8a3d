"""Gaze files of EGTEA: SMI BeGaze text exports, in the two layouts found in the data set.

BeGaze 3.1 (sessions `OP*`): left-eye point, `Frame` an integer. BeGaze 3.4 (sessions `P*`): binocular point,
`Frame` as HH:MM:SS:FF with FF in 24ths of a second. About 30 samples a second, 24 frames a second.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from tune_ego import storage
from tune_ego.errors import UserError

FPS = 24
USABLE_EVENTS = ("Fixation", "Saccade")
_LAYOUTS = (("B", "BeGaze 3.4"), ("L", "BeGaze 3.1"))  # column prefix; the binocular point where there is one
_CALIBRATION_AREA = (1280.0, 960.0)
_MOST_FRAMES = 24 * 3600 * FPS  # a day: a frame beyond it is a damaged number


@dataclass(frozen=True)
class Gaze:
    """Gaze per frame; every array is indexed by the frame of its session (or clip)."""

    x: np.ndarray
    """float32, [0, 1] of the image's width; NaN where not valid."""
    y: np.ndarray
    """float32, [0, 1] of the image's height; NaN where not valid."""
    valid: np.ndarray
    """bool: the frame has at least one usable sample."""
    event: np.ndarray
    """str: the commonest event of the frame's usable samples, else of all its samples; `` without samples."""

    def __len__(self) -> int:
        return len(self.valid)

    def frames(self, first: int, count: int) -> Gaze:
        """The frames [first, first + count); outside the recording they are not valid."""
        index = np.arange(first, first + count)
        inside = (index >= 0) & (index < len(self))
        index = np.where(inside, index, 0)
        if not len(self):
            return no_gaze(count)
        nan = np.float32(np.nan)
        return Gaze(
            np.where(inside, self.x[index], nan),
            np.where(inside, self.y[index], nan),
            inside & self.valid[index],
            np.where(inside, self.event[index], ""),
        )


def no_gaze(count: int) -> Gaze:
    nan = np.full(count, np.nan, np.float32)
    return Gaze(nan, nan.copy(), np.zeros(count, bool), np.full(count, "", dtype="<U8"))


def read_gaze(path: str | Path) -> Gaze:
    """Gaze of a session, per session frame.

    A frame's point is the mean of its usable samples: a Fixation or Saccade, finite, inside the image.
    Raises `UserError` for a file of neither layout.
    """
    raw = _read(path)
    start, area, names = _layout(raw, path)
    table = pacsv.read_csv(
        io.BytesIO(raw[start:]),
        read_options=pacsv.ReadOptions(encoding="latin-1"),
        # Lines with another number of fields are messages, or a last line that was cut off.
        parse_options=pacsv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=lambda row: "skip"),
        convert_options=pacsv.ConvertOptions(include_columns=names, column_types=dict.fromkeys(names, pa.string())),
    )
    x, y = (_numbers(table[name]) / size for name, size in zip(names[:2], area))
    return _per_frame(x, y, _frames(table[names[2]]), np.array(table[names[3]].to_pylist(), dtype="<U16"))


def check_gaze_layout(path: str | Path) -> None:
    """Raise `UserError` where a file is of neither layout; reads its first 64 KiB only."""
    _layout(_read(path, 1 << 16), path)


def _read(path: str | Path, size: int | None = None) -> bytes:
    try:
        return storage.read_bytes(path, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def _layout(raw: bytes, path: str | Path) -> tuple[int, tuple[float, float], list[str]]:
    """(offset of the column line, calibration area in pixels, names of the x, y, frame and event columns)."""
    start, area = _header(raw, path)
    if start is None:
        raise UserError(f"{path}: not a BeGaze export: no column line that starts with 'Time'")
    columns = raw[start : raw.find(b"\n", start)].decode("latin-1").strip().split("\t")
    prefix = next(
        (p for p, _ in _LAYOUTS if {f"{p} POR X [px]", f"{p} POR Y [px]", f"{p} Event Info"} <= {*columns}), None
    )
    if prefix is None or "Frame" not in columns:
        known = " or ".join(
            f"{name} ('{p} POR X [px]', '{p} POR Y [px]', '{p} Event Info', 'Frame')" for p, name in _LAYOUTS
        )
        raise UserError(f"{path}: neither gaze layout: expected the columns of {known}")
    names = [f"{prefix} POR X [px]", f"{prefix} POR Y [px]", "Frame", f"{prefix} Event Info"]
    return start, area, names


def _header(raw: bytes, path: str | Path) -> tuple[int | None, tuple[float, float]]:
    """(offset of the column line, calibration area in pixels)."""
    area, offset = _CALIBRATION_AREA, 0
    while offset < len(raw):
        end = raw.find(b"\n", offset)
        end = len(raw) if end < 0 else end
        line = raw[offset:end].decode("latin-1").strip()
        if line.startswith("## Calibration Area:"):
            numbers = re.fullmatch(r"\s*([1-9]\d*)\s+([1-9]\d*)\s*", line.split(":", 1)[1])
            if numbers is None:
                raise UserError(f"{path}: {line!r} holds no width and height in pixels")
            area = (float(numbers[1]), float(numbers[2]))
        elif line.startswith("Time"):
            return offset, area
        elif line and not line.startswith("##"):
            break
        offset = end + 1
    return None, area


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """float64 with NaN for whatever is no number ('-', empty, 'NaN')."""
    is_number = pc.match_substring_regex(column, r"^[-+]?\d+(\.\d*)?([eE][-+]?\d+)?$")
    return pc.cast(pc.if_else(is_number, column, None), pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _frames(column: pa.ChunkedArray) -> np.ndarray:
    """Session frame of each sample, int64; -1 where there is none."""
    clock = pc.extract_regex(column, r"^(?P<h>\d+):(?P<m>\d+):(?P<s>\d+):(?P<f>\d+)$")
    if clock.null_count == len(clock):
        return np.nan_to_num(_numbers(column), nan=-1).astype(np.int64)
    hours, minutes, seconds, parts = (_numbers(pc.struct_field(clock, [index])) for index in range(4))
    return np.nan_to_num(((hours * 60 + minutes) * 60 + seconds) * FPS + parts, nan=-1).astype(np.int64)


def _per_frame(x: np.ndarray, y: np.ndarray, frame: np.ndarray, event: np.ndarray) -> Gaze:
    known = (frame >= 0) & (frame < _MOST_FRAMES)
    x, y, frame, event = x[known], y[known], frame[known], event[known]
    if not len(frame):
        return no_gaze(0)
    count = int(frame.max()) + 1
    usable = np.isin(event, USABLE_EVENTS) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)  # NaN compares false
    weight = np.bincount(frame[usable], minlength=count)
    valid = weight > 0
    point = []
    for values in (x, y):
        total = np.bincount(frame[usable], weights=values[usable], minlength=count)
        point.append(np.where(valid, total / np.maximum(weight, 1), np.nan).astype(np.float32))
    return Gaze(point[0], point[1], valid, _commonest(frame, event, usable, count))


def _commonest(frame: np.ndarray, event: np.ndarray, usable: np.ndarray, count: int) -> np.ndarray:
    """Per frame its commonest event; usable samples outvote all others."""
    names, code = np.unique(event, return_inverse=True)
    votes = np.zeros((count, len(names)), np.int64)
    np.add.at(votes, (frame, code), np.where(usable, 1 << 20, 1))
    return np.where(votes.any(axis=1), names[votes.argmax(axis=1)], "")
