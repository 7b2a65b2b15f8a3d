"""A made-up data set of ten clips in seven shards, written in milliseconds, without videos, `prepare` or Ray.

The fixture `handmade_shards` writes it once. Its images say which pixel of which frame of which clip they show, and
survive JPEG: flow exactly, RGB within two levels. Everything that the feed reads can so be compared with `rgb_image`,
`flow_image` and `gaze_pixel`, which share no code with the package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import simplejpeg

from tune_ego import storage
from tune_ego.dataset import shards
from tune_ego.dataset.gaze import Gaze

WIDTH, HEIGHT = 48, 40
RGB_TOLERANCE = 2
"""Levels by which a decoded RGB image may differ from `rgb_image`."""
ACTIONS = ["Take bowl", "Put bowl", "Take cup,bowl", "Put knife"]
VERBS, NOUNS = ["Take", "Put"], ["bowl", "cup", "knife"]
VERB_OF_ACTION, NOUN_OF_ACTION = [0, 1, 0, 1], [0, 0, 1, 2]
NOUNS_OF_ACTION = [[0], [0], [1, 0], [2]]
WITHOUT_GAZE = 8
"""Index of the clip that has no gaze at all."""


class HandmadeClip(NamedTuple):
    name: str
    action: int
    """From 0."""
    roles: tuple[str, str, str]
    """In the official splits 1, 2, 3."""
    stratified_fold: int
    session_fold: int
    frames: int
    gaze_frames: int
    """Frames with a valid gaze point: all but 4, 9, 14, ..."""
    shard: int
    """Index in `SHARDS`."""
    row_group: int
    """Its first row group there; one holds 16 frames."""

    @property
    def session(self) -> str:
        return "-".join(self.name.split("-")[:3])


SHARDS = [
    "frames/roles=train-train-test/stratified_fold=0/session_fold=0/part-0000.parquet",
    "frames/roles=train-train-test/stratified_fold=1/session_fold=0/part-0000.parquet",
    "frames/roles=train-train-test/stratified_fold=0/session_fold=1/part-0000.parquet",
    "frames/roles=train-test-train/stratified_fold=1/session_fold=1/part-0000.parquet",
    "frames/roles=test-train-train/stratified_fold=0/session_fold=1/part-0000.parquet",
    "frames/roles=test-none-train/stratified_fold=1/session_fold=2/part-0000.parquet",
    "frames/roles=train-train-test/stratified_fold=1/session_fold=2/part-0000.parquet",
]
_KNOWN, _SECOND = ("train", "train", "test"), ("train", "test", "train")
CLIPS = [  # in the order of their names, as in clips.parquet
    HandmadeClip("OP01-R01-Pizza-1000-1708-F000024-F000041", 0, _KNOWN, 0, 0, 17, 14, 0, 0),
    HandmadeClip("OP01-R01-Pizza-2000-2208-F000048-F000053", 1, _KNOWN, 0, 0, 5, 4, 0, 2),
    HandmadeClip("OP01-R01-Pizza-3000-4458-F000072-F000107", 2, _KNOWN, 1, 0, 35, 28, 1, 0),
    HandmadeClip("OP01-R01-Pizza-5000-5667-F000120-F000136", 0, _KNOWN, 1, 0, 16, 13, 1, 3),
    HandmadeClip("OP02-R03-Pasta-1000-2000-F000024-F000048", 1, _KNOWN, 0, 1, 24, 20, 2, 0),
    HandmadeClip("OP02-R03-Pasta-3000-4375-F000072-F000105", 2, _SECOND, 1, 1, 33, 27, 3, 0),
    HandmadeClip("OP02-R03-Pasta-5000-5417-F000120-F000130", 3, ("test", "train", "train"), 0, 1, 10, 8, 4, 0),
    HandmadeClip("P01-R02-Bread-1000-1833-F000024-F000044", 0, ("test", "", "train"), 1, 2, 20, 16, 5, 0),
    HandmadeClip("P01-R02-Bread-3000-3375-F000072-F000081", 3, _KNOWN, 1, 2, 9, 0, 6, 0),
    HandmadeClip("P01-R02-Bread-5000-6292-F000120-F000151", 1, _KNOWN, 1, 2, 31, 25, 6, 1),
]


def rgb_image(clip: int, frame: int) -> np.ndarray:
    """RGB of a frame, uint8 [H, W, 3]: red grows with the frame, green with the clip, all with 8 x 8 pixel blocks."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    block = 4 * (x // 8) + 24 * (y // 8)
    return np.stack([block + 4 * frame, block + 12 * clip, block + 64], axis=-1).astype(np.uint8)


