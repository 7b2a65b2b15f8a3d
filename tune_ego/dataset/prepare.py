"""`prepare`: EGTEA clips -> shards, as a Ray Data job with one shard a task."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tune_ego import __version__, storage
from tune_ego.cluster import ray_session
from tune_ego.config import WINDOW_FRAMES
from tune_ego.console import clip_progress, print_table, say
from tune_ego.dataset import flow, shards, video
from tune_ego.dataset.annotations import AnnotatedClip, Annotations, find_clips, find_gaze, read_annotations
from tune_ego.dataset.gaze import Gaze, check_gaze_layout, no_gaze, read_gaze
from tune_ego.errors import UserError, user_error_in
from tune_ego.storage import SourceFile

FRAMES_PER_SHARD = 2000
"""About 40 MB at 320 x 240, in memory until it is written."""
MISSING_LIMIT = 0.05
_SMALLEST, _LARGEST = 32, 4096  # pixels; below, DIS has nothing to match
_MOST_TASKS_PER_GPU = 8  # each holds a CUDA context of about half a gigabyte
READERS = 16  # threads that open files


class ShardTask(NamedTuple):
    """What one task makes: one shard."""

    shard: str
    clips: list[AnnotatedClip]
    videos: list[str | None]
    gaze: list[str | None]
    sources: dict[str, int]
    """File name -> bytes, of every video and gaze file: a shard is made anew where they changed."""

    @property
    def frames(self) -> int:
        """As the clips' names say."""
        return sum(_named_frames(clip) for clip in self.clips)


class ShardResult(NamedTuple):
    records: list[dict[str, Any]]
    problems: list[shards.Problem]


class Settings(NamedTuple):
    """What the content of the shards depends on, beside their sources."""

    image_size: tuple[int, int] = (320, 240)
    """(width, height), pixels."""
    flow: flow.FlowName = "dis"
    flow_weights: str | None = None
    """Path or URI of RAFT's weights."""
    frame_offset: int = 0

    def check(self) -> None:
        """Raise `UserError` for settings that no shard can be made with."""
        width, height = self.image_size
        smallest = flow.RAFT_SMALLEST_SIDE if self.flow == "raft" else _SMALLEST
        if not all(smallest <= side <= _LARGEST for side in self.image_size):
            raise UserError(
                f"--image-size {width}x{height}: with --flow {self.flow} both sides go from {smallest} to {_LARGEST}"
            )
        if (self.flow == "raft") != (self.flow_weights is not None):
            raise UserError("--flow raft needs --flow-weights FILE, and only raft takes them")
        if self.flow_weights is not None:
            flow.load_raft(self.flow_weights)

    def record(self) -> dict[str, Any]:
        """As they are written down and compared; of weights, what is in them and not where they were."""
        values: dict[str, Any] = {
            "image_size": list(self.image_size),
            "flow": self.flow,
            "frame_offset": self.frame_offset,
            "jpeg_quality": video.JPEG_QUALITY,
        }
        if self.flow_weights is not None:
            values["flow_weights"] = hashlib.sha256(storage.read_bytes(self.flow_weights)).hexdigest()[:16]
        return values


def prepare(
    egtea: str,
    out: str,
    settings: Settings | None = None,
    *,
    allow_missing: bool = False,
    jobs: int | None = None,
    address: str | None = None,
) -> dict[str, Any]:
    """Write the shards of an EGTEA folder to `out`; continues where a killed run stopped.

    Both are paths or URIs; `jobs` shards are made at a time, else one a CPU of the cluster. Returns what
    `dataset.json` holds. Raises `UserError` for broken annotations or gaze files, and where more than 5 % of the
    clips are absent or unreadable.
    """
    settings = settings or Settings()
    settings.check()
    egtea, out = storage.absolute(egtea), storage.absolute(out)
    annotations = read_annotations(egtea)
    sessions = {clip.name.session for clip in annotations.clips}
    videos = find_clips(egtea)
    gaze = {session: file for session, file in find_gaze(egtea).items() if session in sessions}
    for file in gaze.values():
        check_gaze_layout(file.uri)
    if not allow_missing:
        check_threshold(find_unusable(annotations, videos), len(annotations.clips), egtea)
    record = settings.record()
    _claim(out, {**record, "annotations": _fingerprint(annotations)})
    tasks = plan(annotations, videos, gaze)
    finished = {task.shard: result for task in tasks if (result := _finished(task, out)) is not None}
    waiting = [task for task in tasks if task.shard not in finished]
    waiting.sort(key=lambda task: -task.frames)  # the longest first: then all workers end at about the same time
    if waiting:
        done = sum(len(task.clips) for task in tasks if task.shard in finished)
        with ray_session(address), clip_progress(len(annotations.clips), done) as advance:
            for task, result in zip(waiting, _run(waiting, out, settings, jobs)):
                finished[task.shard] = result
                advance(len(task.clips))
    info = _finish(annotations, [finished[task.shard] for task in tasks], record, out, allow_missing)
    _summarise(info, out)
    return info


