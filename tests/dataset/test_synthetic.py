"""The synthetic EGTEA: its files against the rules that they were made by."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from tests.dataset.test_gaze import literal
from tune_ego.dataset.synthetic import _class_sizes, synthesize
from tune_ego.errors import UserError

CLASSES = [(verb, noun) for verb in ("Slide", "Lift", "Stir") for noun in ("red_disc", "blue_square")]
COLOURS = {1: (210, 40, 40), 2: (50, 80, 220)}
ARGUMENTS: dict[str, Any] = {"verbs": 3, "nouns": 2, "clips": 60, "seconds": 0.6, "size": (96, 72), "seed": 5}


class OneProcess:
    """A process pool's interface, without processes."""

    def __init__(self, mp_context: object) -> None: ...

    def __enter__(self) -> OneProcess:
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, work: Callable[[Any], object], jobs: Iterable[Any], chunksize: int) -> Iterable[object]:
        return map(work, jobs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 clips of six classes in two sessions."""
    root = tmp_path_factory.mktemp("synthetic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune_ego.dataset.synthetic.ProcessPoolExecutor", OneProcess)
        synthesize(root / "egtea", **ARGUMENTS)
    return root / "egtea"


def labels_of(root: Path) -> dict[str, tuple[int, int, int]]:
    """Clip -> action, verb, noun."""
    labels: dict[str, tuple[int, int, int]] = {}
    for role in ("train", "test"):
        for line in (root / "action_annotation" / f"{role}_split1.txt").read_text().splitlines():
            clip, action, verb, noun = line.split()
            labels[clip] = (int(action), int(verb), int(noun))
    return labels


def numbers_of(clip: str) -> tuple[str, int, int, int, int]:
    """Session, first and last millisecond, first and last frame."""
    match = re.fullmatch(r"(.*)-(\d+)-(\d+)-F(\d{6})-F(\d{6})", clip)
    assert match
    session, *numbers = match.groups()
    start, end, first, last = map(int, numbers)
    return session, start, end, first, last


def centres(root: Path, clip: str, noun: int) -> list[tuple[float, float]]:
    """The middle of what has the noun's colour, per frame, in [0, 1] of width and height."""
    points = []
    with av.open(str(root / "cropped_clips" / numbers_of(clip)[0] / f"{clip}.mp4")) as container:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="rgb24").astype(float)
            near = np.abs(image - COLOURS[noun]).max(axis=-1) < 40
            y, x = np.nonzero(near)
            points.append(((x.mean() + 0.5) / 96, (y.mean() + 0.5) / 72))
    return points


