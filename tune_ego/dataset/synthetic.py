"""Synthetic EGTEA Gaze+ with the folder layout, file formats and name forms of the real data set.

An action is a verb and a noun. A hand reaches from the lower edge to the target. The noun is the target's shape and
colour, and the verb is its motion. Distractors have other nouns and motions, the camera shakes, and gaze rests on the
target. So neither a single frame (no verb), nor flow (no colour), nor the whole image (which object) is enough.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from tune_ego.console import progress, say
from tune_ego.dataset.annotations import SPLITS
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.synthetic_drawing import background, draw_hand, draw_object
from tune_ego.errors import UserError

VERBS = ("Slide", "Lift", "Stir")
NOUNS = ("red_disc", "blue_square", "yellow_triangle", "green_cross", "purple_diamond", "white_bar")
_CLIPS_PER_SESSION = 36
_GAP_FRAMES = 12  # before the first and after the last clip of a session, and between two clips without `sessions`
_TEST_EVERY = 5  # every fifth clip of a class is a test clip of split 1, the clip after it of split 2, ...
_SAMPLE_RATE = 30  # gaze samples a second
_CALIBRATION = (1280, 960)


class SyntheticClip(NamedTuple):
    """Plan of a clip; verb and noun count from 0."""

    name: str
    session: int
    verb: int
    noun: int
    first_frame: int
    """Frame of the session."""
    frames: int
    roles: tuple[str, ...]
    """`train` or `test` in each official split."""


def synthesize(
    out: str | Path,
    *,
    verbs: int = 3,
    nouns: int = 4,
    clips: int = 480,
    seconds: float = 1.5,
    size: tuple[int, int] = (320, 240),
    distractors: int = 1,
    imbalance: float = 1.0,
    sessions: bool = False,
    seed: int = 0,
) -> None:
    """Write a synthetic EGTEA folder. The same arguments give the same bytes of annotations and gaze.

    Args:
        out: Folder to write; absent or empty.
        verbs: Number of verbs.
        nouns: Number of nouns; every verb occurs with every noun.
        clips: Number of clips.
        seconds: Mean length of a clip; lengths vary by a third.
        size: (width, height), pixels.
        distractors: Further objects in each clip.
        imbalance: Clips of the most frequent class over those of the rarest one. The classes between them are spaced
            evenly in the logarithm of their number (CIFAR-LT: Cao et al., NeurIPS 2019), in random order.
        sessions: Write the untrimmed videos of the sessions as well, with 1 to 3 s without an action between two clips.
        seed: Seed of all random draws.

    Raises:
        UserError: An argument is out of range, or the folder is not empty.
    """
    root = Path(out)
    if not (1 <= verbs <= len(VERBS) and 1 <= nouns <= len(NOUNS)):
        raise UserError(f"--verbs goes from 1 to {len(VERBS)}, --nouns from 1 to {len(NOUNS)}")
    if size[0] % 2 or size[1] % 2 or min(size) < 48:
        raise UserError(f"--size {size[0]}x{size[1]}: both sides must be even and at least 48 pixels")
    if not 6 <= seconds * FPS <= 24 * 3600:
        raise UserError(f"--seconds {seconds}: a clip has from a quarter of a second to an hour")
    if not 1 <= imbalance < math.inf:
        raise UserError(f"--imbalance {imbalance:g}: the ratio of the largest class to the smallest is 1 or more")
    clips_K = _class_sizes(clips, verbs * nouns, imbalance, seed)
    if min(clips_K) < _TEST_EVERY:
        smallest = f"the smallest of {verbs * nouns} classes would have {min(clips_K)} and needs {_TEST_EVERY}"
        raise UserError(f"--clips {clips}: {smallest}; raise --clips{' or lower --imbalance' * (imbalance > 1)}")
    if root.exists() and any(root.iterdir()):
        raise UserError(f"{root}: the folder is not empty; choose another")
    planned = _plan_clips(clips_K, nouns, seconds, seed, idle=sessions)
    _write_annotations(root / "action_annotation", planned, verbs, nouns)
    track_random = np.random.default_rng((seed, 1))
    tracks = [_target_track(clip, track_random) for clip in planned]
    for session in range(planned[-1].session + 1):
        members = [(clip, track) for clip, track in zip(planned, tracks) if clip.session == session]
        _write_gaze(root / "gaze_data" / "gaze_data", members, np.random.default_rng((seed, 2, session)))
    scenes = [
        _Scene(clip, track, nouns, size, distractors, (seed, 3, index))
        for index, (clip, track) in enumerate(zip(planned, tracks))
    ]
    _write_videos(root, scenes, sessions=sessions)
    say(f"{len(planned)} clips of {verbs * nouns} actions in {root}")


def _write_videos(root: Path, scenes: list[_Scene], *, sessions: bool) -> None:
    """Write the clips, and with `sessions` the whole sessions, on all CPUs."""
    clip_jobs = [
        (root / "cropped_clips" / _session_name(scene.clip.session) / f"{scene.clip.name}.mp4", scene)
        for scene in scenes
    ]
    session_jobs = [
        (root / "videos" / f"{_session_name(session)}.mp4", list(members))
        for session, members in itertools.groupby(scenes, lambda scene: scene.clip.session)
    ]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        with progress("clips", len(clip_jobs)) as advance:
            for _ in pool.map(_write_clip, clip_jobs, chunksize=8):
                advance(1)
        if sessions:
            with progress("sessions", len(session_jobs)) as advance:
                for _ in pool.map(_write_session, session_jobs):
                    advance(1)


def _session_name(session: int) -> str:
    return f"{'OP' if session % 2 == 0 else 'P'}{session + 1:02d}-R{session % 7 + 1:02d}-Synthetic"


def _class_sizes(clips: int, classes: int, imbalance: float, seed: int) -> list[int]:
    """Return the number of clips of each class."""
    if imbalance == 1:
        return [len(range(label, clips, classes)) for label in range(classes)]
    rank_K = np.random.default_rng((seed, 6)).permutation(classes)
    share_K = imbalance ** (-rank_K / max(classes - 1, 1))
    until_K = np.rint(np.cumsum(share_K) / share_K.sum() * clips).astype(int)
    return np.diff(until_K, prepend=0).tolist()


def _plan_clips(clips_K: list[int], nouns: int, seconds: float, seed: int, *, idle: bool) -> list[SyntheticClip]:
    """Return the clips in session order, with class, session, place in the session and split roles.

    With `idle`, 1 to 3 s lie between two clips of a session, else half a second.
    """
    random, gaps = np.random.default_rng((seed, 0)), np.random.default_rng((seed, 5))
    # (number within the class, class), in an order that takes the classes in turn
    numbered = sorted((number, label) for label, count in enumerate(clips_K) for number in range(count))
    order = random.permutation(len(numbered))
    planned = []
    next_frame: dict[int, int] = {}
    for place, index in enumerate(order):
        number, label = numbered[index]
        session = place // _CLIPS_PER_SESSION
        frames = max(6, round(seconds * FPS * random.uniform(2 / 3, 4 / 3)))
        first = next_frame.get(session, _GAP_FRAMES)
        next_frame[session] = first + frames + (int(gaps.integers(FPS, 3 * FPS + 1)) if idle else _GAP_FRAMES)
        times = "-".join(str(round(frame * 1000 / FPS)) for frame in (first, first + frames))
        turn = number % _TEST_EVERY
        planned.append(
            SyntheticClip(
                name=f"{_session_name(session)}-{times}-F{first:06d}-F{first + frames:06d}",
                session=session,
                verb=label // nouns,
                noun=label % nouns,
                first_frame=first,
                frames=frames,
                roles=tuple("test" if turn == split - 1 else "train" for split in SPLITS),
            )
        )
    return planned


def _write_annotations(folder: Path, clips: list[SyntheticClip], verbs: int, nouns: int) -> None:
    folder.mkdir(parents=True)
    actions = [f"{verb} {noun}" for verb in VERBS[:verbs] for noun in NOUNS[:nouns]]
    for kind, names in (("action", actions), ("verb", VERBS[:verbs]), ("noun", NOUNS[:nouns])):
        lines = [f"{name} {number}" for number, name in enumerate(names, start=1)]
        (folder / f"{kind}_idx.txt").write_text("\n".join(lines) + "\n")
    for split in SPLITS:
        for role in ("train", "test"):
            lines = [
                f"{clip.name} {clip.verb * nouns + clip.noun + 1} {clip.verb + 1} {clip.noun + 1}"
                for clip in clips
                if clip.roles[split - 1] == role
            ]
            (folder / f"{role}_split{split}.txt").write_text("\n".join(lines) + "\n")


def _motion(verb: int, phase: np.ndarray) -> np.ndarray:
    """Return the displacement [T, 2] in [-1, 1] of a verb's motion at phases [T], radians."""
    still = np.zeros_like(phase)
    wave, quarter = np.sin(phase), np.cos(phase)
    return np.stack([(wave, still), (still, wave), (wave, quarter)][verb], axis=1)