def plan(annotations: Annotations, videos: dict[str, SourceFile], gaze: dict[str, SourceFile]) -> list[ShardTask]:
    """Which clips go into which shard: the same for the same annotations, whatever is on disk."""
    groups: dict[str, list[list[AnnotatedClip]]] = {}
    sizes: dict[str, int] = {}
    for clip in annotations.clips:
        folder = shards.shard_folder(clip)
        frames = _named_frames(clip)
        if folder not in groups or sizes[folder] + frames > FRAMES_PER_SHARD:
            groups.setdefault(folder, []).append([])
            sizes[folder] = 0
        groups[folder][-1].append(clip)
        sizes[folder] += frames
    return [
        _task(f"{folder}/part-{number:04d}.parquet", clips, videos, gaze)
        for folder, parts in sorted(groups.items())
        for number, clips in enumerate(parts)
    ]


def _named_frames(clip: AnnotatedClip) -> int:
    return max(1, clip.name.last_frame - clip.name.first_frame)


def _task(
    shard: str, clips: list[AnnotatedClip], videos: dict[str, SourceFile], gaze: dict[str, SourceFile]
) -> ShardTask:
    clip_files = [videos.get(clip.name.name) for clip in clips]
    gaze_files = [gaze.get(clip.name.session) for clip in clips]
    video_uris, gaze_uris = (
        [None if file is None else file.uri for file in files] for files in (clip_files, gaze_files)
    )
    sources = {Path(file.uri).name: file.bytes for file in [*clip_files, *gaze_files] if file is not None}
    return ShardTask(shard, clips, video_uris, gaze_uris, sources)


def _run(tasks: list[ShardTask], out: str, settings: Settings, jobs: int | None) -> Iterator[ShardResult]:
    """The result of every task, in their order."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # its import has set a level of its own
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = True

    def work(row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(write_task(tasks[int(row["id"])], out, settings))}

    # Always one task a shard: the number of workers changes nothing in what is written. Tasks of one kind run in the
    # same processes, which keep a flow method and its weights.
    dataset = ray.data.range(len(tasks), override_num_blocks=len(tasks)).map(
        work, num_cpus=1, num_gpus=_gpu_share(settings), compute=ray.data.TaskPoolStrategy(size=jobs)
    )
    try:
        for row in dataset.iter_rows():
            records, problems = json.loads(row["result"])
            yield ShardResult(records, [shards.Problem(*problem) for problem in problems])
    except Exception as error:
        raise user_error_in(error) or error from None


def _gpu_share(settings: Settings) -> float:
    """What of a GPU each task reserves: as many share one as there are CPUs for it, up to a limit."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 1)
    if not (gpus and flow.uses_gpu(settings.flow)):
        return 0
    return float(min(max(gpus / cpus, 1 / _MOST_TASKS_PER_GPU), 1))


def _finished(task: ShardTask, out: str) -> ShardResult | None:
    """What an earlier run wrote for this task; None where it has to be done (again)."""
    uri = storage.join(out, task.shard)
    if not storage.exists(uri):
        return None
    try:
        records, problems, sources = shards.read_shard_records(uri)
    except UserError as error:
        say(f"{error}: made anew")
        return None
    return ShardResult(records, problems) if sources == task.sources else None


def write_task(task: ShardTask, out: str, settings: Settings) -> ShardResult:
    """Decode, resize, compute flow, encode, and write one shard; a clip that fails becomes a problem."""
    method = flow.flow_method(settings.flow, settings.flow_weights)
    tables, result, row_group = [], ShardResult([], []), 0
    for clip, uri, gaze_uri in zip(task.clips, task.videos, task.gaze):
        name = clip.name.name
        try:
            if uri is None:
                raise UserError("no mp4 of this name")
            encoded = video.encode_clip(uri, settings.image_size, method)
        except UserError as error:
            result.problems.append(shards.Problem(name, "video", str(error), kept=False))
            continue
        frames = len(encoded.rgb)
        if reason := length_oddity(clip, frames):
            result.problems.append(shards.Problem(name, "length", reason, kept=True))
        gaze = no_gaze(frames)
        if gaze_uri is None:
            result.problems.append(shards.Problem(name, "gaze", "no gaze file of its session", kept=True))
        else:
            gaze = _session_gaze(gaze_uri).frames(clip.name.first_frame + settings.frame_offset, frames)
            if not gaze.valid.any():
                result.problems.append(shards.Problem(name, "gaze", "no frame with usable gaze", kept=True))
        tables.append(shards.frame_table(name, *encoded, gaze))
        result.records.append(shards.clip_record(clip, frames, gaze, task.shard, row_group))
        row_group += shards.row_groups(frames)
    shards.write_shard(storage.join(out, task.shard), tables, *result, task.sources)
    return result


