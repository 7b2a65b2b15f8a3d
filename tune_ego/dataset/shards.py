"""Parquet data set: written by `prepare`, read by the feed.

    dataset.json                      schema version, class names, settings, counts, what was left out, checksums
    clips.parquet                     one row for each clip: labels, splits, folds, place of its frames
    problems.parquet                  one row for each problem of a clip
    frames/roles=.../stratified_fold=.../session_fold=.../part-0000.parquet     shards: one row for each frame

A split and a validation fold select whole shards. Inside a shard each clip starts a row group, and row groups hold 16
frames. So a window of 16 frames needs at most two row groups. Class ids count from 0, as in the model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from tune_ego import storage
from tune_ego.config import WINDOW_FRAMES, DataConfig
from tune_ego.dataset.annotations import ActionParts, AnnotatedClip
from tune_ego.dataset.gaze import Gaze
from tune_ego.errors import UserError

SCHEMA_VERSION = 2
FRAMES_PER_ROW_GROUP = WINDOW_FRAMES
_SHARD_NAME = re.compile(r"(?:[\w=-][\w.=-]*/)*[\w=-][\w.=-]*\.parquet", re.ASCII)
"""Form of the paths of shards. None leads out of the data set's folder."""
DATASET_FILE, CLIPS_FILE, PROBLEMS_FILE = "dataset.json", "clips.parquet", "problems.parquet"
_CLIPS_KEY, _PROBLEMS_KEY, _SOURCES_KEY = b"tune_ego.clips", b"tune_ego.problems", b"tune_ego.sources"
_NAME = pa.dictionary(pa.int32(), pa.string())

FRAME_SCHEMA = pa.schema(
    [
        ("clip", _NAME),
        ("frame", pa.int32()),
        ("rgb", pa.binary()),
        ("flow", pa.binary()),
        ("gaze_x", pa.float32()),
        ("gaze_y", pa.float32()),
        ("gaze_event", _NAME),
        ("gaze_valid", pa.bool_()),
    ]
)
CLIP_SCHEMA = pa.schema(
    [
        ("clip", pa.string()),
        ("session", pa.string()),
        ("subject", pa.string()),
        ("action", pa.int32()),
        ("verb", pa.int32()),
        ("nouns", pa.list_(pa.int32())),
        ("split1", pa.string()),
        ("split2", pa.string()),
        ("split3", pa.string()),
        ("stratified_fold", pa.int32()),
        ("session_fold", pa.int32()),
        ("frames", pa.int32()),
        ("gaze_frames", pa.int32()),
        ("shard", pa.string()),
        ("row_group", pa.int32()),
    ]
)


PROBLEM_SCHEMA = pa.schema(
    [("clip", pa.string()), ("stage", pa.string()), ("reason", pa.string()), ("kept", pa.bool_())]
)


class Problem(NamedTuple):
    """Fault or irregularity of a clip."""

    clip: str
    stage: str
    """`video` (left out), `damage`, `time`, `rotation`, `length` or `gaze`; `annotation`, too, in `prepare --check`."""
    reason: str
    kept: bool
    """Whether the clip is in the shards in spite of the problem."""


def shard_folder(clip: AnnotatedClip) -> str:
    """Return the folder of a clip's shard, relative to the data set."""
    roles = "-".join(role or "none" for role in clip.roles)
    return f"frames/roles={roles}/stratified_fold={clip.stratified_fold}/session_fold={clip.session_fold}"


def frame_table(clip: str, rgb: list[bytes], flow: list[bytes], gaze: Gaze) -> pa.Table:
    """Return the rows of one clip. `rgb` and `flow` hold a JPEG file for each frame."""
    count = len(rgb)
    columns = [
        pa.DictionaryArray.from_arrays(pa.array([0] * count, pa.int32()), [clip]),
        pa.array(range(count), pa.int32()),
        pa.array(rgb, pa.binary()),
        pa.array(flow, pa.binary()),
        pa.array(gaze.x, pa.float32(), from_pandas=True),
        pa.array(gaze.y, pa.float32(), from_pandas=True),
        pa.array(gaze.event.tolist()).dictionary_encode(),
        pa.array(gaze.valid),
    ]
    return pa.table(columns, schema=FRAME_SCHEMA)


def clip_record(clip: AnnotatedClip, frames: int, gaze: Gaze, shard: str, row_group: int) -> dict[str, Any]:
    """Return a clip's row of `clips.parquet`."""
    values = [
        *(clip.name.name, clip.name.session, clip.name.subject),
        *(clip.action - 1, clip.verb - 1, [noun - 1 for noun in clip.nouns]),
        *(*clip.roles, clip.stratified_fold, clip.session_fold),
        *(frames, int(gaze.valid.sum()), shard, row_group),
    ]
    return dict(zip(CLIP_SCHEMA.names, values, strict=True))


