"""`prepare --check`: read a whole EGTEA folder, write nothing, and say what is there, missing and odd."""

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
from tune_ego.console import clip_progress, percent, print_table, say
from tune_ego.dataset import flow, video
from tune_ego.dataset.annotations import (
    AnnotatedClip,
    Annotations,
    find_clips,
    find_doubled_clips,
    find_gaze,
    parse_clip_name,
    read_annotations,
)
from tune_ego.dataset.gaze import Gaze, no_gaze, read_gaze
from tune_ego.dataset.prepare import NO_USABLE_GAZE, Settings
from tune_ego.dataset.shards import Problem
from tune_ego.dataset.sources import MISSING_LIMIT, READERS, check_threshold, length_oddity
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

_TRIED_CLIPS = 3
_TRIED_SECONDS = 20.0
_SHOWN = 10  # of a kind
_POOR_COVERAGE = 0.5  # of a session's frames


class Estimate(NamedTuple):
    core_seconds: float
    """On one core of this machine, and its GPU where the flow method has one."""
    bytes: float


class Verdict(NamedTuple):
    facts: dict[str, Any]
    problems: list[Problem]
    """As `prepare` would record them, and stages `annotation` and `gaze` for whole files."""
    estimate: Estimate | None


def check(egtea: str, settings: Settings, out: str | None = None) -> Verdict:
    """Print the verdict on an EGTEA folder and return it; `out` is where shards would go.

    Every video is read to its end, though not decoded, and every gaze file. Raises `UserError`, after the table,
    where `prepare` would refuse the folder.
    """
    settings.check()
    egtea = storage.absolute(egtea)
    annotations = read_annotations(egtea)
    videos = find_clips(egtea)
    facts, problems = _look_at_videos(annotations, videos)
    problems += [
        Problem(name, "annotation", f"{len(files)} mp4 have this name; {videos[name].uri} counts", kept=True)
        for name, files in find_doubled_clips(egtea).items()
    ]
    gaze_facts, gaze_problems, broken = _look_at_gaze(annotations, find_gaze(egtea), facts, settings.frame_offset)
    usable = [clip for clip in annotations.clips if clip.name.name in facts]
    estimate = _estimate(usable, videos, facts, settings) if usable else None
    known = {clip.name.name for clip in annotations.clips}
    everything = {
        "clips annotated": len(annotations.clips),
        "clips usable": len(usable),
        "frames": sum(fact.frames for fact in facts.values()),
        f"clips under {WINDOW_FRAMES} frames": sum(fact.frames < WINDOW_FRAMES for fact in facts.values()),
        "videos without annotation": len(videos.keys() - known),
        "bytes of video": sum(videos[name].bytes for name in facts),
        "sizes": Counter(f"{fact.size[0]}x{fact.size[1]}" for fact in facts.values()),
        **gaze_facts,
    }
    verdict = Verdict(everything, problems + gaze_problems, estimate)
    _show(egtea, verdict, settings, out, ready=not broken)
    if broken:
        raise UserError(f"{len(broken)} gaze files cannot be used, first {broken[0]}")
    check_threshold([problem for problem in problems if not problem.kept], len(annotations.clips), egtea)
    return verdict


def _look_at_videos(
    annotations: Annotations, videos: dict[str, SourceFile]
) -> tuple[dict[str, video.VideoFacts], list[Problem]]:
    """(what each usable clip's video holds, problems)."""

    def look(clip: AnnotatedClip) -> video.VideoFacts | str:
        file = videos.get(clip.name.name)
        if file is None:
            return "no mp4 of this name"
        try:
            found = video.probe(file.uri)
        except UserError as error:
            return str(error)
        return found if found.frames else "the video holds no frame"

    facts: dict[str, video.VideoFacts] = {}
    problems = []
    with ThreadPoolExecutor(READERS) as pool, clip_progress(len(annotations.clips)) as advance:
        for clip, found in zip(annotations.clips, pool.map(look, annotations.clips)):
            name = clip.name.name
            if isinstance(found, str):
                problems.append(Problem(name, "video", found, kept=False))
            else:
                facts[name] = found
                if reason := length_oddity(clip, found.frames):
                    problems.append(Problem(name, "length", reason, kept=True))
            advance(1)
    return facts, problems


