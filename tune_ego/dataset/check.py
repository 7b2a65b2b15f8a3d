"""`prepare --check`: read a whole EGTEA folder without writing, and report its content and its faults."""

from __future__ import annotations

import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tune_ego import storage
from tune_ego.config import WINDOW_FRAMES
from tune_ego.console import percent, print_table, progress, say
from tune_ego.dataset import flow, video
from tune_ego.dataset.annotations import (
    AnnotatedClip,
    Annotations,
    find_clips,
    find_duplicate_clips,
    find_gaze,
    parse_clip_name,
    read_annotations,
)
from tune_ego.dataset.gaze import Gaze, no_gaze, read_gaze
from tune_ego.dataset.prepare import NO_USABLE_GAZE, Settings
from tune_ego.dataset.shards import Problem
from tune_ego.dataset.sources import READERS, check_missing_limit, describe_lengths, length_mismatch
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

_SAMPLED_CLIPS = 3
"""Clips that are encoded for the estimate."""
_SAMPLED_SECONDS = 20.0
"""Time limit of the estimate, seconds."""
_SHOWN = 10
"""Largest number of problems that are printed for each stage."""
_POOR_COVERAGE = 0.5
"""Share of a session's frames with gaze below which the session is reported."""


class Estimate(NamedTuple):
    """Cost of preparing a folder."""

    core_seconds: float
    """Time on one core of this machine, together with its GPU where the flow method uses it."""
    bytes: float
    """Size of the shards."""


class CheckResult(NamedTuple):
    """Facts and problems of an EGTEA folder."""

    facts: dict[str, Any]
    """Printed label -> value."""
    problems: list[Problem]
    """Problems that `prepare` would record, and stages `annotation` and `gaze` for whole files."""
    estimate: Estimate | None
    """None where no clip can be used."""


def check(egtea: str, settings: Settings, out: str | None = None, *, allow_missing: bool = False) -> CheckResult:
    """Print and return the facts and problems of an EGTEA folder.

    Every video is read to its end and its first frame decoded; every gaze file is parsed. Damage inside later frames is
    found by `prepare` alone, which decodes them.

    Args:
        egtea: Path or URI of the folder.
        settings: Settings that `prepare` would get.
        out: Path or URI where the shards would go; its free space is printed.
        allow_missing: Whether `prepare` would get `--allow-missing`.

    Raises:
        UserError: `prepare` would refuse the folder. The table is printed before.
    """
    settings.check()
    egtea = storage.absolute(egtea)
    annotations = read_annotations(egtea)
    videos = find_clips(egtea)
    facts, problems = _look_at_videos(annotations, videos, settings)
    problems += [
        Problem(name, "annotation", f"{len(files)} mp4 have this name; {videos[name].uri} is used", kept=True)
        for name, files in find_duplicate_clips(egtea).items()
    ]
    gaze_facts, gaze_problems, broken = _look_at_gaze(annotations, find_gaze(egtea), facts, settings.frame_offset)
    usable = [clip for clip in annotations.clips if clip.name.name in facts]
    estimate = _estimate(usable, videos, facts, settings) if usable else None
    annotated_names = {clip.name.name for clip in annotations.clips}
    folder_facts = {
        "clips annotated": len(annotations.clips),
        "clips usable": len(usable),
        "frames": sum(fact.frames for fact in facts.values()),
        f"clips under {WINDOW_FRAMES} frames": sum(fact.frames < WINDOW_FRAMES for fact in facts.values()),
        "videos without annotation": len(videos.keys() - annotated_names),
        "bytes of video": sum(videos[name].bytes for name in facts),
        "sizes": Counter(f"{fact.size[0]}x{fact.size[1]}" for fact in facts.values()),
        **gaze_facts,
    }
    result = CheckResult(folder_facts, problems + gaze_problems, estimate)
    frames = {name: fact.frames for name, fact in facts.items()}
    refusal = _refusal(egtea, annotations, result, frames, broken, allow_missing)
    _print_result(egtea, result, settings, out, ready=refusal is None)
    if refusal is not None:
        raise refusal
    return result