def row_groups(frames: int) -> int:
    """Return the number of row groups of a clip."""
    return -(-frames // FRAMES_PER_ROW_GROUP)


def write_shard(
    uri: str,
    tables: list[pa.Table],
    records: list[dict[str, Any]],
    problems: list[Problem],
    sources: dict[str, str],
) -> None:
    """Write one shard atomically, with its clips' records, problems and source identities in the file's metadata."""
    values = {_CLIPS_KEY: records, _PROBLEMS_KEY: problems, _SOURCES_KEY: sources}
    metadata = {key: json.dumps(value).encode() for key, value in values.items()}
    sink = pa.BufferOutputStream()
    # JPEG files do not compress further, and statistics of them would only fill the footer. A damaged JPEG file often
    # decodes without an error, so pages have checksums.
    with pq.ParquetWriter(
        sink,
        FRAME_SCHEMA.with_metadata(metadata),
        compression={"rgb": "none", "flow": "none", **dict.fromkeys(FRAME_SCHEMA.names[4:], "zstd")},
        use_dictionary=["clip", "gaze_event"],
        write_statistics=["clip", "frame"],
        write_page_checksum=True,
    ) as writer:
        for table in tables:
            writer.write_table(table.cast(writer.schema), row_group_size=FRAMES_PER_ROW_GROUP)
    storage.write_bytes(uri, sink.getvalue().to_pybytes())


def read_shard_records(uri: str) -> tuple[list[dict[str, Any]], list[Problem], dict[str, str]]:
    """Read (clip records, problems, source identities) of a shard. Raises `UserError` for a damaged shard."""
    filesystem, path = storage.resolve(uri)
    try:
        metadata = pq.read_schema(path, filesystem=filesystem).metadata
        records, problems, sources = (json.loads(metadata[key]) for key in (_CLIPS_KEY, _PROBLEMS_KEY, _SOURCES_KEY))
        return records, [Problem(*problem) for problem in problems], sources
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{uri}: not a whole shard of tune_ego ({error})") from error


def closing_files(records: list[dict[str, Any]], problems: list[Problem]) -> dict[str, bytes]:
    """Return file name -> content of `clips.parquet` and `problems.parquet`."""
    return {
        CLIPS_FILE: _parquet(records, CLIP_SCHEMA),
        PROBLEMS_FILE: _parquet([problem._asdict() for problem in problems], PROBLEM_SCHEMA),
    }


def _parquet(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema), sink, write_page_checksum=True)
    return bytes(sink.getvalue().to_pybytes())


def checksum(data: bytes) -> str:
    """Return the SHA-256 of a file, as in `sha256` of `dataset.json`."""
    return hashlib.sha256(data).hexdigest()


@dataclass(frozen=True)
class Clip:
    """Label and place of a clip in the shards."""

    name: str
    label: int
    """Action class, from 0."""
    frames: int
    shard: str
    """URI of the shard."""
    row_group: int
    """First row group of the clip in its shard."""