def test_the_same_arguments_give_the_same_files(egtea: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, against those of the shared data set, which other processes have made."""
    monkeypatch.setattr("tune_ego.dataset.synthetic.ProcessPoolExecutor", OneProcess)
    synthesize(tmp_path / "again", verbs=2, nouns=2, clips=40, seconds=0.8, size=(96, 72), seed=3)
    for pattern, count in (("action_annotation/*.txt", 9), ("gaze_data/**/*.txt", 2), ("cropped_clips/**/*.mp4", 40)):
        files = sorted(egtea.glob(pattern))
        assert len(files) == count
        for file in files:
            assert (tmp_path / "again" / file.relative_to(egtea)).read_bytes() == file.read_bytes()


def test_class_names_count_from_one(made: Path) -> None:
    folder = made / "action_annotation"
    expected = [f"{verb} {noun} {number}" for number, (verb, noun) in enumerate(CLASSES, start=1)]
    assert (folder / "action_idx.txt").read_text().splitlines() == expected
    assert (folder / "verb_idx.txt").read_text() == "Slide 1\nLift 2\nStir 3\n"
    assert (folder / "noun_idx.txt").read_text() == "red_disc 1\nblue_square 2\n"
    labels = labels_of(made)
    assert Counter(labels.values()) == {
        (1, 1, 1): 10,
        (2, 1, 2): 10,
        (3, 2, 1): 10,
        (4, 2, 2): 10,
        (5, 3, 1): 10,
        (6, 3, 2): 10,
    }


def test_a_fifth_of_each_class_is_tested_in_each_split(made: Path) -> None:
    labels = labels_of(made)
    tests = []
    for split in (1, 2, 3):
        sides = [
            {
                line.split()[0]
                for line in (made / "action_annotation" / f"{role}_split{split}.txt").read_text().split("\n")[:-1]
            }
            for role in ("train", "test")
        ]
        assert sides[0] | sides[1] == labels.keys() and not sides[0] & sides[1]
        assert Counter(labels[clip][0] for clip in sides[1]) == dict.fromkeys(range(1, 7), 2)
        tests.append(sides[1])
    assert len(tests[0] | tests[1] | tests[2]) == 36  # no clip is tested twice


def test_clips_lie_twelve_frames_apart_in_their_sessions(made: Path) -> None:
    sessions: dict[str, list[tuple[int, int]]] = {}
    for clip in labels_of(made):
        session, start, end, first, last = numbers_of(clip)
        assert (start, end) == (round(first * 1000 / 24), round(last * 1000 / 24))
        sessions.setdefault(session, []).append((first, last))
    assert {session: len(clips) for session, clips in sessions.items()} == {
        "OP01-R01-Synthetic": 36,
        "P02-R02-Synthetic": 24,
    }
    for places in sessions.values():
        ordered = sorted(places)
        assert ordered[0][0] == 12
        assert all(after[0] - before[1] == 12 for before, after in pairwise(ordered))
    # 0.6 seconds are 14.4 frames; lengths go from two thirds of that to four thirds.
    lengths = [last - first for places in sessions.values() for first, last in places]
    assert (min(lengths), max(lengths)) == (10, 19)
    assert 13.4 < sum(lengths) / 60 < 15.4


def test_clips_are_h264_of_the_length_that_their_names_say(made: Path) -> None:
    for clip in [*labels_of(made)][::7]:
        session, _, _, first, last = numbers_of(clip)
        with av.open(str(made / "cropped_clips" / session / f"{clip}.mp4")) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 24)
            assert (stream.width, stream.height) == (96, 72)
            assert sum(1 for _ in container.decode(video=0)) == last - first


def test_gaze_rests_on_the_object_of_the_clip_s_noun(made: Path) -> None:
    """In both layouts, at the frames of the session that the clip's name says."""
    for session in ("OP01-R01-Synthetic", "P02-R02-Synthetic"):
        gaze = literal(made / "gaze_data" / "gaze_data" / f"{session}.txt")
        clips = [clip for clip in labels_of(made) if clip.startswith(session)]
        for clip in clips[::3]:
            first = numbers_of(clip)[3]
            pairs = [
                (gaze.get(first + place), centre)
                for place, centre in enumerate(centres(made, clip, labels_of(made)[clip][2]))
            ]
            seen = [(point, centre) for point, centre in pairs if point is not None]
            assert len(seen) > len(pairs) / 2
            offsets = np.array([np.subtract(point, centre) for point, centre in seen])
            # The gaze is off by about 1 % of the image; half an object's size is 14 %.
            assert np.abs(np.median(offsets, axis=0)).max() < 0.02
            assert np.abs(offsets).max() < 0.07


def test_the_verb_is_the_motion_of_the_object(made: Path) -> None:
    """Slide moves in x, Lift in y, Stir in both, by a tenth of the image's height; the camera shakes by less."""
    spread: dict[int, list[np.ndarray]] = {1: [], 2: [], 3: []}
    for clip, (_, verb, noun) in [*labels_of(made).items()][::2]:
        spread[verb].append(np.array(centres(made, clip, noun)).std(axis=0) * (96, 72))
    slide, lift, stir = (np.median(values, axis=0) for values in spread.values())
    # A sine of amplitude 7.2 pixels has a standard deviation of 5.1.
    assert slide == pytest.approx((5.1, 0.5), abs=1)
    assert lift == pytest.approx((0.8, 5.1), abs=1)
    assert stir == pytest.approx((5.1, 5.1), abs=1)


def test_a_distractor_has_another_noun_and_lies_elsewhere(made: Path) -> None:
    """A third of the image away, between the middles of both paths."""
    for clip, (_, _, noun) in [*labels_of(made).items()][::6]:
        target, other = (np.mean(centres(made, clip, kind), axis=0) for kind in (noun, 3 - noun))
        assert np.linalg.norm(target - other) > 0.3


def test_one_session_in_two_is_of_each_gaze_layout(made: Path) -> None:
    folder = made / "gaze_data" / "gaze_data"
    heads = {file.stem: file.read_bytes().split(b"\r\n")[:10] for file in folder.iterdir()}
    assert heads["OP01-R01-Synthetic"][1].endswith(b"BeGaze 3.1.77")
    assert heads["P02-R02-Synthetic"][1].endswith(b"BeGaze 3.4.46")
    assert all(b"## Calibration Area:\t1280\t960" in head for head in heads.values())
    old, new = ((folder / f"{name}-Synthetic.txt").read_text().splitlines()[8:] for name in ("OP01-R01", "P02-R02"))
    # 30 samples a second, 24 frames a second: of five samples, two are of one frame.
    assert [line.split("\t")[5] for line in old[1:12]] == ["0", "0", "1", "2", "3", "4", "4", "5", "6", "7", "8"]
    clocks = [line.split("\t")[7] for line in new[1:]]
    assert clocks[:3] == ["00:00:00:00", "00:00:00:00", "00:00:00:01"]
    assert clocks[29:31] == ["00:00:00:23", "00:00:01:00"]
    assert clocks[600] == "00:00:20:00"
    events = Counter(line.split("\t")[-1] for line in (*old[1:], *new[1:]))
    total = events.total()
    assert 0.62 < events["Fixation"] / total < 0.78 and 0.16 < events["Saccade"] / total < 0.3
    assert 0.02 < events["Blink"] / total < 0.1 and events["-"] > 0


@pytest.mark.parametrize(
    ("arguments", "option"),
    [
        ({"clips": 59}, "clips"),  # 12 classes need 60
        ({"verbs": 0}, "verbs"),
        ({"verbs": 4}, "verbs"),
        ({"nouns": 7}, "nouns"),
        ({"size": (97, 72)}, "size"),
        ({"size": (96, 73)}, "size"),
        ({"size": (96, 46)}, "size"),
        ({"seconds": 0.24}, "seconds"),
    ],
)
def test_arguments_that_no_data_set_can_have_are_refused(
    tmp_path: Path, arguments: dict[str, Any], option: str
) -> None:
    with pytest.raises(UserError, match=f"--{option}"):
        synthesize(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_a_folder_that_holds_something_is_not_written_into(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UserError, match="not empty"):
        synthesize(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(("imbalance", "seed"), [(1.0, 0), (20.0, 0), (20.0, 3), (3.0, 1)])
def test_classes_have_the_ratio_of_the_imbalance(imbalance: float, seed: int) -> None:
    """The logarithms of the sizes are evenly spaced; the order of the classes is that of no verb and no noun."""
    sizes = _class_sizes(720, 9, imbalance, seed)
    assert sum(sizes) == 720
    assert max(sizes) / min(sizes) == pytest.approx(imbalance, rel=0.06)
    logarithms = np.log(sorted(sizes))
    assert np.diff(logarithms) == pytest.approx(np.full(8, np.log(imbalance) / 8), abs=0.12)
    if imbalance > 1:
        assert sizes != sorted(sizes) and sizes != sorted(sizes, reverse=True)
        assert sizes != _class_sizes(720, 9, imbalance, seed + 1)


def test_rare_classes_are_in_every_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tune_ego.dataset.synthetic._write_videos", lambda *_, **__: None)
    synthesize(tmp_path / "egtea", **{**ARGUMENTS, "clips": 90}, imbalance=5)
    sizes = _class_sizes(90, 6, 5, 5)
    counts = Counter(action for action, _, _ in labels_of(tmp_path / "egtea").values())
    assert counts == dict(enumerate(sizes, start=1))
    for split in (1, 2, 3):
        lines = (tmp_path / "egtea" / "action_annotation" / f"test_split{split}.txt").read_text().splitlines()
        tested = Counter(int(line.split()[1]) for line in lines)
        assert all(size // 5 <= tested[number] <= size // 5 + 1 for number, size in enumerate(sizes, start=1))
    with pytest.raises(UserError, match="would have 3 and needs 5; raise --clips or lower --imbalance"):
        synthesize(tmp_path / "other", **{**ARGUMENTS, "clips": 90}, imbalance=12)
    for ratio in (0.5, math.nan, math.inf):
        with pytest.raises(UserError, match="--imbalance"):
            synthesize(tmp_path / "other", **ARGUMENTS, imbalance=ratio)
