"""`prepare`: EGTEA clips -> shards, as a Ray Data job. Each task writes a shard, or several small ones."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from tune_ego import storage
from tune_ego.cluster import ray_session
from tune_ego.console import progress, say
from tune_ego.dataset import closing, flow, shards, video
from tune_ego.dataset.annotations import AnnotatedClip, Annotations, find_clips, find_gaze, read_annotations
from tune_ego.dataset.gaze import Gaze, check_gaze_layout, no_gaze, read_gaze
from tune_ego.dataset.sources import check_missing_limit, file_identities, find_unusable_clips, length_mismatch
from tune_ego.errors import UserError, user_error_in
from tune_ego.storage import SourceFile

FRAMES_PER_SHARD = 2000
"""Most frames in a shard: about 40 MB at 320 x 240, held in memory until the shard is written."""
_FRAMES_PER_TASK = 500
"""Smallest mean number of frames in a task of Ray Data, unless jobs would idle. A task costs 0.1 s."""
_READER = "tune_ego video reader"
"""Entry of `ShardTask.sources` with the version of the code that reads videos."""
NO_USABLE_GAZE = "no frame with usable gaze"
_SETTINGS_FILE = "prepare.json"
"""Settings of an output folder; written before its first shard."""
_SMALLEST, _LARGEST = 32, 4096  # sides in pixels; DIS finds nothing to match in smaller images
_MOST_TASKS_PER_GPU = 8  # each task holds a CUDA context of about half a gigabyte


class ShardTask(NamedTuple):
    """Clips and source files of one shard."""

    shard: str
    """Path of the shard, relative to the output folder."""
    clips: list[AnnotatedClip]
    videos: list[str | None]
    """URI of each clip's video; None where there is no file."""
    gaze: list[str | None]
    """URI of each clip's gaze file; None where there is no file."""
    sources: dict[str, str]
    """File name -> identity of every video and gaze file, and the version of the code that reads videos.

    A shard is written again where one of them has changed.
    """

    @property
    def frames(self) -> int:
        """Number of frames, computed from the clips' names."""
        return sum(_named_frames(clip) for clip in self.clips)


class ShardResult(NamedTuple):
    """Rows of a shard's clips in `clips.parquet` and `problems.parquet`."""

    records: list[dict[str, Any]]
    problems: list[shards.Problem]


class Settings(NamedTuple):
    """Settings that determine the content of the shards, together with the source files."""

    image_size: tuple[int, int] = (320, 240)
    """(width, height), pixels."""
    flow: flow.FlowName = "dis"
    flow_weights: str | None = None
    """Path or URI of RAFT's weights."""
    frame_offset: int = 0
    """Frames that are added to a clip's first session frame, where its gaze is read."""
    keep_damaged: bool = False
    """Keep clips whose decoder reports damage, instead of leaving them out."""

    def absolute(self) -> Settings:
        """Return the same settings with an absolute path of the weights, for processes in other folders."""
        weights = self.flow_weights
        return self._replace(flow_weights=None if weights is None else storage.absolute(weights))

    def check(self) -> None:
        """Raise `UserError` for settings that no shard can be written with."""
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
        """Return the settings as JSON values, for storage and comparison. Weights are represented by their SHA-256."""
        values: dict[str, Any] = {
            "image_size": list(self.image_size),
            "flow": self.flow,
            "frame_offset": self.frame_offset,
            "jpeg_quality": video.JPEG_QUALITY,
        }
        if self.keep_damaged:
            values["keep_damaged"] = True
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
    """Write the shards of an EGTEA folder to `out`. Shards that an interrupted run has finished are kept.

    Args:
        egtea: Path or URI of the folder.
        out: Path or URI of the data set.
        settings: Image size, flow method and frame offset.
        allow_missing: Accept any number of clips that are absent, unreadable or of another length.
        jobs: Shards that are written at a time; by default one for each CPU of the cluster.
        address: Address of a Ray cluster; by default Ray starts on this machine.

    Returns:
        The content of `dataset.json`.

    Raises:
        UserError: Annotations or gaze files are broken, more than 5 % of the clips are absent or unreadable, or most
            are not as long as their names say.
    """
    settings = (settings or Settings()).absolute()
    settings.check()
    egtea, out = storage.absolute(egtea), storage.absolute(out)
    annotations = read_annotations(egtea)
    sessions = {clip.name.session for clip in annotations.clips}
    videos = find_clips(egtea)
    gaze = {session: file for session, file in find_gaze(egtea).items() if session in sessions}
    for file in gaze.values():
        check_gaze_layout(file.uri)
    record = settings.record()
    output_settings = {"schema_version": shards.SCHEMA_VERSION, **record, "annotations": _fingerprint(annotations)}
    _check_same_settings(out, output_settings)
    tasks = plan_shards(annotations, videos, gaze)
    finished = {task.shard: result for task in tasks if (result := _read_finished(task, out)) is not None}
    pending = [task for task in tasks if task.shard not in finished]
    pending.sort(key=lambda task: -task.frames)  # longest first: all workers end at about the same time
    if pending:
        if not allow_missing:
            left_out = [problem for result in finished.values() for problem in result.problems if not problem.kept]
            left_out += find_unusable_clips([clip for task in pending for clip in task.clips], videos)
            check_missing_limit(left_out, len(annotations.clips), egtea)
        storage.write_json(storage.join(out, _SETTINGS_FILE), output_settings)
        closing.mark_unfinished(out)
        finished_clips = sum(len(task.clips) for task in tasks if task.shard in finished)
        with ray_session(address), progress("clips", len(annotations.clips), finished_clips) as advance:
            for task, result in zip(pending, _run(pending, out, settings, jobs), strict=True):
                finished[task.shard] = result
                advance(len(task.clips))
    records = [record for result in finished.values() for record in result.records]
    problems = [problem for result in finished.values() for problem in result.problems]
    return closing.write_dataset(annotations, records, problems, record, out, allow_missing)