def _track(verb: int, frames: int, centre: np.ndarray, amplitude: float, random: np.random.Generator) -> np.ndarray:
    """Return a path [T, 2] of x, y in fractions of the image's width and height.

    The amplitude in x is 3/4 of that in y: in images with sides 4 : 3, circles are round.
    """
    period = random.uniform(12, 16)
    phase = random.uniform(0, 2 * np.pi) + 2 * np.pi * np.arange(frames) / period
    return centre + amplitude * _motion(verb, phase) * (0.75, 1.0)


def _shake(frames: int, random: np.random.Generator) -> np.ndarray:
    """Return smooth camera motion [T, 2], fractions of the image."""
    times = np.arange(frames)[:, None]
    waves = [
        random.uniform(0.004, 0.014, 2) * np.sin(times * random.uniform(0.1, 0.4, 2) + random.uniform(0, 6.3, 2))
        for _ in range(3)
    ]
    return np.sum(waves, axis=0)


class _Tracks(NamedTuple):
    """Paths of a clip in image coordinates, [T, 2], fractions of width and height."""

    target: np.ndarray
    shake: np.ndarray


def _target_track(clip: SyntheticClip, random: np.random.Generator) -> _Tracks:
    shake = _shake(clip.frames, random)
    centre = random.uniform((0.25, 0.3), (0.75, 0.65))
    return _Tracks(_track(clip.verb, clip.frames, centre, 0.1, random) + shake, shake)


