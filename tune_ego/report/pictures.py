"""Attention maps for a report, on the test clips with the highest and the lowest scores of the true class."""

from __future__ import annotations

import base64
from typing import Any

import cv2
import numpy as np

from tune_ego.dataset.shards import Clip
from tune_ego.evaluation.attention_maps import ScoredWindow, main_score, panels, score_windows
from tune_ego.evaluation.evaluate import open_model
from tune_ego.feed.sampling import centre_window, spread_starts

_MOST_CLIPS = 200
"""Most test clips that are scored."""
_CASES_PER_GROUP = 6
_PICTURE_SIDE = 224
"""Width and height of a frame in a picture, pixels."""


def attention_cases(checkpoint: str, data: str) -> tuple[dict[str, Any], list[str]]:
    """Score the middle window of up to 200 test clips and draw the attention of the best and worst cases.

    Args:
        checkpoint: A run, a checkpoint's folder or its file.
        data: Folder or URI of the shards. Its test clips are those of the split that the model was trained on, evenly
            spread where there are more than 200.

    Returns:
        Numbers of the cases, and a picture of each case as data URI, in the same order. `best` cases are the right
        predictions with the highest score of the true class, `worst` cases the wrong ones with the lowest.

    Raises:
        UserError: The checkpoint does not fit the shards.
    """
    opened = open_model(checkpoint, data)
    split = opened.config.data.split
    test_clips = opened.shards.test(split)
    places = np.unique(np.linspace(0, len(test_clips) - 1, min(_MOST_CLIPS, len(test_clips))).round().astype(int))
    clips = [test_clips[place] for place in places]
    size, crop, span = opened.shards.image_size, opened.config.data.crop, opened.config.data.window.span
    windows = [centre_window(n, spread_starts(clip.frames, 1, span)[0], size, crop) for n, clip in enumerate(clips)]
    cases: list[tuple[dict[str, Any], ScoredWindow]] = []
    for scored in score_windows(opened, clips, windows):
        cases.append((_describe_case(scored, clips[scored.window.clip], opened.shards.actions), scored))
    right = sorted((entry for entry in cases if entry[0]["right"]), key=lambda entry: -entry[0]["label_score"])
    wrong = sorted((entry for entry in cases if not entry[0]["right"]), key=lambda entry: entry[0]["label_score"])
    chosen = [({**case, "group": "best"}, scored) for case, scored in right[:_CASES_PER_GROUP]]
    chosen += [({**case, "group": "worst"}, scored) for case, scored in wrong[:_CASES_PER_GROUP]]
    numbers = {
        "why": "",
        "checkpoint": opened.source,
        "split": split,
        "clips": len(test_clips),
        "clips_seen": len(clips),
        "right": len(right),
        "fused": main_score(cases[0][1]),
        "cases": [case for case, _ in chosen],
    }
    return numbers, [_picture(scored, (case["frame"] - scored.window.start) // scored.step) for case, scored in chosen]


def _describe_case(scored: ScoredWindow, clip: Clip, actions: list[str]) -> dict[str, Any]:
    """Return the numbers of one case: its clip, the frame to draw, its gaze point, and the scores."""
    scores = scored.scores[main_score(scored)]
    predicted = int(scores.argmax())
    frames = len(scored.frames_THW3)
    # The frame with gaze that is nearest to the middle of the window, else the middle frame.
    inside = min(frames, -(-clip.frames // scored.step))  # the last frame of a short clip is repeated
    order = sorted(range(inside), key=lambda frame: abs(frame - frames // 2))
    frame = next((frame for frame in order if scored.gaze(frame)), order[0])
    point = scored.gaze(frame)
    return {
        "clip": clip.name,
        "frame": scored.window.start + frame * scored.step,
        "gaze": None if point is None else list(point),
        "label": actions[clip.label],
        "label_score": float(scores[clip.label]),
        "predicted": actions[predicted],
        "predicted_score": float(scores[predicted]),
        "right": predicted == clip.label,
    }


def _picture(scored: ScoredWindow, frame: int) -> str:
    """Draw frame and attention maps side by side; return a JPEG as data URI."""
    parts = list(panels(scored, frame, _PICTURE_SIDE).values())
    gap = np.full((_PICTURE_SIDE, 4, 3), 128, np.uint8)
    gapped = [column for part in parts for column in (gap, part)][1:]
    image = np.concatenate(gapped, axis=1)  # [224, width, RGB], uint8
    encoded, content = cv2.imencode(".jpg", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, 82])
    assert encoded
    return "data:image/jpeg;base64," + base64.b64encode(content.tobytes()).decode()
