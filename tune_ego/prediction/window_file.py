"""`VIDEO.windows.parquet`: scores, attention and a thumbnail of each window of a video.

K classes, T' slices of an attention map, H, W cells.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tune_ego import storage
from tune_ego.dataset.gaze import FPS
from tune_ego.prediction.scoring import WindowScores

if TYPE_CHECKING:
    from tune_ego.prediction.trained_model import TrainedModel

WINDOWS = ".windows.parquet"
"""Ending of the file, after the name of the video."""
_ROWS = 256
"""Windows in a row group, held in memory until the group is written."""


class WindowFile:
    """Writer of the file, as a context manager. Windows are added to a temporary file, which `write` copies."""

    def __init__(self, model: TrainedModel, source: str) -> None:
        """Begin a file. `source` is the video, a note in the file's metadata."""
        self._image_size, self._crop = model.image_size, model.config.data.crop
        self._span = model.config.data.window.span
        self._metadata = {"classes": json.dumps(model.classes), "frames_per_second": str(FPS), "source": source}
        self._file = tempfile.NamedTemporaryFile(prefix="tune-ego-", suffix=".parquet")  # noqa: SIM115, see __exit__
        self._writer: pq.ParquetWriter | None = None
        self._rows: list[WindowScores] = []

    def add(self, window: WindowScores) -> None:
        self._rows.append(window)
        if len(self._rows) == _ROWS:
            self._write_rows()

    def write(self, uri: str, frames: int) -> None:
        """Write the file, after the last window.

        `frames` is the number of session frames: a window of a shorter video ends with it.
        """
        self._write_rows(frames)
        assert self._writer is not None
        self._writer.close()
        storage.write_file(uri, self._file.name)

    def __enter__(self) -> WindowFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()  # and delete it

    def _write_rows(self, frames: int | None = None) -> None:
        if not self._rows:
            return
        table = _table(self._rows, self._image_size, self._crop, self._span, frames)
        if self._writer is None:
            schema = table.schema.with_metadata(self._metadata | _map_shapes(self._rows[0]))
            self._writer = pq.ParquetWriter(self._file.name, schema, compression="zstd")
        self._writer.write_table(table.replace_schema_metadata(self._writer.schema.metadata))
        self._rows.clear()


def _map_shapes(window: WindowScores) -> dict[str, str]:
    return {f"{name}_attention_shape": json.dumps(map_THW.shape) for name, map_THW in window.attention.items()}


def _table(rows: list[WindowScores], image_size: tuple[int, int], crop: int, span: int, frames: int | None) -> pa.Table:
    starts = np.array([row.start for row in rows], np.int64)
    ends = starts + span
    columns: dict[str, Any] = {
        "first_frame": starts,
        "start": starts / FPS,
        "end": (ends if frames is None else np.minimum(ends, frames)) / FPS,
        "action": np.array([row.main.argmax() for row in rows], np.int64),
    }
    for name in rows[0].scores:
        columns[name] = _lists([row.scores[name] for row in rows])
    for name in rows[0].attention:
        peaks = np.array([attention_peak(row.attention[name], image_size, crop) for row in rows])
        columns |= {f"{name}_peak_x": peaks[:, 0], f"{name}_peak_y": peaks[:, 1]}
        columns[f"{name}_attention"] = _lists([row.attention[name].ravel() for row in rows])
    columns["thumbnail"] = pa.array([row.thumbnail for row in rows], pa.binary())
    return pa.table(columns)


def _lists(values: list[np.ndarray]) -> pa.Array:
    matrix = np.stack(values).astype(np.float32)
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])


def attention_peak(map_THW: np.ndarray, image_size: tuple[int, int], crop: int) -> tuple[float, float]:
    """Return x, y in [0, 1] of the image: the middle of the cell where the mean map over time is highest."""
    mean_HW = map_THW.mean(axis=0)
    row, column = np.unravel_index(mean_HW.argmax(), mean_HW.shape)
    width, height = image_size
    x = ((width - crop) // 2 + crop * (column + 0.5) / mean_HW.shape[1]) / width
    y = ((height - crop) // 2 + crop * (row + 0.5) / mean_HW.shape[0]) / height
    return float(x), float(y)


def read_windows(uri: str) -> Iterator[WindowScores]:
    """Yield the windows of a file, one row group in memory at a time."""
    filesystem, path = storage.resolve(uri)
    file = pq.ParquetFile(filesystem.open_input_file(path))
    metadata = {key.decode(): value.decode() for key, value in file.schema_arrow.metadata.items()}
    names = [name for name in ("rgb", "flow", "fused") if name in file.schema_arrow.names]
    shapes = {name: json.loads(metadata[key]) for name in names if (key := f"{name}_attention_shape") in metadata}
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        scores = {name: _matrix(table[name]) for name in names}
        maps = {name: _matrix(table[f"{name}_attention"]).reshape(-1, *shape) for name, shape in shapes.items()}
        for row, (start, thumbnail) in enumerate(zip(table["first_frame"].to_pylist(), table["thumbnail"])):
            yield WindowScores(
                start,
                {name: values[row] for name, values in scores.items()},
                {name: values[row] for name, values in maps.items()},
                thumbnail.as_py(),
            )


def _matrix(column: pa.ChunkedArray) -> np.ndarray:
    array = column.combine_chunks()
    array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array
    matrix: np.ndarray = array.values.to_numpy().reshape(len(array), -1)
    return matrix