def plan_shards(
    annotations: Annotations, videos: dict[str, SourceFile], gaze: dict[str, SourceFile]
) -> list[ShardTask]:
    """Distribute the clips over shards. The distribution depends on the annotations only, not on the files on disk."""
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
    identity = file_identities([*videos.values(), *gaze.values()])
    return [
        _task(f"{folder}/part-{number:04d}.parquet", clips, videos, gaze, identity)
        for folder, parts in sorted(groups.items())
        for number, clips in enumerate(parts)
    ]


def _named_frames(clip: AnnotatedClip) -> int:
    return max(1, clip.name.frames)


def _task(
    shard: str,
    clips: list[AnnotatedClip],
    videos: dict[str, SourceFile],
    gaze: dict[str, SourceFile],
    identity: dict[str, str],
) -> ShardTask:
    clip_files = [videos.get(clip.name.name) for clip in clips]
    gaze_files = [gaze.get(clip.name.session) for clip in clips]
    video_uris, gaze_uris = (
        [None if file is None else file.uri for file in files] for files in (clip_files, gaze_files)
    )
    sources = {Path(file.uri).name: identity[file.uri] for file in [*clip_files, *gaze_files] if file is not None}
    sources[_READER] = video.READER_VERSION
    return ShardTask(shard, clips, video_uris, gaze_uris, sources)


def _run(tasks: list[ShardTask], out: str, settings: Settings, jobs: int | None) -> Iterator[ShardResult]:
    """Write the shards with Ray Data, and yield the results in the order of the tasks."""
    import ray.data  # late: seconds to import

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # here, because the import sets a level
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.execution_options.preserve_order = True

    # Whatever the blocks and the number of workers, each row is a shard.
    at_a_time = jobs or max(1, int(ray.cluster_resources().get("CPU", 1)))
    rows = ray.data.range(len(tasks), override_num_blocks=_block_count([task.frames for task in tasks], at_a_time))
    share = _gpu_share(settings)
    if share:  # actors: Ray starts a new process, with a CUDA context, for each task that uses a GPU
        pool = ray.data.ActorPoolStrategy(min_size=1, max_size=_most_actors(share, jobs))
        writer = (tasks, out, settings)
        dataset = rows.map(_ShardWriter, fn_constructor_args=writer, num_cpus=1, num_gpus=share, compute=pool)
    else:  # the tasks share worker processes, which cache the flow method and its weights
        dataset = rows.map(
            _ShardWriter(tasks, out, settings).__call__, num_cpus=1, compute=ray.data.TaskPoolStrategy(size=jobs)
        )
    try:
        for row in dataset.iter_rows():
            records, problems = json.loads(row["result"])
            yield ShardResult(records, [shards.Problem(*problem) for problem in problems])
    except Exception as error:
        raise user_error_in(error) or error from None


class _ShardWriter:
    """Process that writes shards one after another. It keeps the flow method, with its weights, between two shards."""

    def __init__(self, tasks: list[ShardTask], out: str, settings: Settings) -> None:
        self._tasks, self._out, self._settings = tasks, out, settings

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": json.dumps(write_task(self._tasks[int(row["id"])], self._out, self._settings))}


