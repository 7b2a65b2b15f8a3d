"""Attention maps for the report: the test clips on which a model is surest, and those on which it is most wrong."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np

from tune_ego.config import WINDOW_FRAMES
from tune_ego.dataset.shards import Clip
from tune_ego.evaluation.attention_maps import Look, look_at, main_score, panels
from tune_ego.evaluation.evaluate import open_model
from tune_ego.feed.sampling import centre_window, spread_starts

_MOST_CLIPS = 200
_CASES = 6
"""Of each kind."""
_SIDE = 224  # pixels of a picture


def attention_cases(checkpoint: str, data: str) -> tuple[dict[str, Any], list[str]]:
    """(numbers of the cases, their pictures as data URIs) on test clips of the split that the model was trained on.

    Up to 200 of them, evenly spread, one window in the middle of each. Raises `UserError` where checkpoint and shards
    do not belong together.
    """
    opened = open_model(checkpoint, data)
    split = opened.config.data.split
    everything = opened.shards.test(split)
    places = np.unique(np.linspace(0, len(everything) - 1, min(_MOST_CLIPS, len(everything))).round().astype(int))
    clips = [everything[place] for place in places]
    size, crop = opened.shards.image_size, opened.config.data.crop
    windows = [centre_window(n, spread_starts(clip.frames, 1)[0], size, crop) for n, clip in enumerate(clips)]
    found: list[tuple[dict[str, Any], Look]] = []
    for look in look_at(opened, clips, windows):
        found.append((_case(look, clips[look.window.clip], opened.shards.actions), look))
    right = sorted((one for one in found if one[0]["right"]), key=lambda one: -one[0]["label_score"])
    wrong = sorted((one for one in found if not one[0]["right"]), key=lambda one: one[0]["label_score"])
    chosen = [({**case, "group": "best"}, look) for case, look in right[:_CASES]]
    chosen += [({**case, "group": "worst"}, look) for case, look in wrong[:_CASES]]
    numbers = {
        "why": "",
        "checkpoint": opened.source,
        "split": split,
        "clips": len(everything),
        "clips_seen": len(clips),
        "right": len(right),
        "fused": main_score(found[0][1]),
        "cases": [case for case, _ in chosen],
    }
    return numbers, [_picture(look, case["frame"] - look.window.start) for case, look in chosen]


def _case(look: Look, clip: Clip, actions: list[str]) -> dict[str, Any]:
    scores = look.scores[main_score(look)]
    predicted = int(scores.argmax())
    middle = WINDOW_FRAMES // 2
    # The frame nearest to the middle that has gaze, else the middle.
    order = sorted(range(min(WINDOW_FRAMES, clip.frames)), key=lambda frame: abs(frame - middle))
    frame = next((frame for frame in order if look.gaze(frame)), order[0])
    point = look.gaze(frame)
    return {
        "clip": clip.name,
        "frame": look.window.start + frame,
        "gaze": None if point is None else list(point),
        "label": actions[clip.label],
        "label_score": float(scores[clip.label]),
        "predicted": actions[predicted],
        "predicted_score": float(scores[predicted]),
        "right": predicted == clip.label,
    }


def _picture(look: Look, frame: int) -> str:
    """Frame and attention side by side, a JPEG as data URI."""
    parts = list(panels(look, frame, _SIDE).values())
    gap = np.full((_SIDE, 4, 3), 128, np.uint8)
    image = np.concatenate([part for one in parts for part in (gap, one)][1:], axis=1)
    done, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    assert done
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()
