"""`inspect`: what is in a data set of shards, as tables, and one clip as a picture."""

from __future__ import annotations

from collections import Counter
from difflib import get_close_matches
from typing import Any

import cv2
import numpy as np

from tune_ego import storage
from tune_ego.config import MAP_SLICES, WINDOW_FRAMES
from tune_ego.console import percent, print_table, say
from tune_ego.dataset import flow
from tune_ego.dataset.annotations import FOLDS, SPLITS
from tune_ego.dataset.shards import Shards, open_shards, read_clip
from tune_ego.errors import UserError

_COLUMNS = 8  # frames of the picture
_MARGIN = 6
_LABEL_HEIGHT = 22
_MOST_WIDE = 240  # pixels of a frame in the picture
_FLOW_FULL = 8.0  # pixels of motion that are drawn in full colour
_CELLS = 7  # of the gaze target's side, as at 224 x 224


_IRREGULARITIES = {
    "placed by their times": "clips_placed_by_time",
    "turned upright": "clips_turned",
    "damaged": "clips_kept_damaged",
}
"""Line of the table -> its key in `dataset.json`."""


def show_counts(root: str) -> None:
    """Print clips and frames of a data set per split, fold, class and session."""
    shards = open_shards(root)
    rows = shards.table.to_pylist()
    info, settings = shards.info, shards.info["settings"]
    width, height = shards.image_size
    print_table(
        shards.root,
        ["", ""],
        [
            ("clips, frames", f"{info['clips']:,}, {info['frames']:,}"),
            ("images, flow", f"{width} x {height}, {settings['flow']}"),
            ("left out", f"{info['clips_left_out']:,}"),
            ("without gaze", f"{info['clips_without_gaze']:,}"),
            (f"under {WINDOW_FRAMES} frames", f"{info['clips_shorter_than_a_window']:,}"),
            ("not as long as named", f"{info['clips_of_another_length']:,}"),
            *((words, f"{info[key]:,}") for words, key in _IRREGULARITIES.items() if info.get(key)),
        ],
    )
    splits = [
        (f"{split}", *(f"{_count(rows, f'split{split}', role):,}" for role in ("train", "test"))) for split in SPLITS
    ]
    print_table("Clips per split", ["split", "train", "test"], splits)
    folds = [
        (f"{fold}", *(f"{_count(rows, column, fold):,}" for column in ("stratified_fold", "session_fold")))
        for fold in range(FOLDS)
    ]
    print_table("Clips per fold", ["fold", "stratified", "by session"], folds)
    _show_groups("Classes", "action", rows, "action", shards.actions)
    _show_groups("Sessions", "session", rows, "session", None)


def _count(rows: list[dict[str, Any]], column: str, value: Any) -> int:
    return sum(row[column] == value for row in rows)


def _show_groups(title: str, heading: str, rows: list[dict[str, Any]], column: str, names: list[str] | None) -> None:
    clips, frames, gaze = (Counter[Any]() for _ in range(3))
    for row in rows:
        clips[row[column]] += 1
        frames[row[column]] += row["frames"]
        gaze[row[column]] += row["gaze_frames"]
    order = range(len(names)) if names is not None else sorted(clips)
    table = [
        (
            names[key] if names is not None else str(key),
            *(f"{counts[key]:,}" for counts in (clips, frames)),
            percent(gaze[key] / frames[key] if frames[key] else None),
        )
        for key in order
    ]
    print_table(f"{title} ({len(table):,})", [heading, "clips", "frames", "with gaze"], table)


def draw_clip(root: str, clip: str, out: str) -> None:
    """Write a PNG of a clip: frames with the gaze point, flow as colour, and the gaze target laid over."""
    image = contact_sheet(open_shards(root), clip)
    done, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
    assert done
    storage.write_bytes(storage.absolute(out), data.tobytes())
    say(f"{out}: {image.shape[1]} x {image.shape[0]} pixels")


