"""Gaze files of EGTEA: SMI BeGaze text exports, in the two layouts that the data set contains.

BeGaze 3.1 (sessions `OP*`): left-eye point, `Frame` an integer. BeGaze 3.4 (sessions `P*`): binocular point,
`Frame` as HH:MM:SS:FF with FF in 24ths of a second. About 30 samples a second, 24 frames a second.
"""

from __future__ import annotations

import codecs
import io
import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from tune_ego import storage
from tune_ego.dataset.foreign_files import describe_foreign_file
from tune_ego.errors import UserError

FPS = 24
USABLE_EVENTS = ("Fixation", "Saccade")
_EVENTS = (*USABLE_EVENTS, "Blink", "-")
SKIPPED_LIMIT = 0.1
"""Largest share of unreadable samples in a file. EGTEA's own files have none."""
_LAYOUTS = (("B", "BeGaze 3.4"), ("L", "BeGaze 3.1"))  # (column prefix, name); the binocular point is preferred
_CALIBRATION_AREA = (1280.0, 960.0)
_MOST_FRAMES = 24 * 3600 * FPS  # a day: a larger frame number is damaged


@dataclass(frozen=True)
class Gaze:
    """Gaze per frame; every array is indexed by the frame of the session (or clip)."""

    x: np.ndarray
    """float32, [0, 1] of the image's width; NaN where not valid."""
    y: np.ndarray
    """float32, [0, 1] of the image's height; NaN where not valid."""
    valid: np.ndarray
    """bool: frame with at least one usable sample."""
    event: np.ndarray
    """str: most frequent event of the frame's usable samples, else of all its samples; `` without samples."""
    skipped: int = 0
    """Number of samples in the file that could not be read."""

    def __len__(self) -> int:
        return len(self.valid)

    def frames(self, first: int, count: int) -> Gaze:
        """Return the gaze of frames [first, first + count). Frames outside the recording are not valid."""
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
    """Return the gaze of `count` frames without samples."""
    nan = np.full(count, np.nan, np.float32)
    return Gaze(nan, nan.copy(), np.zeros(count, bool), np.full(count, "", dtype="<U8"))


def read_gaze(path: str | Path) -> Gaze:
    """Read the gaze of a session, indexed by session frame.

    A frame's point is the mean of its usable samples. A usable sample is a Fixation or Saccade whose point is finite
    and inside the image.

    Raises:
        UserError: The file has neither layout, or over a tenth of its samples cannot be read.
    """
    raw = _read(path)
    layout = _parse_layout(raw, path)
    if b"\0" in raw:
        raise UserError(f"{path}: damaged: there are NUL bytes in it; fetch it again")
    body = _drop_cut_line(raw[layout.body :], layout)
    if not body.strip():
        return no_gaze(0)
    malformed_lines: Counter[str] = Counter()
    table = _read_columns(body, layout, malformed_lines, path)
    x, y = (_parse_numbers(table[place]) for place in (0, 1))
    frame = _parse_frames(table[2])
    event = np.array(table[3].to_pylist(), dtype="<U16")
    unreadable = {
        "coordinates that are no numbers": ~(_is_missing(table[0]) | ~np.isnan(x))
        | ~(_is_missing(table[1]) | ~np.isnan(y)),
        "frames that are no frame numbers": (frame < 0) | (frame >= _MOST_FRAMES),
        f"events other than {', '.join(_EVENTS)}": ~np.isin(event, _EVENTS),
    }
    skipped_samples = np.any(list(unreadable.values()), axis=0)
    skipped = int(skipped_samples.sum()) + malformed_lines.total()
    total = len(skipped_samples) + malformed_lines.total()
    if skipped > SKIPPED_LIMIT * total:
        counts = Counter({cause: int(samples.sum()) for cause, samples in unreadable.items()}) + malformed_lines
        causes = "; ".join(f"{count:,} with {cause}" for cause, count in counts.most_common())
        raise UserError(f"{path}: of {total:,} samples {skipped:,} cannot be read: {causes}; fetch or export it again")
    event[~np.isin(event, _EVENTS)] = "-"
    width, height = layout.area
    return replace(_average_per_frame(x / width, y / height, frame, event), skipped=skipped)


