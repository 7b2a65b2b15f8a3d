"""`visualize`: one clip as a model sees it, as an H.264 video and as a strip of frames.

Beside the frame, with the true gaze point as a ring, each stream's attention over it; below, the class scores of the
window that the frame is in, and the true class's score over the clip. Both are of the crop that the model sees.
"""

from __future__ import annotations

import io
from itertools import pairwise
from typing import Any

import av
import cv2
import numpy as np

from tune_ego import storage
from tune_ego.console import percent, print_table, say
from tune_ego.dataset.gaze import FPS
from tune_ego.dataset.shards import Clip
from tune_ego.evaluation.attention_maps import ScoredWindow, as_clip, main_score, panels, score_windows
from tune_ego.evaluation.evaluate import open_model
from tune_ego.evaluation.inspection import find_record
from tune_ego.feed.sampling import centre_window, dense_starts

_SIDE, _GAP, _LINE = 272, 8, 20  # pixels
_STRIP_SIDE, _STRIP_FRAMES, _STRIP_MARGIN = 168, 8, 104
_TOP = 4
"""Classes whose scores are shown."""
_PLOT = 168
_COLOURS = {"rgb": (213, 94, 0), "flow": (0, 114, 178), "fused": (0, 0, 0)}
"""Colours of Okabe and Ito, which colour-blind people can distinguish."""
_INK, _GREY, _TRUE = (20, 20, 20), (205, 205, 205), (0, 130, 95)


def visualize(checkpoint: str, clip: str, data: str, out: str) -> list[ScoredWindow]:
    """Write `out`.mp4 and `out`.png of a clip; return the model's results for each of its dense windows.

    The windows are those of `evaluate`. Raises `UserError` where checkpoint and shards do not belong together, and for
    a clip that is not in the shards.
    """
    opened = open_model(checkpoint, data)
    shards, split = opened.shards, opened.config.data.split
    chosen = as_clip(shards, clip)
    starts = dense_starts(chosen.frames, opened.config.data.window.span)
    windows = [centre_window(0, start, shards.image_size, opened.config.data.crop) for start in starts]
    scored = score_windows(opened, [chosen], windows)
    role = find_record(shards, clip)[f"split{split}"] or "no"
    title = f"{clip}: {shards.actions[chosen.label]} ({role} clip of split {split})"
    video = storage.absolute(f"{out}.mp4")
    storage.write_bytes(video, _video(scored, chosen, shards.actions, title))
    done, picture = cv2.imencode(".png", cv2.cvtColor(_strip(scored, chosen, shards.actions, title), cv2.COLOR_RGB2BGR))
    assert done
    storage.write_bytes(storage.absolute(f"{out}.png"), picture.tobytes())
    _print_scores(scored, chosen, shards.actions, title)
    if not scored[0].attention:
        say("No attention to draw: the model has none (model.stam_depth 0).")
    say(f"{out}.mp4 and {out}.png")
    return scored


def _print_scores(scored: list[ScoredWindow], clip: Clip, actions: list[str], title: str) -> None:
    names = list(scored[0].scores)
    rows = []
    for result in scored:
        predicted = actions[int(result.scores[main_score(result)].argmax())]
        last = min(result.window.start + result.span, clip.frames) - 1
        scores = [percent(float(result.scores[name][clip.label])) for name in names]
        rows.append([f"{result.window.start} to {last}", *scores, predicted])
    print_table(title, ["frames", *(f"{name}, true class" for name in names), f"predicted, {names[-1]}"], rows)


def window_at(scored: list[ScoredWindow], frame: int) -> tuple[ScoredWindow, int]:
    """Return (the window whose middle is nearest to a frame of the clip, the frame's index in the window)."""
    holding = [result for result in scored if result.window.start <= frame < result.window.start + result.span]
    result = min(holding, key=lambda result: abs(frame - result.window.start - (result.span - 1) / 2))
    return result, (frame - result.window.start) // result.step