def _refusal(
    egtea: str,
    annotations: Annotations,
    result: CheckResult,
    frames: dict[str, int],
    broken: list[str],
    allow_missing: bool,
) -> UserError | None:
    """Return the error with which `prepare` would refuse the folder; None if it would not.

    `frames` is clip name -> session frames of the usable clips, `broken` the gaze files that cannot be used.
    """
    if broken:
        return UserError(f"{len(broken)} gaze files cannot be used, first {broken[0]}")
    if not allow_missing:
        try:
            check_missing_limit([one for one in result.problems if not one.kept], len(annotations.clips), egtea)
        except UserError as error:
            return error
        if lengths := describe_lengths(annotations.clips, frames):
            return UserError(f"{egtea}: {lengths}")
    return None if frames else UserError(f"{egtea}: not one clip could be read")


def _look_at_videos(
    annotations: Annotations, videos: dict[str, SourceFile], settings: Settings
) -> tuple[dict[str, video.VideoFacts], list[Problem]]:
    """Return (clip name -> facts of the video, for usable clips; problems)."""

    def probe_clip(clip: AnnotatedClip) -> video.VideoFacts | str:
        file = videos.get(clip.name.name)
        if file is None:
            return "no mp4 of this name"
        try:
            video_facts = video.probe(file.uri, clip.name.frames, keep_damaged=settings.keep_damaged)
        except UserError as error:
            return str(error)
        return video_facts if video_facts.frames else "the video holds no frame"

    facts: dict[str, video.VideoFacts] = {}
    problems = []
    with ThreadPoolExecutor(READERS) as pool, progress("clips", len(annotations.clips)) as advance:
        for clip, facts_or_reason in zip(annotations.clips, pool.map(probe_clip, annotations.clips)):
            name = clip.name.name
            if isinstance(facts_or_reason, str):
                problems.append(Problem(name, "video", facts_or_reason, kept=False))
            else:
                facts[name] = facts_or_reason
                problems += [Problem(name, *remark, kept=True) for remark in facts_or_reason.remarks]
                if reason := length_mismatch(clip, facts_or_reason.frames):
                    problems.append(Problem(name, "length", reason, kept=True))
            advance(1)
    return facts, problems


def _look_at_gaze(
    annotations: Annotations, files: dict[str, SourceFile], facts: dict[str, video.VideoFacts], frame_offset: int
) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """Return (coverage by gaze, problems, gaze files that `prepare` refuses) for the usable clips."""
    sessions = sorted({clip.name.session for clip in annotations.clips})
    gaze: dict[str, Gaze] = {}
    problems, broken = [], []
    for session in sessions:
        if session not in files:
            problems.append(Problem(session, "gaze", "no gaze file of this session", kept=True))
            continue
        try:
            gaze[session] = read_gaze(files[session].uri)
        except UserError as error:
            broken.append(str(error))
            problems.append(Problem(session, "gaze", str(error), kept=True))
            continue
        if skipped := gaze[session].skipped:
            problems.append(Problem(session, "gaze", f"{skipped:,} of its samples cannot be read", kept=True))
    coverage, coverage_problems = _gaze_coverage(annotations, gaze, facts, frame_offset)
    return {"sessions": len(sessions), **coverage}, problems + coverage_problems, broken


def _gaze_coverage(
    annotations: Annotations, gaze: dict[str, Gaze], facts: dict[str, video.VideoFacts], frame_offset: int
) -> tuple[dict[str, Any], list[Problem]]:
    """Return (coverage by gaze, sessions and clips with too little gaze) for the usable clips."""
    problems: list[Problem] = []
    valid: Counter[str] = Counter()
    frames: Counter[str] = Counter()
    without: list[str] = []
    for clip in annotations.clips:
        if (fact := facts.get(clip.name.name)) is None:
            continue
        first = clip.name.first_frame + frame_offset
        clip_gaze = gaze.get(clip.name.session, no_gaze(0)).frames(first, fact.frames)
        if not clip_gaze.valid.any():
            without.append(clip.name.name)
        valid[clip.name.session] += int(clip_gaze.valid.sum())
        frames[clip.name.session] += fact.frames
    for session in gaze:
        share = valid[session] / max(frames[session], 1)
        if frames[session] and share < _POOR_COVERAGE:
            problems.append(Problem(session, "gaze", f"only {percent(share)} of its frames have gaze", kept=True))
    problems += [
        Problem(clip, "gaze", NO_USABLE_GAZE, kept=True)
        for clip in without
        if parse_clip_name(clip).session in gaze  # a session without gaze is listed itself
    ]
    coverage = {
        "sessions with gaze": len(gaze),
        "clips without gaze": len(without),
        "frames with gaze": valid.total() / max(frames.total(), 1),
    }
    return coverage, problems


