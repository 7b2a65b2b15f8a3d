"""Files that `predict` writes about a video, beside each other."""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from tune_ego import __version__, storage
from tune_ego.console import percent, print_table, say
from tune_ego.dataset.frame_stream import STDIN
from tune_ego.dataset.gaze import FPS
from tune_ego.errors import StorageError, UserError
from tune_ego.prediction.detection_scores import OVERLAPS, TrueSegment, count_recognized, detection_scores
from tune_ego.prediction.overlay import OVERLAY, write_overlay
from tune_ego.prediction.page import render_page
from tune_ego.prediction.predict import PredictionSettings, Segments, predict_video
from tune_ego.prediction.segments import Segment
from tune_ego.prediction.trained_model import TrainedModel, load_model
from tune_ego.prediction.truth import read_truth, true_segments
from tune_ego.prediction.window_file import WINDOWS, WindowFile

ACTIONS, TABLE, PAGE = ".actions.json", ".actions.csv", ".html"
"""Endings of the files about a video, beside `WINDOWS` and `OVERLAY`."""
DETECTION_FILE = "detection.json"
"""Scores of the detection over all videos, written with true actions."""
_ENDINGS = (".mp4", ".mkv", ".mov", ".avi", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".h264")
"""Endings of the files in a folder that are taken for videos."""


def predict_files(
    source: str,
    videos: Sequence[str],
    out: str | None,
    settings: PredictionSettings,
    truth_files: Sequence[str],
    *,
    overlay: bool,
) -> dict[str, Any] | None:
    """Detect the actions of videos and write the files about each.

    Args:
        source: A trained model, as `load_model` reads it.
        videos: Video files, folders of them, or URIs.
        out: Folder or URI for the files; None: beside each video.
        settings: Windows, crops and detection.
        truth_files: Files with true actions (`truth`).
        overlay: Write a video with captions and attention, too.

    Returns:
        The detection's scores (`detection_scores`), which are also written; None without true actions.

    Raises:
        UserError: A setting is out of range, a file is no video, or true actions of a video are missing.
    """
    settings.check()
    if STDIN in videos:
        raise UserError("- is a stream; give it alone")
    names = _output_names(find_videos(videos), out)
    model = load_model(source)
    truth = read_truth(truth_files, model.classes)
    true = {video: true_segments(truth, video) for video in names} if truth_files else {}
    detected, seconds, faults = dict[str, list[Segment]](), dict[str, float](), list[str]()
    recognized = 0
    for video, name in names.items():
        say(video)
        try:
            segments = _predict_file(model, source, video, name, settings)
        except UserError as error:
            if len(names) == 1:
                raise
            say(f"  {error}")  # the other videos may be hours of work
            faults.append(video)
            continue
        if overlay:
            write_overlay(model, video, name, segments)
        detected[video], seconds[video] = list(segments), segments.frames / FPS
        recognized += count_recognized(segments.scores_FK, true.get(video, []), model.classes)
    scores = None
    if true and detected:
        scores = _score(detected, {video: true[video] for video in detected}, seconds, recognized, out)
    if faults:
        raise UserError(f"{len(faults)} of {len(names)} videos could not be used: {', '.join(faults)}")
    return scores


def _score(
    detected: dict[str, list[Segment]],
    true: dict[str, list[TrueSegment]],
    seconds: dict[str, float],
    recognized: int,
    out: str | None,
) -> dict[str, Any]:
    """Compare detected with true actions, write `detection.json` and print its figures.

    `recognized` is the number that `count_recognized` returns for all videos.
    """
    number = sum(map(len, true.values()))
    scores = {
        "clip_accuracy": recognized / number if number else None,
        **detection_scores(detected, true, seconds),
    }
    target = storage.join(storage.absolute(out or "."), DETECTION_FILE)
    storage.write_json(target, scores)
    _print_scores(scores, target)
    return scores


