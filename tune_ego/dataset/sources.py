"""Checks of EGTEA's source files: whether they can be used, and whether they have changed since an earlier run."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tune_ego import storage
from tune_ego.dataset import video
from tune_ego.dataset.annotations import AnnotatedClip
from tune_ego.dataset.shards import Problem
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

MISSING_LIMIT = 0.05
"""Largest share of clips that may be absent or unreadable."""
_CLOSE, _CLOSE_FRAMES = 0.05, 2
"""Differences between a clip's length and its name that count as equal: a fraction, or a few frames."""
READERS = 16
"""Threads that open files."""
_ENDS = 8192
"""Bytes at a video's head and at its tail that identify the video. An mp4 has its table of frames at one end."""


def length_mismatch(clip: AnnotatedClip, frames: int) -> str | None:
    """Describe a difference between a clip's session frames and the number in its name; None if they are equal."""
    return None if frames == clip.name.frames else f"{frames} frames, its name says {clip.name.frames}"


def describe_lengths(clips: list[AnnotatedClip], frames: dict[str, int]) -> str:
    """Describe the conflict if most clips differ in length from their names by more than `_CLOSE`; else "".

    Then frames and gaze do not belong together: the clips are from another source, or were cut in another way.
    `frames` is clip name -> session frames of the usable clips.
    """
    usable = [clip for clip in clips if clip.name.name in frames]
    differ = [clip for clip in usable if _differs(clip, frames[clip.name.name])]
    if len(differ) <= len(usable) / 2:
        return ""
    first = differ[0].name.name
    return (
        f"{len(differ)} of {len(usable)} clips are not as long as their names say, first {first}: "
        f"{length_mismatch(differ[0], frames[first])}. So their frames may not be those that the gaze belongs to; "
        "to continue all the same: --allow-missing"
    )


def _differs(clip: AnnotatedClip, frames: int) -> bool:
    return abs(frames - clip.name.frames) > max(_CLOSE_FRAMES, _CLOSE * clip.name.frames)


def find_unusable_clips(clips: list[AnnotatedClip], videos: dict[str, SourceFile]) -> list[Problem]:
    """Return a problem for each clip whose video is absent or cannot be opened. Little of each file is read.

    On an object store only absent and empty files are detected: nothing is fetched.
    """

    def check_clip(clip: AnnotatedClip) -> Problem | None:
        file = videos.get(clip.name.name)
        try:
            if file is None:
                raise UserError("no mp4 of this name")
            if not file.bytes:
                raise UserError("the file is empty")
            if storage.is_local(file.uri):
                video.check_opens(file.uri)
        except UserError as error:
            return Problem(clip.name.name, "video", str(error), kept=False)
        return None

    with ThreadPoolExecutor(READERS) as pool:
        return [problem for problem in pool.map(check_clip, clips) if problem is not None]


def check_missing_limit(unusable: list[Problem], clips: int, where: str) -> None:
    """Raise `UserError` if more than `MISSING_LIMIT` of the clips cannot be used. `where` begins the message."""
    if len(unusable) > MISSING_LIMIT * clips:
        first = unusable[0]
        raise UserError(
            f"{where}: {len(unusable)} of {clips} clips cannot be used, first {first.clip}: {first.reason}. "
            f"That is over {MISSING_LIMIT:.0%}; to continue without them: --allow-missing"
        )


def file_identities(files: list[SourceFile]) -> dict[str, str]:
    """Return URI -> identity, a text that changes when a file is replaced.

    Gaze files: a hash. Videos: size and a hash of both ends. On an object store, where a hash would fetch the files:
    size and modification time.
    """
    with ThreadPoolExecutor(READERS) as pool:
        return dict(zip([file.uri for file in files], pool.map(_identity, files)))


def _identity(file: SourceFile) -> str:
    if not storage.is_local(file.uri):
        return f"{file.bytes} {file.modified_ns}"
    try:
        with Path(file.uri).open("rb") as opened:
            if not file.uri.lower().endswith(".mp4"):
                return hashlib.sha256(opened.read()).hexdigest()[:16]
            ends = opened.read(_ENDS)
            opened.seek(max(file.bytes - _ENDS, 0))
            return f"{file.bytes} {hashlib.sha256(ends + opened.read(_ENDS)).hexdigest()[:16]}"
    except OSError as error:
        raise UserError(f"{file.uri}: cannot be read ({error})") from error