def length_oddity(clip: AnnotatedClip, frames: int) -> str | None:
    """What is odd about a clip's number of frames, if anything: its name says how many there should be."""
    named = clip.name.last_frame - clip.name.first_frame
    return None if frames == named else f"{frames} frames, its name says {named}"


@lru_cache(maxsize=8)
def _session_gaze(uri: str) -> Gaze:
    return read_gaze(uri)


def find_unusable(annotations: Annotations, videos: dict[str, SourceFile]) -> list[shards.Problem]:
    """Clips whose video is absent or cannot be opened, found without reading the rest of it."""

    def look(clip: AnnotatedClip) -> shards.Problem | None:
        file = videos.get(clip.name.name)
        try:
            if file is None:
                raise UserError("no mp4 of this name")
            video.check_opens(file.uri)
        except UserError as error:
            return shards.Problem(clip.name.name, "video", str(error), kept=False)
        return None

    with ThreadPoolExecutor(READERS) as pool:
        return [problem for problem in pool.map(look, annotations.clips) if problem is not None]


def check_threshold(unusable: list[shards.Problem], clips: int, where: str) -> None:
    if len(unusable) > MISSING_LIMIT * clips:
        first = unusable[0]
        raise UserError(
            f"{where}: {len(unusable)} of {clips} clips cannot be used, first {first.clip}: {first.reason}. "
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
    """Write `clips.parquet`, `problems.parquet` and, last, `dataset.json`, which makes the data set readable."""
    records = sorted((record for result in results for record in result.records), key=lambda record: record["clip"])
    problems = sorted(problem for result in results for problem in result.problems)
    left_out = [problem for problem in problems if not problem.kept]
    if not allow_missing:
        check_threshold(left_out, len(annotations.clips), out)
    if not records:
        raise UserError(f"{out}: not one clip could be read")
    info = {
        "schema_version": shards.SCHEMA_VERSION,
        "written_by": f"tune_ego {__version__}",
        "settings": settings,
        "actions": annotations.actions,
        "verbs": annotations.verbs,
        "nouns": annotations.nouns,
        **_parts_of_actions(annotations),
        "clips": len(records),
        "frames": sum(record["frames"] for record in records),
        "clips_left_out": len(left_out),
        "clips_without_gaze": sum(record["gaze_frames"] == 0 for record in records),
        "clips_shorter_than_a_window": sum(record["frames"] < WINDOW_FRAMES for record in records),
        "clips_of_another_length": sum(problem.stage == "length" for problem in problems),
        "flow_fields_repeated": len(records),
        "problems": [problem._asdict() for problem in problems],
    }
    marker = storage.join(out, "dataset.json")
    try:
        unchanged = storage.read_json(marker) == info
    except (OSError, UserError):  # not there yet, or damaged
        unchanged = False
    if not unchanged:
        storage.remove(marker)
        shards.write_clips(out, records)
        shards.write_problems(out, problems)
        storage.write_json(marker, info)
    storage.remove_partial(out)
    return info


def _parts_of_actions(annotations: Annotations) -> dict[str, list[int]]:
    """The verb and the first noun of each action, from 0, as its clips have them; -1 for one without clips."""
    verbs, nouns = ([-1] * len(annotations.actions) for _ in range(2))
    for clip in annotations.clips:
        verbs[clip.action - 1], nouns[clip.action - 1] = clip.verb - 1, clip.nouns[0] - 1
    return {"verb_of_action": verbs, "noun_of_action": nouns}


def _summarise(info: dict[str, Any], out: str) -> None:
    rows = [
        ("clips kept", f"{info['clips']:,} ({info['frames']:,} frames)"),
        ("of these without gaze", f"{info['clips_without_gaze']:,}"),
        (f"of these under {WINDOW_FRAMES} frames (padded)", f"{info['clips_shorter_than_a_window']:,}"),
        ("of these not as long as named", f"{info['clips_of_another_length']:,}"),
        ("left out", f"{info['clips_left_out']:,}"),
    ]
    left_out = [problem for problem in info["problems"] if not problem["kept"]]
    rows += [(f"  {problem['clip']}", problem["reason"]) for problem in left_out[:20]]
    if len(left_out) > 20:
        rows.append(("  ...", "all of them: problems.parquet"))
    print_table(f"Shards in {out}", ["", ""], rows)