def _video(scored: list[ScoredWindow], clip: Clip, actions: list[str], title: str) -> bytes:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast"})
        stream.pix_fmt = "yuv420p"
        stream.height, stream.width = _frame(scored, 0, clip, actions, title).shape[:2]
        for frame in range(clip.frames):
            image = _frame(scored, frame, clip, actions, title)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def _frame(scored: list[ScoredWindow], frame: int, clip: Clip, actions: list[str], title: str) -> np.ndarray:
    """Draw one frame of the video, RGB uint8, both sides even."""
    result, place = window_at(scored, frame)
    pictures = panels(result, place, _SIDE)
    columns = {"frame": main_score(result), **{name: name for name in result.scores if name != "fused"}}
    if len(result.scores) == 1:
        del columns[main_score(result)]
    columns |= {name: "" for name in result.attention if name not in columns}
    parts = []
    for name, scores in columns.items():
        head = f"{name} attention, yellow is high" if name in pictures else f"{name} has no attention"
        head = "crop, gaze" if name == "frame" else head
        picture = pictures.get(name, np.full((_SIDE, _SIDE, 3), 240, np.uint8))
        bars = _bars(result.scores[scores], clip.label, actions, scores) if scores else _blank(_bars_height(), _SIDE)
        parts.append(np.concatenate([_text(head, _SIDE), picture, bars]))
    body = _side_by_side(parts)
    width = body.shape[1]
    place_in_clip = _text(f"frame {frame} of {clip.frames}", width)
    image = np.concatenate([_wrapped(title, width), place_in_clip, body, _plot(scored, clip, width, frame)])
    return image[: image.shape[0] // 2 * 2, : width // 2 * 2]


def _strip(scored: list[ScoredWindow], clip: Clip, actions: list[str], title: str) -> np.ndarray:
    """Draw up to 8 frames, evenly spaced: frame, attention of each stream and predicted class; below, the scores."""
    chosen = sorted({round(place) for place in np.linspace(0, clip.frames - 1, _STRIP_FRAMES)})
    names = list(panels(*window_at(scored, 0), _STRIP_SIDE))
    left = [_text("", _STRIP_MARGIN)]
    for name in names:
        cell = _blank(_STRIP_SIDE, _STRIP_MARGIN)
        for number, word in enumerate(("crop, gaze",) if name == "frame" else (name, "attention,", "yellow: high")):
            _put(cell, word, (4, _STRIP_SIDE // 2 + _LINE * number), _INK)
        left += [cell, _blank(_GAP, _STRIP_MARGIN)]
    left.append(_text("predicted", _STRIP_MARGIN))
    left.append(_text("its score", _STRIP_MARGIN))
    parts = [np.concatenate(left)]
    for frame in chosen:
        result, place = window_at(scored, frame)
        scores = result.scores[main_score(result)]
        predicted = int(scores.argmax())
        column = [_text(f"frame {frame}", _STRIP_SIDE)]
        for picture in panels(result, place, _STRIP_SIDE).values():
            column += [picture, _blank(_GAP, _STRIP_SIDE)]
        colour = _TRUE if predicted == clip.label else _COLOURS["rgb"]
        column.append(_text(_fitting(actions[predicted], _STRIP_SIDE), _STRIP_SIDE, colour))
        verdict = "right" if predicted == clip.label else "wrong"
        column.append(_text(f"{percent(float(scores[predicted]))}, {verdict}", _STRIP_SIDE, colour))
        parts.append(np.concatenate(column))
    body = _side_by_side(parts)
    return np.concatenate([_wrapped(title, body.shape[1]), body, _plot(scored, clip, body.shape[1], None)])


def _side_by_side(parts: list[np.ndarray]) -> np.ndarray:
    gap = _blank(parts[0].shape[0], _GAP)
    return np.concatenate([gap, *(piece for part in parts for piece in (part, gap))], axis=1)


def _blank(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 255, np.uint8)


def _put(
    image: np.ndarray, text: str, place: tuple[int, int], colour: tuple[int, int, int], size: float = 0.42
) -> None:
    cv2.putText(image, text, place, cv2.FONT_HERSHEY_SIMPLEX, size, colour, 1, cv2.LINE_AA)


def _text(text: str, width: int, colour: tuple[int, int, int] = _INK) -> np.ndarray:
    image = _blank(_LINE, width)
    _put(image, text, (2, _LINE - 6), colour)
    return image


def _wrapped(text: str, width: int) -> np.ndarray:
    """Draw a text in as many lines as it needs."""
    return np.concatenate([_text(line, width) for line in _lines(text, width)])


def _lines(text: str, width: int) -> list[str]:
    """Split a text into lines of at most `width` pixels, between words or within a word that is too long."""
    words, lines = text.split(), [""]
    while words:
        longer = f"{lines[-1]} {words[0]}".lstrip()
        if _fitting(longer, width) == longer:
            lines[-1] = longer
            words.pop(0)
        elif lines[-1]:
            lines.append("")
        else:
            lines[-1] = _fitting(words[0], width) or words[0][0]
            words[0] = words[0][len(lines[-1]) :]
    return lines


def _fitting(text: str, width: int) -> str:
    """Cut a text to a width in pixels."""
    while text and cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)[0][0] > width - 4:
        text = text[:-1]
    return text


def _bars_height() -> int:
    return _LINE + _TOP * (_LINE + 12)


def _bars(scores_K: np.ndarray, label: int, actions: list[str], name: str) -> np.ndarray:
    """Draw the highest class scores of a window. The true class is green, and in the last place if it is lower."""
    image = _blank(_bars_height(), _SIDE)
    _put(image, f"{name} scores", (2, _LINE - 5), _COLOURS[name])
    shown = [int(index) for index in np.argsort(-scores_K)[:_TOP]]
    shown = shown if label in shown else [*shown[:-1], label]
    for place, index in enumerate(shown):
        top = _LINE + place * (_LINE + 12)
        colour = _TRUE if index == label else _INK
        text = f"{100 * scores_K[index]:.1f} %"
        mark = " (true)" if index == label else ""
        _put(image, _fitting(actions[index] + mark, _SIDE - 60), (2, top + 14), colour)
        _put(image, text, (_SIDE - 56, top + 14), colour)
        cv2.rectangle(image, (2, top + 20), (_SIDE - 2, top + 26), (235, 235, 235), cv2.FILLED)
        end = 2 + round((_SIDE - 4) * float(scores_K[index]))
        cv2.rectangle(image, (2, top + 20), (end, top + 26), colour, cv2.FILLED)
    return image


def _plot(scored: list[ScoredWindow], clip: Clip, width: int, now: int | None) -> np.ndarray:
    """Plot the true class's score over the clip, each window at its middle frame; frame `now` is marked."""
    image = _blank(_PLOT, width)
    left, right, top, bottom = 46, width - 16, 48, _PLOT - 30

    def at(frame: float, score: float) -> tuple[int, int]:
        return round(left + (right - left) * frame / max(clip.frames - 1, 1)), round(bottom - (bottom - top) * score)

    for score in (0.0, 0.5, 1.0):
        cv2.line(image, at(0, score), at(clip.frames - 1, score), _GREY, 1)
        _put(image, f"{100 * score:.0f} %", (4, at(0, score)[1] + 4), _INK, 0.38)
    _put(image, "score of the true class, each window at its middle", (left, 16), _INK, 0.38)
    for number, name in enumerate(scored[0].scores):
        x = left + 70 * number
        cv2.line(image, (x, 30), (x + 20, 30), _COLOURS[name], 2, cv2.LINE_AA)
        _put(image, name, (x + 25, 34), _INK)
        points = [_middle(result, clip, float(result.scores[name][clip.label]), at) for result in scored]
        for first, second in pairwise(points):
            cv2.line(image, first, second, _COLOURS[name], 2, cv2.LINE_AA)
        for point in points:
            cv2.circle(image, point, 3, _COLOURS[name], cv2.FILLED, cv2.LINE_AA)
    _put(image, "frame 0", (left, _PLOT - 10), _INK, 0.38)
    _put(image, str(clip.frames - 1), (right - 24, _PLOT - 10), _INK, 0.38)
    if now is not None:
        cv2.line(image, at(now, 0), at(now, 1), (120, 120, 120), 1)
    return image


def _middle(result: ScoredWindow, clip: Clip, score: float, at: Any) -> tuple[int, int]:
    last = min(result.window.start + result.span, clip.frames) - 1
    place: tuple[int, int] = at((result.window.start + last) / 2, score)
    return place