def _estimate(
    clips: list[AnnotatedClip], videos: dict[str, SourceFile], facts: dict[str, video.VideoFacts], settings: Settings
) -> Estimate:
    """Encode a few clips of usual length on one core, for a limited time, and scale to all frames."""
    method = flow.flow_method(settings.flow, settings.flow_weights)
    with flow.one_thread():
        return _encode_sample(clips, videos, facts, settings, method)


def _encode_sample(
    clips: list[AnnotatedClip],
    videos: dict[str, SourceFile],
    facts: dict[str, video.VideoFacts],
    settings: Settings,
    method: flow.FlowMethod,
) -> Estimate:
    by_length = sorted(clips, key=lambda clip: (facts[clip.name.name].frames, clip.name.name))
    places = np.linspace(0.25, 0.75, _SAMPLED_CLIPS) * (len(by_length) - 1)
    sample = [videos[by_length[place].name.name].uri for place in places.astype(int)]
    _encode(sample[0], settings, method, seconds=0)  # warm-up: loads weights and compiles
    frames, size, start = 0, 0, time.perf_counter()
    for uri in sample:
        encoded = _encode(uri, settings, method, start + _SAMPLED_SECONDS - time.perf_counter())
        frames += len(encoded.rgb)
        size += sum(map(len, encoded.rgb)) + sum(map(len, encoded.flow))
        if time.perf_counter() - start > _SAMPLED_SECONDS:
            break
    total = sum(fact.frames for fact in facts.values())
    return Estimate((time.perf_counter() - start) / max(frames, 1) * total, size / max(frames, 1) * total)


def _encode(uri: str, settings: Settings, method: flow.FlowMethod, seconds: float) -> video.EncodedClip:
    """Encode a clip's frames for `seconds`, at least two frames. The result is empty if it cannot be decoded."""
    end = time.perf_counter() + seconds

    def frames() -> Iterator[np.ndarray]:
        for place, frame in enumerate(video.decode(uri, settings.image_size)):
            if place >= 2 and time.perf_counter() > end:
                return
            yield frame

    try:
        return video.encode_frames(frames(), method)
    except UserError:  # `prepare` reports such a clip; here it would only distort the estimate
        return video.EncodedClip([], [])


def _print_result(egtea: str, result: CheckResult, settings: Settings, out: str | None, ready: bool) -> None:
    rows = []
    for name, value in result.facts.items():
        if isinstance(value, Counter):
            text = ", ".join(f"{key} ({count:,})" for key, count in value.most_common())
        elif isinstance(value, float):
            text = percent(value)
        else:
            text = _size(value) if name.startswith("bytes") else f"{value:,}"
        rows.append((name.replace("bytes of ", ""), text))
    print_table(egtea, ["", ""], rows)
    stages: dict[str, list[Problem]] = {}
    for problem in result.problems:
        stages.setdefault("cannot be used" if not problem.kept else problem.stage, []).append(problem)
    for stage, problems in stages.items():
        shown = [(problem.clip, problem.reason) for problem in problems[:_SHOWN]]
        more = [("...", f"{len(problems) - _SHOWN:,} more")] if len(problems) > _SHOWN else []
        print_table(f"Problems: {stage} ({len(problems):,})", ["", ""], [*shown, *more])
    if result.estimate is not None:
        _print_estimate(result.estimate, settings, out)
    left_out = sum(not problem.kept for problem in result.problems)
    if ready:
        say(f"Ready: prepare would keep {result.facts['clips usable']:,} clips and leave out {left_out:,}.")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _print_estimate(estimate: Estimate, settings: Settings, out: str | None) -> None:
    cores = len(os.sched_getaffinity(0))
    on_gpu = flow.runs_on_gpu(settings.flow)
    # Tasks share a GPU. Whether the GPU or the cores limit them is not measured, so the time is an upper bound.
    duration = timedelta(seconds=round(estimate.core_seconds / (1 if on_gpu else cores)))
    where = "at most, on a GPU" if on_gpu else f"on {cores} CPU cores"
    disk = _size(estimate.bytes)
    if out is not None and storage.is_local(out):
        place = Path(storage.absolute(out))
        while not place.exists():
            place = place.parent
        disk += f" ({_size(shutil.disk_usage(place).free)} free there)"
    rows = [
        (f"time {where}, flow {settings.flow}", str(duration)),
        ("size of the shards", disk),
    ]
    print_table(f"Estimate, from {_SAMPLED_CLIPS} clips", ["", ""], rows)
