"""`prepare`: EGTEA clips -> shards, as a Ray Data job with one shard a task."""

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
from tune_ego.console import clip_progress, say
from tune_ego.dataset import closing, flow, shards, video
from tune_ego.dataset.annotations import AnnotatedClip, Annotations, find_clips, find_gaze, read_annotations
from tune_ego.dataset.gaze import Gaze, check_gaze_layout, no_gaze, read_gaze
from tune_ego.dataset.sources import check_threshold, find_unusable, identities, length_oddity
from tune_ego.errors import UserError, user_error_in
from tune_ego.storage import SourceFile

FRAMES_PER_SHARD = 2000
"""About 40 MB at 320 x 240, in memory until it is written."""
NO_USABLE_GAZE = "no frame with usable gaze"
_CLAIM_FILE = "prepare.json"
"""Which settings an output has, from its first shard on."""
_SMALLEST, _LARGEST = 32, 4096  # pixels; below, DIS has nothing to match
_MOST_TASKS_PER_GPU = 8  # each holds a CUDA context of about half a gigabyte


class ShardTask(NamedTuple):
    """What one task makes: one shard."""

    shard: str
    clips: list[AnnotatedClip]
    videos: list[str | None]
    gaze: list[str | None]
    sources: dict[str, str]
    """File name -> identity, of every video and gaze file: a shard is made anew where they changed."""

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

    def absolute(self) -> Settings:
        """The same, wherever it is read."""
        weights = self.flow_weights
        return self._replace(flow_weights=None if weights is None else storage.absolute(weights))

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
    claim = {"schema_version": shards.SCHEMA_VERSION, **record, "annotations": _fingerprint(annotations)}
    _check_claim(out, claim)
    tasks = plan(annotations, videos, gaze)
    finished = {task.shard: result for task in tasks if (result := _finished(task, out)) is not None}
    waiting = [task for task in tasks if task.shard not in finished]
    waiting.sort(key=lambda task: -task.frames)  # the longest first: then all workers end at about the same time
    if waiting:
        if not allow_missing:
            lost = [problem for result in finished.values() for problem in result.problems if not problem.kept]
            lost += find_unusable([clip for task in waiting for clip in task.clips], videos)
            check_threshold(lost, len(annotations.clips), egtea)
        storage.write_json(storage.join(out, _CLAIM_FILE), claim)
        closing.reopen(out)
        done = sum(len(task.clips) for task in tasks if task.shard in finished)
        with ray_session(address), clip_progress(len(annotations.clips), done) as advance:
            for task, result in zip(waiting, _run(waiting, out, settings, jobs)):
                finished[task.shard] = result
                advance(len(task.clips))
    records = [record for result in finished.values() for record in result.records]
    problems = [problem for result in finished.values() for problem in result.problems]
    return closing.close(annotations, records, problems, record, out, allow_missing)


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
    identity = identities([*videos.values(), *gaze.values()])
    return [
        _task(f"{folder}/part-{number:04d}.parquet", clips, videos, gaze, identity)
        for folder, parts in sorted(groups.items())
        for number, clips in enumerate(parts)
    ]


def _named_frames(clip: AnnotatedClip) -> int:
    return max(1, clip.name.last_frame - clip.name.first_frame)


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
    """A worker process outlives a job, and the file may be another in the next one."""
    return read_gaze(uri)


def _fingerprint(annotations: Annotations) -> str:
    return hashlib.sha256(repr(annotations).encode()).hexdigest()[:16]


def _check_claim(out: str, settings: dict[str, Any]) -> None:
    """Refuse to mix the shards of two settings or schema versions, or to write between other files."""
    marker = storage.join(out, _CLAIM_FILE)
    if not storage.exists(marker):
        if any(not storage.is_partial(name) for name in storage.list_names(out)):
            raise UserError(f"{out}: the folder is not empty and was not written by prepare; choose another")
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