def check_gaze_layout(path: str | Path) -> None:
    """Raise `UserError` for a file of neither layout. Reads the first 64 KiB only."""
    _parse_layout(_read(path, 1 << 16), path)


def _read(path: str | Path, size: int | None = None) -> bytes:
    try:
        raw = storage.read_bytes(path, size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    if foreign := describe_foreign_file(raw):
        raise UserError(f"{path}: no gaze file but {foreign}")
    return raw


class _Layout(NamedTuple):
    body: int
    """Offset of the first sample."""
    area: tuple[float, float]
    """Width and height of the calibration area, pixels."""
    columns: int
    used_columns: list[int]
    """Indices of the columns x, y, frame and event."""


def _parse_layout(raw: bytes, path: str | Path) -> _Layout:
    start, area = _parse_header(raw, path)
    if start is None:
        raise UserError(f"{path}: not a BeGaze export: no column line that starts with 'Time'")
    end = raw.find(b"\n", start) + 1 or len(raw)
    columns = [_strip(name) for name in raw[start:end].decode("latin-1").strip("\r\n").split("\t")]
    for prefix, _ in _LAYOUTS:
        names = [f"{prefix} POR X [px]", f"{prefix} POR Y [px]", "Frame", f"{prefix} Event Info"]
        if {*names} <= {*columns}:
            return _Layout(end, area, len(columns), [columns.index(name) for name in names])
    layouts = " or ".join(
        f"{name} ('{p} POR X [px]', '{p} POR Y [px]', '{p} Event Info', 'Frame')" for p, name in _LAYOUTS
    )
    raise UserError(f"{path}: neither gaze layout: expected the columns of {layouts}")


def _strip(field: str) -> str:
    """Return a field without surrounding blanks and quotes."""
    return field.strip(' "')


def _parse_header(raw: bytes, path: str | Path) -> tuple[int | None, tuple[float, float]]:
    """Return (offset of the column line or None, calibration area in pixels)."""
    area, offset = _CALIBRATION_AREA, len(codecs.BOM_UTF8) if raw.startswith(codecs.BOM_UTF8) else 0
    while offset < len(raw):
        end = raw.find(b"\n", offset)
        end = len(raw) if end < 0 else end
        line = raw[offset:end].decode("latin-1").strip()
        if calibration := re.fullmatch(r"##\s*Calibration\s+Area\s*:(.*)", line, re.IGNORECASE):
            numbers = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s+(\d+(?:\.\d*)?)\s*", calibration[1])
            if numbers is None or not all(float(number) for number in numbers.groups()):
                raise UserError(f"{path}: {line!r} holds no width and height in pixels")
            area = (float(numbers[1]), float(numbers[2]))
        elif _strip(line).startswith("Time"):
            return offset, area
        elif line and not line.startswith("##"):
            break
        offset = end + 1
    return None, area


def _drop_cut_line(body: bytes, layout: _Layout) -> bytes:
    """Return the samples without a last line that was cut off.

    A last line counts as cut off if it has no line end and lacks fields or one of the event names.
    """
    start = body.rfind(b"\n") + 1
    fields = [_strip(field) for field in body[start:].decode("latin-1").strip("\r").split("\t")]
    whole = len(fields) >= layout.columns and fields[layout.used_columns[3]] in _EVENTS
    return body if whole else body[:start]


def _read_columns(
    body: bytes, layout: _Layout, malformed_lines: Counter[str], path: str | Path
) -> list[pa.ChunkedArray]:
    """Return x, y, frame and event of each sample as text; counts lines of another length in `malformed_lines`."""
    first = body[: body.find(b"\n") + 1 or len(body)].rstrip(b"\r\n")
    columns = layout.columns + (first.count(b"\t") == layout.columns and first.endswith(b"\t"))  # a final tab

    def skip(row: pacsv.InvalidRow) -> str:
        if row.text.split("\t")[1:2] != ["MSG"]:  # messages are no samples
            malformed_lines[f"another number of fields than {columns}"] += 1
        return "skip"

    names = [str(place) for place in range(columns)]
    used_names = [str(place) for place in layout.used_columns]
    try:
        table = pacsv.read_csv(
            io.BytesIO(body),
            read_options=pacsv.ReadOptions(encoding="latin-1", column_names=names, use_threads=False),
            parse_options=pacsv.ParseOptions(delimiter="\t", quote_char=False, invalid_row_handler=skip),
            convert_options=pacsv.ConvertOptions(
                include_columns=used_names, column_types=dict.fromkeys(used_names, pa.string())
            ),
        )
    except pa.ArrowException as error:
        raise UserError(f"{path}: cannot be read ({error})") from error
    return [pc.utf8_trim(table[name], ' "') for name in used_names]


def _is_missing(column: pa.ChunkedArray) -> np.ndarray:
    """Return a bool for each sample: the tracker wrote no value."""
    return pc.is_in(column, pa.array(["", "-", "NaN", "nan"])).to_numpy(zero_copy_only=False)


def _parse_numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Return float64 values, NaN for text that is no number ('-', empty, 'NaN').

    A comma is read as a decimal comma, except before three digits, where it could separate thousands.
    """
    column = pc.replace_substring_regex(column, r"^([-+]?\d+),(\d{1,2}|\d{4,})$", r"\1.\2")
    is_number = pc.match_substring_regex(column, r"^[-+]?\d+(\.\d*)?([eE][-+]?\d+)?$")
    return pc.cast(pc.if_else(is_number, column, None), pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64)


def _parse_frames(column: pa.ChunkedArray) -> np.ndarray:
    """Return the session frame of each sample, int64; -1 for text that is no frame."""
    clock = pc.extract_regex(column, r"^(?P<h>\d+):(?P<m>\d+):(?P<s>\d+):(?P<f>\d+)$")
    if clock.null_count == len(clock):
        return np.nan_to_num(_parse_numbers(column), nan=-1).astype(np.int64)
    hours, minutes, seconds, parts = (_parse_numbers(pc.struct_field(clock, [index])) for index in range(4))
    return np.nan_to_num(((hours * 60 + minutes) * 60 + seconds) * FPS + parts, nan=-1).astype(np.int64)


def _average_per_frame(x: np.ndarray, y: np.ndarray, frame: np.ndarray, event: np.ndarray) -> Gaze:
    """Average samples, arrays [samples], over each frame; x and y are fractions of the image, or NaN."""
    in_range = (frame >= 0) & (frame < _MOST_FRAMES)
    x, y, frame, event = x[in_range], y[in_range], frame[in_range], event[in_range]
    if not len(frame):
        return no_gaze(0)
    count = int(frame.max()) + 1
    usable = np.isin(event, USABLE_EVENTS) & (x >= 0) & (x <= 1) & (y >= 0) & (y <= 1)  # NaN compares false
    samples = np.bincount(frame[usable], minlength=count)  # usable samples of each frame
    valid = samples > 0
    point = []
    for values in (x, y):
        total = np.bincount(frame[usable], weights=values[usable], minlength=count)
        point.append(np.where(valid, total / np.maximum(samples, 1), np.nan).astype(np.float32))
    return Gaze(point[0], point[1], valid, _most_frequent_event(frame, event, usable, count))


def _most_frequent_event(frame: np.ndarray, event: np.ndarray, usable: np.ndarray, count: int) -> np.ndarray:
    """Return the most frequent event of each frame. One usable sample outweighs all samples that are not usable."""
    names, code = np.unique(event, return_inverse=True)
    weights = np.zeros((count, len(names)), np.int64)
    np.add.at(weights, (frame, code), np.where(usable, 1 << 20, 1))
    return np.where(weights.any(axis=1), names[weights.argmax(axis=1)], "")