def _predict_file(
    model: TrainedModel,
    source: str,
    video: str,
    name: str,
    settings: PredictionSettings,
) -> Segments:
    with WindowFile(model, video) as file:
        segments = predict_video(model, video, settings, on_window=file.add, show_progress=True)
        file.write(name + WINDOWS, segments.frames)
    facts = {
        "model": source,
        "flow": model.flow_method,
        "tune_ego": __version__,
        "windows": settings.windows._asdict(),
        "detection": settings.detection._asdict(),
    }
    _write_actions(name, video, segments, facts)
    rows = [(key, _in_words(value)) for key, value in facts.items()] + [("video", text) for text in segments.remarks]
    title = PurePosixPath(video).name
    page = render_page(title, model, segments, segments.scores_FK, name + WINDOWS, rows)
    storage.write_text(name + PAGE, page)
    for remark in segments.remarks:
        say(f"  {remark}")
    say(f"  {len(segments)} actions in {segments.frames / FPS:.1f} s: {name}{{{ACTIONS},{TABLE},{WINDOWS},{PAGE}}}")
    return segments


def _in_words(value: Any) -> str:
    return ", ".join(f"{key} {part}" for key, part in value.items()) if isinstance(value, Mapping) else str(value)


def find_videos(sources: Sequence[str]) -> list[str]:
    """Return the videos of a list of files, folders and URIs; of a folder, all files with a video's ending.

    Overlays that `predict` wrote are left out of folders. Raises `UserError` for an absent file, and for a folder
    without videos.
    """
    return [video for source in sources for video in _videos_of(source)]


def _videos_of(source: str) -> Iterator[str]:
    if not storage.exists(source):
        raise UserError(f"{source}: there is no such file")
    if storage.is_file(source):
        yield source
        return
    files = [
        file
        for file in storage.find_files(source, _ENDINGS)
        if not file.uri.endswith(OVERLAY) and not PurePosixPath(file.uri).name.startswith("._")
    ]
    if not files:
        raise UserError(f"{source}: the folder holds no video ({', '.join(_ENDINGS)})")
    yield from (file.uri for file in files)


def _output_names(videos: Sequence[str], out: str | None) -> dict[str, str]:
    """Return video -> path or URI, without an ending, of the files about it.

    Raises `UserError` for two videos with the same files, and for a folder that cannot be written.
    """
    names: dict[str, str] = {}
    for video in videos:
        beside = storage.absolute(video if storage.is_local(video) else PurePosixPath(video).name)
        name = beside if out is None else storage.join(storage.absolute(out), PurePosixPath(video).name)
        if name in names.values():
            raise UserError(f"{video}: two videos of this name; their files would overwrite each other")
        names[video] = name
    for folder in {name.rpartition("/")[0]: None for name in names.values()}:
        test = storage.join(folder, f".tune-ego-{uuid.uuid4().hex[:8]}")
        try:
            storage.write_bytes(test, b"")  # before hours of work
            storage.remove(test)
        except StorageError as error:
            raise UserError(f"{folder}: cannot be written to; choose another folder with --out ({error})") from error
    return names


def _write_actions(name: str, video: str, segments: Segments, facts: dict[str, Any]) -> None:
    rows = [
        {
            "start": round(segment.start, 3),
            "end": round(segment.end, 3),
            "action": segment.action,
            "verb": segment.action.rpartition(" ")[0],  # nouns have no spaces, some verbs do: "Turn on faucet"
            "noun": segment.action.rpartition(" ")[2],
            "score": round(segment.score, 4),
        }
        for segment in segments
    ]
    tops = [[{"action": action, "score": round(score, 4)} for action, score in segment.top] for segment in segments]
    content = {
        "video": video,
        "seconds": round(segments.frames / FPS, 3),
        **facts,
        "remarks": segments.remarks,
        "segments": [{**row, "top": top} for row, top in zip(rows, tops)],
    }
    storage.write_json(name + ACTIONS, content)
    table = io.StringIO()
    writer = csv.DictWriter(table, ["start", "end", "action", "verb", "noun", "score"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    storage.write_text(name + TABLE, table.getvalue())


def _print_scores(scores: dict[str, Any], target: str) -> None:
    print_table(
        "Detection",
        ["measure", "value"],
        [
            ["accuracy of the true clips", percent(scores["clip_accuracy"])],
            ["frame accuracy, inside true actions", percent(scores["frame_accuracy"])],
            ["frame accuracy, outside (no action)", percent(scores["background_accuracy"])],
            *([f"mAP at tIoU {threshold}", percent(scores["map"][str(threshold)])] for threshold in OVERLAPS),
        ],
    )
    say(f"these figures, and the confusion in seconds and in segments: {target}")
