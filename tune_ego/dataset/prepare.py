"""`prepare`: EGTEA clips -> shards, as a Ray Data job with one shard a task."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import av
import cv2
import numpy as np

from tune_ego import __version__, storage
from tune_ego.cluster import ray_session
from tune_ego.config import WINDOW_FRAMES
from tune_ego.console import clip_progress, print_table, say
from tune_ego.dataset import flow, shards
from tune_ego.dataset.annotations import AnnotatedClip, Annotations, find_clips, find_gaze, read_annotations
from tune_ego.dataset.gaze import Gaze, check_gaze_layout, no_gaze, read_gaze
from tune_ego.errors import UserError, user_error_in

FRAMES_PER_SHARD = 2000
"""About 40 MB at 320 x 240."""
JPEG_QUALITY = 90
MISSING_LIMIT = 0.05
_SMALLEST, _LARGEST = 32, 4096  # pixels; below, DIS has nothing to match


class ShardTask(NamedTuple):
    """What one task makes: one shard."""

    shard: str
    clips: list[AnnotatedClip]
    videos: list[str | None]
    gaze: list[str | None]


class ShardResult(NamedTuple):
    records: list[dict[str, Any]]
    problems: list[dict[str, str]]


def prepare(
    egtea: str,
    out: str,
    *,
    image_size: tuple[int, int] = (320, 240),
    frame_offset: int = 0,
    allow_missing: bool = False,
    address: str | None = None,
) -> dict[str, Any]:
    """Write the shards of an EGTEA folder to `out`; continues where a killed run stopped.

    `image_size` is (width, height). Returns what `dataset.json` holds. Raises `UserError` for broken
    annotations or gaze files, and where more than 5 % of the clips are absent or unreadable.
    """
    if not all(_SMALLEST <= side <= _LARGEST for side in image_size):
        raise UserError(f"--image-size {image_size[0]}x{image_size[1]}: both sides go from {_SMALLEST} to {_LARGEST}")
    annotations = read_annotations(egtea)
    sessions = {clip.name.session for clip in annotations.clips}
    videos = find_clips(egtea)
    gaze = {session: path for session, path in find_gaze(egtea).items() if session in sessions}
    for path in gaze.values():
        check_gaze_layout(path)
    problems = _probe(annotations, videos)
    if not allow_missing:
        _check_threshold(problems, len(annotations.clips), egtea)
    settings = {
        "image_size": list(image_size),
        "flow": "dis",
        "frame_offset": frame_offset,
        "jpeg_quality": JPEG_QUALITY,
    }
    out = storage.absolute(out)
    _claim(out, {**settings, "annotations": _fingerprint(annotations)})
    tasks = plan(annotations, videos, gaze)
    if address:
        say(f"Preparing {len(annotations.clips):,} clips in {len(tasks):,} shards on {address}")
    results = []
    with ray_session(address), clip_progress(len(annotations.clips)) as advance:
        for count, result in _run(tasks, out, settings):
            results.append(result)
            advance(count)
    info = _finish(annotations, results, settings, out, allow_missing)
    _summarise(info, out)
    return info


def plan(annotations: Annotations, videos: dict[str, Path], gaze: dict[str, Path]) -> list[ShardTask]:
    """Which clips go into which shard: the same for the same annotations, whatever is on disk."""
    groups: dict[str, list[list[AnnotatedClip]]] = {}
    sizes: dict[str, int] = {}
    for clip in annotations.clips:
        folder = shards.shard_folder(clip)
        frames = max(1, clip.name.last_frame - clip.name.first_frame)
        if folder not in groups or sizes[folder] + frames > FRAMES_PER_SHARD:
            groups.setdefault(folder, []).append([])
            sizes[folder] = 0
        groups[folder][-1].append(clip)
        sizes[folder] += frames
    return [
        ShardTask(
            f"{folder}/part-{number:04d}.parquet",
            clips,
            [_text(videos.get(clip.name.name)) for clip in clips],
            [_text(gaze.get(clip.name.session)) for clip in clips],
        )
        for folder, parts in sorted(groups.items())
        for number, clips in enumerate(parts)
    ]


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.resolve())


def _run(tasks: list[ShardTask], out: str, settings: dict[str, Any]) -> Iterator[tuple[int, ShardResult]]:
    """(clips, result) of every task, in the order they finish."""
    waiting = []
    for task in tasks:
        done = _finished(task, out)
        if done is None:
            waiting.append(task)
        else:
            yield len(task.clips), done
    if not waiting:
        return
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True

    def work(row: dict[str, Any]) -> dict[str, Any]:
        task = waiting[int(row["id"])]
        return {"clips": len(task.clips), "result": json.dumps(write_task(task, out, settings))}

    # Always one task a shard: the number of workers changes nothing in what is written.
    dataset = ray.data.range(len(waiting), override_num_blocks=len(waiting)).map(work, num_cpus=1)
    try:
        for row in dataset.iter_rows():
            yield row["clips"], ShardResult(*json.loads(row["result"]))
    except Exception as error:
        raise user_error_in(error) or error from None


def _finished(task: ShardTask, out: str) -> ShardResult | None:
    """What an earlier run wrote for this task; None where it has to be done (again)."""
    uri = storage.join(out, task.shard)
    if not storage.exists(uri):
        return None
    records, problems, gaze_sizes = shards.read_shard_records(uri)
    result = ShardResult(records, problems)
    if gaze_sizes != _gaze_sizes(task):
        return None
    present = {clip.name.name for clip, video in zip(task.clips, task.videos) if video is not None}
    return None if any(problem["clip"] in present for problem in result.problems) else result


def write_task(task: ShardTask, out: str, settings: dict[str, Any]) -> ShardResult:
    """Decode, resize, compute flow, encode, and write one shard; a clip that fails becomes a problem."""
    tables, result, row_group = [], ShardResult([], []), 0
    for clip, video, gaze_path in zip(task.clips, task.videos, task.gaze):
        name = clip.name.name
        try:
            if video is None:
                raise UserError("no mp4 of this name")
            rgb, fields = encode_clip(video, tuple(settings["image_size"]))
        except (UserError, av.error.FFmpegError, OSError) as error:
            result.problems.append({"clip": name, "stage": "video", "reason": _one_line(error)})
            continue
        gaze = no_gaze(len(rgb))
        if gaze_path is not None:
            gaze = _session_gaze(gaze_path).frames(clip.name.first_frame + settings["frame_offset"], len(rgb))
        tables.append(shards.frame_table(name, rgb, fields, gaze))
        result.records.append(shards.clip_record(clip, len(rgb), gaze, task.shard, row_group))
        row_group += shards.row_groups(len(rgb))
    shards.write_shard(storage.join(out, task.shard), tables, *result, _gaze_sizes(task))
    return result


def _gaze_sizes(task: ShardTask) -> dict[str, int]:
    """Gaze file -> bytes: a shard is made anew where they changed, or were added."""
    return {Path(path).name: Path(path).stat().st_size for path in task.gaze if path is not None}


@lru_cache(maxsize=8)
def _session_gaze(path: str) -> Gaze:
    return read_gaze(path)


def encode_clip(video: str, image_size: tuple[int, int]) -> tuple[list[bytes], list[bytes]]:
    """(frames, flow) of a video as JPEG files, one a frame each; the last flow field is repeated."""
    cv2.setNumThreads(1)  # the job runs a task per core
    method = flow.dis()
    rgb, fields, before = [], [], None
    for frame in _decode(video, image_size):
        rgb.append(_jpeg(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR)))
        grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
        if before is not None:
            fields.append(_jpeg(flow.quantise(method(before, grey))))
        before = grey
    if before is None:
        raise UserError("the video holds no frame")
    fields.append(fields[-1] if fields else _jpeg(flow.quantise(np.zeros((*before.shape, 2), np.float32))))
    return rgb, fields


def _decode(video: str, image_size: tuple[int, int]) -> Iterator[np.ndarray]:
    """RGB frames, uint8 [H, W, 3], resized."""
    with av.open(video) as container:
        if not container.streams.video:
            raise UserError("the file holds no video stream")
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="rgb24")
            if image.shape[1::-1] != image_size:
                shrinks = image.shape[1] >= image_size[0]
                image = cv2.resize(image, image_size, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
            yield image


def _jpeg(image: np.ndarray) -> bytes:
    done, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    assert done
    return data.tobytes()


def _probe(annotations: Annotations, videos: dict[str, Path]) -> list[dict[str, str]]:
    """Clips whose video is absent or cannot be opened, found before anything is written."""
    problems = []
    for clip in annotations.clips:
        path = videos.get(clip.name.name)
        reason = "no mp4 of this name" if path is None else _open_fault(path)
        if reason:
            problems.append({"clip": clip.name.name, "stage": "video", "reason": reason})
    return problems


def _open_fault(path: Path) -> str | None:
    try:
        with av.open(str(path)) as container:
            return None if container.streams.video else "the file holds no video stream"
    except (av.error.FFmpegError, OSError) as error:
        return _one_line(error)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _check_threshold(problems: list[dict[str, str]], clips: int, egtea: str) -> None:
    if len(problems) > MISSING_LIMIT * clips:
        first = problems[0]
        raise UserError(
            f"{egtea}: {len(problems)} of {clips} clips cannot be used, first {first['clip']}: {first['reason']}. "
            f"That is over {MISSING_LIMIT:.0%}; to go on without them: --allow-missing"
        )


def _fingerprint(annotations: Annotations) -> str:
    return hashlib.sha256(repr(annotations).encode()).hexdigest()[:16]


def _claim(out: str, settings: dict[str, Any]) -> None:
    """Note the settings of this output, or refuse to mix two of them."""
    marker = storage.join(out, "prepare.json")
    if not storage.exists(marker):
        if storage.list_names(out):
            raise UserError(f"{out}: the folder is not empty and was not written by prepare; choose another")
        storage.write_json(marker, settings)
        return
    before = storage.read_json(marker)
    different = [
        f"{key}: {before.get(key)!r} there, {value!r} now"
        for key, value in settings.items()
        if before.get(key) != value
    ]
    if different:
        raise UserError(
            f"{out}: prepared with other settings ({'; '.join(different)}); choose another folder or delete it"
        )


def _finish(
    annotations: Annotations, results: list[ShardResult], settings: dict[str, Any], out: str, allow_missing: bool
) -> dict[str, Any]:
    """Write `clips.parquet` and, last, `dataset.json`, which makes the data set readable."""
    records = [record for result in results for record in result.records]
    problems = sorted((p for result in results for p in result.problems), key=lambda problem: problem["clip"])
    if not allow_missing:
        _check_threshold(problems, len(annotations.clips), out)
    if not records:
        raise UserError(f"{out}: not one clip could be read")
    shards.write_clips(out, records)
    info = {
        "schema_version": shards.SCHEMA_VERSION,
        "written_by": f"tune_ego {__version__}",
        "settings": settings,
        "actions": annotations.actions,
        "verbs": annotations.verbs,
        "nouns": annotations.nouns,
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "clips_without_gaze": sum(record["gaze_frames"] == 0 for record in records),
        "clips_shorter_than_a_window": sum(record["frames"] < WINDOW_FRAMES for record in records),
        "left_out": problems,
    }
    storage.write_json(storage.join(out, "dataset.json"), info)
    return info


def _summarise(info: dict[str, Any], out: str) -> None:
    rows = [
        ("clips kept", f"{info['clips']:,} ({info['frames']:,} frames)"),
        ("of these without gaze", f"{info['clips_without_gaze']:,}"),
        ("of these under 16 frames (padded)", f"{info['clips_shorter_than_a_window']:,}"),
        ("left out", f"{len(info['left_out']):,}"),
    ]
    rows += [(f"  {problem['clip']}", problem["reason"]) for problem in info["left_out"][:20]]
    if len(info["left_out"]) > 20:
        rows.append(("  ...", "all of them: dataset.json"))
    print_table(f"Shards in {out}", ["", ""], rows)