def _block_count(shard_frames: list[int], jobs: int) -> int:
    """Return the number of Ray Data's tasks: enough for `jobs` at a time, and no more than shards."""
    return min(len(shard_frames), max(-(-sum(shard_frames) // _FRAMES_PER_TASK), jobs))


def _most_actors(gpu_share: float, jobs: int | None) -> int:
    """Return how many processes with this share of a GPU the cluster has room for, `jobs` at most."""
    import ray

    resources = ray.cluster_resources()
    room = min(int(resources.get("CPU", 1)), int(resources.get("GPU", 0) / gpu_share + 1e-6))
    return max(1, min(jobs or room, room))


def _gpu_share(settings: Settings) -> float:
    """Return the share of a GPU that each task reserves: one task for each CPU, up to a limit for each GPU."""
    import ray

    resources = ray.cluster_resources()
    gpus, cpus = resources.get("GPU", 0), resources.get("CPU", 1)
    if not (gpus and flow.uses_gpu(settings.flow)):
        return 0
    return float(min(max(gpus / cpus, 1 / _MOST_TASKS_PER_GPU), 1))


def _read_finished(task: ShardTask, out: str) -> ShardResult | None:
    """Read the result of a shard from an earlier run; None if it must be written (again)."""
    uri = storage.join(out, task.shard)
    if not storage.exists(uri):
        return None
    try:
        records, problems, sources = shards.read_shard_records(uri)
    except UserError as error:
        say(f"{error}: writing it again")
        return None
    return ShardResult(records, problems) if sources == task.sources else None


def write_task(task: ShardTask, out: str, settings: Settings) -> ShardResult:
    """Decode, resize, compute flow, encode, and write one shard. A clip that cannot be read becomes a problem."""
    method = flow.flow_method(settings.flow, settings.flow_weights)
    tables, result, row_group = [], ShardResult([], []), 0
    for clip, uri, gaze_uri in zip(task.clips, task.videos, task.gaze):
        name = clip.name.name
        try:
            if uri is None:
                raise UserError("no mp4 of this name")
            encoded, remarks = video.encode_clip(
                uri, settings.image_size, method, clip.name.frames, keep_damaged=settings.keep_damaged
            )
        except UserError as error:
            result.problems.append(shards.Problem(name, "video", str(error), kept=False))
            continue
        frames = len(encoded.rgb)
        result.problems.extend(shards.Problem(name, *remark, kept=True) for remark in remarks)
        if reason := length_mismatch(clip, frames):
            result.problems.append(shards.Problem(name, "length", reason, kept=True))
        gaze = no_gaze(frames)
        if gaze_uri is None:
            result.problems.append(shards.Problem(name, "gaze", "no gaze file of its session", kept=True))
        else:
            session = _session_gaze(gaze_uri, task.sources[Path(gaze_uri).name])
            gaze = session.frames(clip.name.first_frame + settings.frame_offset, frames)
            if not gaze.valid.any():
                result.problems.append(shards.Problem(name, "gaze", NO_USABLE_GAZE, kept=True))
        tables.append(shards.frame_table(name, *encoded, gaze))
        result.records.append(shards.clip_record(clip, frames, gaze, task.shard, row_group))
        row_group += shards.row_groups(frames)
    shards.write_shard(storage.join(out, task.shard), tables, *result, task.sources)
    return result


@lru_cache(maxsize=8)
def _session_gaze(uri: str, identity: str) -> Gaze:
    """Read a gaze file, cached. The identity is part of the key: worker processes outlive a job, a file may change."""
    return read_gaze(uri)


def _fingerprint(annotations: Annotations) -> str:
    return hashlib.sha256(repr(annotations).encode()).hexdigest()[:16]


def _check_same_settings(out: str, settings: dict[str, Any]) -> None:
    """Raise `UserError` for an output with shards of other settings or schema version, or with other files."""
    settings_uri = storage.join(out, _SETTINGS_FILE)
    if not storage.exists(settings_uri):
        if any(not storage.is_partial(name) for name in storage.list_names(out)):
            raise UserError(f"{out}: the folder is not empty and was not written by prepare; choose another")
        return
    existing = storage.read_json(settings_uri)
    different = [
        f"{key}: {existing.get(key)!r} there, {settings.get(key)!r} now"
        for key in settings | existing
        if existing.get(key) != settings.get(key)
    ]
    if different:
        raise UserError(
            f"{out}: prepared with other settings ({'; '.join(different)}); choose another folder or delete it"
        )