def _look_at_gaze(
    annotations: Annotations, files: dict[str, SourceFile], facts: dict[str, video.VideoFacts], frame_offset: int
) -> tuple[dict[str, Any], list[Problem], list[str]]:
    """(coverage by gaze, problems, errors of gaze files that end a run) of the usable clips."""
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
    valid: Counter[str] = Counter()
    frames: Counter[str] = Counter()
    without: list[str] = []
    for clip in annotations.clips:
        if (fact := facts.get(clip.name.name)) is None:
            continue
        first = clip.name.first_frame + frame_offset
        found = gaze.get(clip.name.session, no_gaze(0)).frames(first, fact.frames)
        if not found.valid.any():
            without.append(clip.name.name)
        valid[clip.name.session] += int(found.valid.sum())
        frames[clip.name.session] += fact.frames
    for session in gaze:
        share = valid[session] / max(frames[session], 1)
        if frames[session] and share < _POOR_COVERAGE:
            problems.append(Problem(session, "gaze", f"only {percent(share)} of its frames have gaze", kept=True))
    problems += [
        Problem(clip, "gaze", NO_USABLE_GAZE, kept=True)
        for clip in without
        if parse_clip_name(clip).session in gaze  # of the others their session is named
    ]
    coverage = {
        "sessions": len(sessions),
        "sessions with gaze": len(gaze),
        "clips without gaze": len(without),
        "frames with gaze": valid.total() / max(frames.total(), 1),
    }
    return coverage, problems, broken


def _estimate(
    clips: list[AnnotatedClip], videos: dict[str, SourceFile], facts: dict[str, video.VideoFacts], settings: Settings
) -> Estimate:
    """Encode a few clips of usual length on one core, for a limited time, and scale to all frames."""
    method = flow.flow_method(settings.flow, settings.flow_weights)
    with flow.one_thread():
        return _timed(clips, videos, facts, settings, method)


def _timed(
    clips: list[AnnotatedClip],
    videos: dict[str, SourceFile],
    facts: dict[str, video.VideoFacts],
    settings: Settings,
    method: flow.FlowMethod,
) -> Estimate:
    by_length = sorted(clips, key=lambda clip: (facts[clip.name.name].frames, clip.name.name))
    places = np.linspace(0.25, 0.75, _TRIED_CLIPS) * (len(by_length) - 1)
    tried = [videos[by_length[place].name.name].uri for place in places.astype(int)]
    _encode(tried[0], settings, method, seconds=0)  # loads and compiles what the method needs
    frames, size, start = 0, 0, time.perf_counter()
    for uri in tried:
        encoded = _encode(uri, settings, method, start + _TRIED_SECONDS - time.perf_counter())
        frames += len(encoded.rgb)
        size += sum(map(len, encoded.rgb)) + sum(map(len, encoded.flow))
        if time.perf_counter() - start > _TRIED_SECONDS:
            break
    total = sum(fact.frames for fact in facts.values())
    return Estimate((time.perf_counter() - start) / max(frames, 1) * total, size / max(frames, 1) * total)


def _encode(uri: str, settings: Settings, method: flow.FlowMethod, seconds: float) -> video.EncodedClip:
    """A clip's frames as far as the time allows, two at least; none of a clip that cannot be decoded."""
    end = time.perf_counter() + seconds

    def frames() -> Iterator[np.ndarray]:
        for place, frame in enumerate(video.decode(uri, settings.image_size)):
            if place >= 2 and time.perf_counter() > end:
                return
            yield frame

    try:
        return video.encode_frames(frames(), method)
    except UserError:  # `prepare` will tell; here it would only make the estimate worse
        return video.EncodedClip([], [])


def _show(egtea: str, verdict: Verdict, settings: Settings, out: str | None, ready: bool) -> None:
    rows = []
    for name, value in verdict.facts.items():
        if isinstance(value, Counter):
            text = ", ".join(f"{key} ({count:,})" for key, count in value.most_common())
        elif isinstance(value, float):
            text = percent(value)
        else:
            text = _size(value) if name.startswith("bytes") else f"{value:,}"
        rows.append((name.replace("bytes of ", ""), text))
    print_table(egtea, ["", ""], rows)
    stages: dict[str, list[Problem]] = {}
    for problem in verdict.problems:
        stages.setdefault("cannot be used" if not problem.kept else problem.stage, []).append(problem)
    for stage, found in stages.items():
        shown = [(problem.clip, problem.reason) for problem in found[:_SHOWN]]
        more = [("...", f"{len(found) - _SHOWN:,} more")] if len(found) > _SHOWN else []
        print_table(f"Odd: {stage} ({len(found):,})", ["", ""], [*shown, *more])
    if verdict.estimate is not None:
        _show_estimate(verdict.estimate, settings, out)
    lost = sum(not problem.kept for problem in verdict.problems)
    if ready and lost <= MISSING_LIMIT * verdict.facts["clips annotated"]:
        say(f"Ready: prepare would keep {verdict.facts['clips usable']:,} clips and leave out {lost:,}.")


def _size(count: float) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _show_estimate(estimate: Estimate, settings: Settings, out: str | None) -> None:
    cores = len(os.sched_getaffinity(0))
    on_gpu = flow.runs_on_gpu(settings.flow)
    # Tasks share a GPU, and whether it or the cores have time left is not known here.
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
    print_table(f"Estimate, from {_TRIED_CLIPS} clips", ["", ""], rows)