# Without `cpu-independent`, the bytes that x264 writes differ from run to run, even on one thread.
_X264 = {"crf": "18", "preset": "veryfast", "threads": "1", "x264-params": "cpu-independent=1"}


class _Scene(NamedTuple):
    """Everything that the images of a clip are drawn from."""

    clip: SyntheticClip
    tracks: _Tracks
    nouns: int
    size: tuple[int, int]
    """(width, height), pixels."""
    distractors: int
    seed: tuple[int, ...]


def _write_clip(job: tuple[Path, _Scene]) -> None:
    path, scene = job
    _write_video(path, scene.size, _clip_images(scene))


def _write_video(path: Path, size: tuple[int, int], images: Iterable[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options=_X264)
        (stream.width, stream.height), stream.pix_fmt = size, "yuv420p"
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def _clip_images(scene: _Scene) -> Iterator[np.ndarray]:
    """Yield the images of a clip, RGB uint8 [H, W, 3]."""
    clip, tracks, height = scene.clip, scene.tracks, scene.size[1]
    scenery, others = _scenery(scene), _distractors(scene)
    for time in range(clip.frames):
        image = _shifted(scenery, tracks.shake[time])
        for noun, track in others:
            draw_object(image, noun, track[time] * scene.size, 0.11 * height)
        draw_hand(image, tracks.target[time] * scene.size, 0.13 * height)
        draw_object(image, clip.noun, tracks.target[time] * scene.size, 0.13 * height)
        yield image


def _idle_images(scene: _Scene, frames: int) -> Iterator[np.ndarray]:
    """Yield images without an action: the objects of a clip lie still where they begin, the camera shakes."""
    height, tracks = scene.size[1], scene.tracks
    scenery, others = _scenery(scene), _distractors(scene)
    objects = [(noun, track[0], 0.11 * height) for noun, track in others]
    objects.append((scene.clip.noun, tracks.target[0], 0.13 * height))
    for shake_2 in _shake(frames, np.random.default_rng((*scene.seed, 1))):
        image = _shifted(scenery, shake_2)
        for noun, place_2, radius in objects:
            draw_object(image, noun, (place_2 - tracks.shake[0] + shake_2) * scene.size, radius)
        yield image


def _scenery(scene: _Scene) -> np.ndarray:
    return background(np.random.default_rng((scene.seed[0], 4, scene.clip.session)), *scene.size)


def _distractors(scene: _Scene) -> list[tuple[int, np.ndarray]]:
    random = np.random.default_rng(scene.seed)
    return [_distractor(scene.clip, scene.tracks, scene.nouns, random) for _ in range(scene.distractors)]


def _shifted(scenery: np.ndarray, shake_2: np.ndarray) -> np.ndarray:
    height, width = scenery.shape[:2]
    shift = np.array([[1, 0, shake_2[0] * width], [0, 1, shake_2[1] * height]])
    return cv2.warpAffine(scenery, shift, (width, height), borderMode=cv2.BORDER_REFLECT)


def _write_session(job: tuple[Path, list[_Scene]]) -> None:
    """Write the video of a whole session: its clips, with idle stretches between them."""
    path, scenes = job
    _write_video(path, scenes[0].size, _session_images(scenes))


def _session_images(scenes: list[_Scene]) -> Iterator[np.ndarray]:
    done = 0
    for scene in scenes:
        yield from _idle_images(scene, scene.clip.first_frame - done)
        yield from _clip_images(scene)
        done = scene.clip.first_frame + scene.clip.frames
    yield from _idle_images(scenes[-1], _GAP_FRAMES)


def _distractor(
    clip: SyntheticClip, tracks: _Tracks, nouns: int, random: np.random.Generator
) -> tuple[int, np.ndarray]:
    """Return (noun, path) of a distractor: it differs from the target in noun and motion, and keeps a distance."""
    noun = int((clip.noun + random.integers(1, max(nouns, 2))) % nouns)
    verb = int((clip.verb + random.integers(1, len(VERBS))) % len(VERBS))
    middle = tracks.target.mean(axis=0)
    while np.linalg.norm((centre := random.uniform((0.15, 0.15), (0.85, 0.85))) - middle) < 0.33:
        pass
    return noun, _track(verb, clip.frames, centre, 0.05, random) + tracks.shake


_HEADER = """## [BeGaze]
## Version:\tBeGaze {version}
## Sample Rate:\t30
## Number of Samples:\t{samples}
## [Calibration]
## Calibration Area:\t1280\t960
## Format:\tLEFT, POR, FRAMECOUNTER
##
"""


def _write_gaze(folder: Path, members: list[tuple[SyntheticClip, _Tracks]], random: np.random.Generator) -> None:
    """Write a session's gaze at 30 Hz: on the target within clips, at random points between clips.

    Some samples are blinks, lost or outside the image, as in real recordings.
    """
    last = max(clip.first_frame + clip.frames for clip, _ in members) + _GAP_FRAMES
    point = np.repeat(random.uniform(0.2, 0.8, (-(-last // 6), 2)), 6, axis=0)[:last]
    for clip, tracks in members:
        point[clip.first_frame : clip.first_frame + clip.frames] = tracks.target
    times = np.arange(int(last * _SAMPLE_RATE / FPS))
    frame = times * FPS // _SAMPLE_RATE
    pixels = point[frame] * _CALIBRATION + random.normal(0, 12, (len(frame), 2))
    event = random.choice(["Fixation", "Saccade"], len(frame), p=[0.75, 0.25])
    for label, share in (("Blink", 0.05), ("-", 0.01)):  # in runs of four samples
        lost = np.repeat(random.random(len(frame) // 4 + 1) < share, 4)[: len(frame)]
        event[lost] = label
        pixels[lost] = 0.0 if label == "Blink" else np.nan
    outside = random.random(len(frame)) < 0.03
    pixels[outside] += (1500, 0)
    session = members[0][0].session
    lines = (
        _gaze_lines_31(times, frame, pixels, event) if session % 2 == 0 else _gaze_lines_34(times, frame, pixels, event)
    )
    header = _HEADER.format(version="3.1.77" if session % 2 == 0 else "3.4.46", samples=len(frame))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{_session_name(session)}.txt").write_text(header + "\n".join(lines) + "\n", newline="\r\n")


def _gaze_lines_31(times: np.ndarray, frame: np.ndarray, pixels: np.ndarray, event: np.ndarray) -> list[str]:
    lines = ["Time\tType\tTrial\tL POR X [px]\tL POR Y [px]\tFrame\tAux1\tL Event Info"]
    for t, f, (x, y), e in zip(times, frame, pixels, event):
        lines.append(f"{t * 33333}\tSMP\t1\t{x:.2f}\t{y:.2f}\t{f}\t\t{e}")
    return [line.replace("nan", "NaN") for line in lines]


def _gaze_lines_34(times: np.ndarray, frame: np.ndarray, pixels: np.ndarray, event: np.ndarray) -> list[str]:
    lines = ["Time\tType\tTrial\tB POR X [px]\tB POR Y [px]\tL POR X [px]\tL POR Y [px]\tFrame\tAux1\tB Event Info"]
    for t, f, (x, y), e in zip(times, frame, pixels, event):
        seconds, part = divmod(int(f), FPS)
        clock = f"{seconds // 3600:02d}:{seconds // 60 % 60:02d}:{seconds % 60:02d}:{part:02d}"
        lines.append(f"{t * 33333}\tSMP\t1\t{x:.2f}\t{y:.2f}\t0.00\t0.00\t{clock}\t\t{e}")
    return [line.replace("nan", "NaN") for line in lines]
