"""EGTEA's files before anything is made of them: can they be used, and are they still the same?"""

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
READERS = 16
"""Threads that open files."""
_ENDS = 8192
"""Bytes at a video's head and tail that tell it from others: an mp4 has its table of frames at one of them."""


def length_oddity(clip: AnnotatedClip, frames: int) -> str | None:
    """What is odd about a clip's number of frames, if anything: its name says how many there should be."""
    named = clip.name.last_frame - clip.name.first_frame
    return None if frames == named else f"{frames} frames, its name says {named}"


def find_unusable(clips: list[AnnotatedClip], videos: dict[str, SourceFile]) -> list[Problem]:
    """Clips whose video is absent or cannot be opened, found without reading the rest of it.

    On an object store a video counts as one that opens where it is not empty: nothing is fetched.
    """

    def look(clip: AnnotatedClip) -> Problem | None:
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
        return [problem for problem in pool.map(look, clips) if problem is not None]


def check_threshold(unusable: list[Problem], clips: int, where: str) -> None:
    if len(unusable) > MISSING_LIMIT * clips:
        first = unusable[0]
        raise UserError(
            f"{where}: {len(unusable)} of {clips} clips cannot be used, first {first.clip}: {first.reason}. "
            f"That is over {MISSING_LIMIT:.0%}; to go on without them: --allow-missing"
        )


def identities(files: list[SourceFile]) -> dict[str, str]:
    """URI -> what tells a file from one that replaces it.

    Of a gaze file a hash, of a video its size and a hash of both its ends; on an object store, where that would
    fetch them, size and time of writing.
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