def flow_image(clip: int, frame: int) -> np.ndarray:
    """Flow of a frame, uint8 [2, H, W], x before y."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    block = 4 * (x // 8) + 2 * (y // 8)
    return np.stack([block + 3 * frame, block + 9 * clip + frame + 100]).astype(np.uint8)


def gaze_pixel(clip: int, frame: int) -> tuple[float, float] | None:
    """Gaze point of a frame in pixels of the whole image (x, y); None where it is not valid."""
    return None if clip == WITHOUT_GAZE or frame % 5 == 4 else (6.0 + frame, 9.0 + 2 * clip + frame % 3)


def write_handmade(root: Path) -> str:
    """Write the data set to a folder; its path."""
    records = [_record(clip) for clip in CLIPS]
    for number, shard in enumerate(SHARDS):
        members = [index for index, clip in enumerate(CLIPS) if clip.shard == number]
        tables = [_frames(index) for index in members]
        shards.write_shard(str(root / shard), tables, [records[index] for index in members], [], {})
    files = shards.closing_files(records, [])
    for name, content in files.items():
        (root / name).write_bytes(content)
    info = {
        "schema_version": 2,
        "written_by": "tests.handmade",
        "settings": {"image_size": [WIDTH, HEIGHT], "flow": "dis", "flow_weights": None, "frame_offset": 0},
        "actions": ACTIONS,
        "verbs": VERBS,
        "nouns": NOUNS,
        "verb_of_action": VERB_OF_ACTION,
        "noun_of_action": NOUN_OF_ACTION,
        "clips": 10,
        "frames": 200,
        "clips_left_out": 0,
        "clips_without_gaze": 1,
        "clips_shorter_than_a_window": 3,
        "clips_of_another_length": 0,
        "flow_fields_repeated": 10,
        "problems": [],
        "sha256": {name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    }
    storage.write_json(root / "dataset.json", info)
    return str(root)


def _record(clip: HandmadeClip) -> dict[str, Any]:
    split1, split2, split3 = clip.roles
    return {
        "clip": clip.name,
        "session": clip.session,
        "subject": clip.name.split("-")[0],
        "action": clip.action,
        "verb": VERB_OF_ACTION[clip.action],
        "nouns": NOUNS_OF_ACTION[clip.action],
        "split1": split1,
        "split2": split2,
        "split3": split3,
        "stratified_fold": clip.stratified_fold,
        "session_fold": clip.session_fold,
        "frames": clip.frames,
        "gaze_frames": clip.gaze_frames,
        "shard": SHARDS[clip.shard],
        "row_group": clip.row_group,
    }


def _frames(index: int) -> Any:
    count = CLIPS[index].frames
    points = [gaze_pixel(index, frame) for frame in range(count)]
    gaze = Gaze(
        x=np.array([np.nan if point is None else point[0] / WIDTH for point in points], np.float32),
        y=np.array([np.nan if point is None else point[1] / HEIGHT for point in points], np.float32),
        valid=np.array([point is not None for point in points]),
        event=np.array(["Blink" if point is None else "Fixation" for point in points]),
    )
    rgb = [_jpeg(rgb_image(index, frame), "RGB") for frame in range(count)]
    flow = [_jpeg(flow_image(index, frame).reshape(2 * HEIGHT, WIDTH, 1), "GRAY") for frame in range(count)]
    return shards.frame_table(CLIPS[index].name, rgb, flow, gaze)


def _jpeg(image: np.ndarray, colours: str) -> bytes:
    subsampling = "Gray" if colours == "GRAY" else "444"
    return bytes(simplejpeg.encode_jpeg(image, quality=100, colorspace=colours, colorsubsampling=subsampling))