def contact_sheet(shards: Shards, clip: str) -> np.ndarray:
    """Draw the picture, RGB uint8: a title, and three rows with a column for each of up to 8 evenly spaced frames."""
    record = find_record(shards, clip)
    table = read_clip(shards, record)
    chosen = sorted({round(place) for place in np.linspace(0, record["frames"] - 1, _COLUMNS)})
    targets = _gaze_targets(table, record["frames"])
    columns = []
    for frame in chosen:
        row = {name: table[name][frame].as_py() for name in table.column_names}
        columns.append(_column(row, targets[frame // (WINDOW_FRAMES // 2)], frame))
    gap = np.full((columns[0].shape[0], _MARGIN, 3), 255, np.uint8)
    body = np.concatenate([part for column in columns for part in (gap, column)] + [gap], axis=1)
    action = shards.actions[record["action"]]
    title = f"{clip}   {action}   {record['frames']} frames, {record['gaze_frames']} with gaze"
    remarks = [problem for problem in shards.info["problems"] if problem["clip"] == clip]
    lines = [title, *(f"{problem['stage']}: {problem['reason']}" for problem in remarks)]
    return np.concatenate([*(label(line, body.shape[1]) for line in lines), body])


def find_record(shards: Shards, clip: str) -> dict[str, Any]:
    """Return a clip's row of `clips.parquet`. Raises `UserError`, with the nearest names, if it has no such clip."""
    record = next((row for row in shards.table.to_pylist() if row["clip"] == clip), None)
    if record is None:
        problem = next((entry for entry in shards.info["problems"] if entry["clip"] == clip), None)
        names = shards.table["clip"].to_pylist()
        parts = [name for name in names if clip and clip.lower() in name.lower()]
        near = parts[:2] or get_close_matches(clip, names, n=2, cutoff=0.0)
        reason = f"was left out: {problem['reason']}" if problem else "is not in these shards"
        hint = f"; nearest: {', '.join(near)}" if near and not problem else ""
        raise UserError(f"{shards.root}: {clip} {reason}{hint}")
    return record


def _gaze_targets(table: Any, frames: int) -> list[np.ndarray | None]:
    """Return the gaze target of each half window (8 frames), [7, 7] in (0, 1]; None without gaze."""
    import torch  # late: seconds to import, and counts do not need it

    from tune_ego.training.losses import gaze_target

    half = WINDOW_FRAMES // MAP_SLICES
    slices = -(-frames // half)
    points = np.full((slices * half, 2), np.nan, np.float32)
    valid = np.zeros(slices * half, bool)
    points[:frames] = np.stack([table[name].to_numpy(zero_copy_only=False) for name in ("gaze_x", "gaze_y")], axis=-1)
    valid[:frames] = table["gaze_valid"].to_numpy(zero_copy_only=False)
    target, has_gaze = gaze_target(
        torch.from_numpy(points)[None], torch.from_numpy(valid)[None], (slices, _CELLS, _CELLS)
    )
    return [part.numpy() if there else None for part, there in zip(target[0], has_gaze[0])]


def _column(row: dict[str, Any], target: np.ndarray | None, frame: int) -> np.ndarray:
    rgb, grey = (
        np.asarray(cv2.imdecode(np.frombuffer(row[name], np.uint8), flag))
        for name, flag in (("rgb", cv2.IMREAD_COLOR_RGB), ("flow", cv2.IMREAD_GRAYSCALE))
    )
    moved = flow.dequantise(flow.split_components(grey)).transpose(1, 2, 0)
    scale = min(1.0, _MOST_WIDE / rgb.shape[1])
    size = (round(rgb.shape[1] * scale), round(rgb.shape[0] * scale))
    first, second, third = (
        cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        for image in (rgb, flow_colours(moved), overlay(rgb, target))
    )
    text = f"frame {frame} {row['gaze_event'] or 'no gaze'}"
    if row["gaze_valid"]:
        draw_gaze(first, row["gaze_x"], row["gaze_y"])
        draw_gaze(third, row["gaze_x"], row["gaze_y"])
    gap = np.full((_MARGIN, size[0], 3), 255, np.uint8)
    return np.concatenate([label(text, size[0]), first, gap, second, gap, third, gap])


def flow_colours(field_HW2: np.ndarray) -> np.ndarray:
    """Draw flow as colour, RGB uint8 [H, W, 3]: the hue is its direction, white is no motion."""
    magnitude, angle = cv2.cartToPolar(field_HW2[..., 0], field_HW2[..., 1])
    hue = angle * (180 / (2 * np.pi)) % 180
    saturation = np.minimum(magnitude / _FLOW_FULL, 1) * 255
    image = np.stack([hue, saturation, np.full_like(hue, 255)], axis=-1).astype(np.uint8)
    return cv2.cvtColor(image, cv2.COLOR_HSV2RGB)


def overlay(rgb: np.ndarray, light_HW: np.ndarray | None) -> np.ndarray:
    """Draw the frame in grey with a map (values in [0, 1]) as light over it; grey alone if there is no map.

    Cell j of the map's W stands for the place j / W of the frame, as the gaze loss has it.
    """
    grey = np.repeat(cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)[..., None], 3, axis=-1)
    if light_HW is None:
        return grey
    height, width = rgb.shape[:2]
    rows, columns = light_HW.shape
    y, x = np.mgrid[:height, :width].astype(np.float32)
    light = cv2.remap(
        light_HW, x * columns / width, y * rows / height, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE
    )
    colours = cv2.cvtColor(cv2.applyColorMap((255 * light).astype(np.uint8), cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)
    return cv2.addWeighted(grey, 0.45, colours, 0.55, 0)


def draw_gaze(image: np.ndarray, x: float, y: float) -> None:
    centre = (round(x * image.shape[1]), round(y * image.shape[0]))
    for radius, colour in ((8, (0, 0, 0)), (6, (255, 255, 255)), (4, (230, 60, 20))):
        cv2.circle(image, centre, radius, colour, 2, cv2.LINE_AA)


def label(text: str, width: int) -> np.ndarray:
    image = np.full((_LABEL_HEIGHT, width, 3), 255, np.uint8)
    cv2.putText(image, text, (2, _LABEL_HEIGHT - 7), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (20, 20, 20), 1, cv2.LINE_AA)
    return image