@dataclass(frozen=True)
class Shards:
    """Opened data set."""

    root: str
    """Absolute path or URI."""
    info: dict[str, Any]
    """Content of `dataset.json`."""
    table: pa.Table
    """Content of `clips.parquet`."""

    @property
    def actions(self) -> list[str]:
        """Names of the action classes."""
        return list(self.info["actions"])

    @property
    def image_size(self) -> tuple[int, int]:
        """(width, height), pixels."""
        width, height = self.info["settings"]["image_size"]
        return width, height

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the data set's content: settings, class names in their order, and the rows of `clips.parquet`.

        It does not depend on the place of the shards, nor on the version of the package that wrote them.
        """
        names = {key: self.info[key] for key in ("actions", "verbs", "nouns")}
        content = {"settings": self.info["settings"], **names, "clips": self.table.to_pylist()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def verbs_and_nouns(self) -> ActionParts:
        """Return the verb and the first noun of each action."""
        return ActionParts(list(self.info["verb_of_action"]), list(self.info["noun_of_action"]))

    def clip_names(self, role: str, split: int) -> list[str]:
        """Return the names of the clips of a role, `train` or `test`, in an official split."""
        return [
            row["clip"]
            for row in self.table.select(["clip", f"split{split}"]).to_pylist()
            if row[f"split{split}"] == role
        ]

    def clip(self, row: dict[str, Any]) -> Clip:
        """Return the clip of a row of `clips.parquet`."""
        return Clip(row["clip"], row["action"], row["frames"], storage.join(self.root, row["shard"]), row["row_group"])

    def test(self, split: int) -> list[Clip]:
        """Return the test clips of an official split."""
        return self._select(lambda row: row[f"split{split}"] == "test", f"test clips of split {split}")

    def train(self, data: DataConfig) -> list[Clip]:
        """Return the training clips without the validation fold."""
        return self._select(lambda row: self._in_train(row, data) and not self._validates(row, data), "training clips")

    def validation(self, data: DataConfig) -> list[Clip]:
        """Return the validation clips: the training clips of the validation fold."""
        kind = f"validation clips in {data.validation} fold {data.fold} (data.fold)"
        return self._select(lambda row: self._in_train(row, data) and self._validates(row, data), kind)

    @staticmethod
    def _in_train(row: dict[str, Any], data: DataConfig) -> bool:
        return bool(row[f"split{data.split}"] == "train")

    @staticmethod
    def _validates(row: dict[str, Any], data: DataConfig) -> bool:
        match data.validation:
            case "stratified":
                column = "stratified_fold"
            case "by_session":
                column = "session_fold"
            case _:
                raise ValueError(f"no validation folds {data.validation!r}")
        return bool(row[column] == data.fold)

    def _select(self, is_selected: Callable[[dict[str, Any]], bool], kind: str) -> list[Clip]:
        """Return the selected clips. Raises `UserError`, naming their kind, where there are none."""
        rows = self.table.drop_columns(["session", "subject", "verb", "nouns"]).to_pylist()
        clips = [self.clip(row) for row in rows if is_selected(row)]
        if not clips:
            raise UserError(f"{self.root}: there are no {kind}")
        return clips


@lru_cache(maxsize=4)
def open_shards(root: str) -> Shards:
    """Open a prepared data set. Raises `UserError` if it is absent, unfinished or of another schema version."""
    try:
        info = storage.read_json(storage.join(root, DATASET_FILE))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and not isinstance(error, (FileNotFoundError, NotADirectoryError)):
            raise UserError(f"{root}: cannot be read ({storage.describe_error(error)})") from error
        raise UserError(
            f"{root}: no finished data set here (no readable dataset.json); run: tune-ego prepare"
        ) from error
    if info.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            f"{root}: shards of schema version {info.get('schema_version')}; this tune_ego reads version "
            f"{SCHEMA_VERSION}: prepare them anew"
        )
    return Shards(storage.absolute(root), info, _read_clips(storage.join(root, CLIPS_FILE), info))


def _read_clips(uri: str, info: dict[str, Any]) -> pa.Table:
    try:
        data = storage.read_bytes(uri)
        # In this thread alone: one of Arrow's may outlive Python, and end the process with 134 when it drops `data`.
        with pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True) as file:
            table = file.read(use_threads=False)
        outside = [name for name in table["shard"].unique().to_pylist() if not _SHARD_NAME.fullmatch(str(name))]
        if outside:
            raise ValueError(f"{outside[0]!r} is no name of a shard")
        table.validate(full=True)  # finds text that is not UTF-8
    except (OSError, pa.ArrowException, ValueError) as error:
        raise UserError(f"{uri}: cannot be read ({error}); run prepare again") from error
    if checksum(data) != info.get("sha256", {}).get(CLIPS_FILE, checksum(data)):  # early data sets have no checksums
        raise UserError(f"{uri}: damaged, or written with another dataset.json; run prepare again")
    return table


def describe_stray_rows(file: pq.ParquetFile, row_group: int, clip: str, first_frame: int) -> str | None:
    """Describe a row group of a shard that does not hold the frames of `clip` from `first_frame` on.

    Returns None for the right row group. Only the statistics in the file's footer are read.
    """
    if row_group >= file.metadata.num_row_groups:
        return f"there is no row group {row_group}"
    columns = file.metadata.row_group(row_group)
    names, frames = (columns.column(FRAME_SCHEMA.get_field_index(name)).statistics for name in ("clip", "frame"))
    if (names.min, names.max, frames.min) == (clip, clip, first_frame):
        return None
    return f"row group {row_group} holds frames of {names.min} from {frames.min} on"


def read_clip(shards: Shards, record: dict[str, Any]) -> pa.Table:
    """Read all frames of a clip (a row of `clips.parquet`), in their order.

    Raises:
        UserError: The frames are damaged, or the shard holds other rows in their place.
    """
    uri = storage.join(shards.root, record["shard"])
    filesystem, path = storage.resolve(uri)
    groups = range(record["row_group"], record["row_group"] + row_groups(record["frames"]))
    try:
        with pq.ParquetFile(path, filesystem=filesystem, page_checksum_verification=True) as file:
            table = file.read_row_groups([group for group in groups if group < file.metadata.num_row_groups])
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{uri}: {record['clip']} cannot be read ({error})") from error
    same_clip = table["clip"].unique().to_pylist() == [record["clip"]]
    if not same_clip or table["frame"].to_pylist() != list(range(record["frames"])):
        raise UserError(f"{uri}: the rows of {record['clip']} are not where clips.parquet says; run prepare again")
    return table
