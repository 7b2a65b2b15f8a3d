"""One shard of three made-up clips, written without Ray; the plan of shards; and the claim on an output."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest

from tune_ego.dataset.annotations import (
    AnnotatedClip,
    Annotations,
    find_clips,
    find_gaze,
    parse_clip_name,
    read_annotations,
)
from tune_ego.dataset.closing import write_dataset
from tune_ego.dataset.prepare import Settings, ShardTask, plan_shards, prepare, write_task
from tune_ego.dataset.shards import Problem, read_shard_records
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

SESSION = "OP01-R01-Tea"
STILL, MOVING, SHORT = (
    f"{SESSION}-417-1250-F000010-F000030",
    f"{SESSION}-1667-2083-F000040-F000050",
    f"{SESSION}-2292-2375-F000055-F000057",
)
LABELS = {STILL: "2 3 4 1", MOVING: "1 1 2", SHORT: "3 2 3"}
"""Action, verb and nouns, from 1, as EGTEA's files have them."""
SETTINGS = Settings((64, 48))


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """RGB frames, hardly compressed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "2", "preset": "ultrafast"})
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def still_frames(count: int) -> list[np.ndarray]:
    """Red on the left, blue on the right."""
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32] = (200, 30, 40)
    image[:, 32:] = (30, 40, 200)
    return [image] * count


def moving_frames(count: int) -> list[np.ndarray]:
    """A grey texture that moves 3 pixels to the right and 2 up from frame to frame."""
    coarse = np.random.default_rng(0).uniform(20, 230, (24, 24)).astype(np.float32)
    scene = np.clip(cv2.resize(coarse, (144, 144), interpolation=cv2.INTER_CUBIC), 0, 255).astype(np.uint8)
    places = [(40 + 2 * time, 60 - 3 * time) for time in range(count)]
    return [np.repeat(scene[y : y + 48, x : x + 64, None], 3, axis=2) for y, x in places]


def write_folder(root: Path) -> Path:
    """An EGTEA folder of one session with 60 frames of gaze: that of frame k is (10 k, 5 k) of 1280 x 960 pixels.

    Frame 44 has a blink only.
    """
    write_video(root / "cropped_clips" / f"{STILL}.mp4", still_frames(20))
    write_video(root / "cropped_clips" / f"{MOVING}.mp4", moving_frames(10))
    write_video(root / "cropped_clips" / f"{SHORT}.mp4", still_frames(3))  # its name says 2
    samples = [f"1\t{10 * k}\t{5 * k}\t{k}\t{'Blink' if k == 44 else 'Fixation'}" for k in range(60)]
    (root / "gaze_data").mkdir()
    columns = "Time\tL POR X [px]\tL POR Y [px]\tFrame\tL Event Info"
    (root / "gaze_data" / f"{SESSION}.txt").write_text("\n".join([columns, *samples]) + "\n")
    write_labels(root, LABELS)
    return root


def write_labels(root: Path, labels: dict[str, str]) -> None:
    """All clips are training clips of splits 1 and 2; `SHORT` is a test clip of split 3, and the others of none."""
    folder = root / "action_annotation"
    folder.mkdir(exist_ok=True)
    for kind, count in (("action", 4), ("verb", 3), ("noun", 4)):
        lines = [f"{kind}{number} {number}" for number in range(1, count + 1)]
        (folder / f"{kind}_idx.txt").write_text("\n".join(lines) + "\n")
    for split in (1, 2, 3):
        lines = [f"{clip} {label}" for clip, label in labels.items()]
        (folder / f"train_split{split}.txt").write_text("\n".join(lines if split < 3 else []) + "\n")
        (folder / f"test_split{split}.txt").write_text("\n".join(lines[-1:] if split == 3 else []) + "\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("made") / "egtea")


def annotated(name: str, labels: str = "1 1 1", roles: tuple[str, str, str] = ("train", "", "test")) -> AnnotatedClip:
    action, verb, *nouns = map(int, labels.split())
    return AnnotatedClip(parse_clip_name(name), action, verb, tuple(nouns), roles, 4, 7)


def task_of(root: Path, names: list[str], gaze: bool = True) -> ShardTask:
    clips = [annotated(name, LABELS[name]) for name in names]
    gaze_file = f"{root}/gaze_data/{SESSION}.txt" if gaze else None
    videos: list[str | None] = [f"{root}/cropped_clips/{name}.mp4" for name in names]
    return ShardTask("frames/part-0000.parquet", clips, videos, [gaze_file] * len(names), {f"{SESSION}.txt": "1"})


def write_shards(root: Path, out: Path, settings: Settings = SETTINGS) -> str:
    """The finished data set of a folder."""
    annotations = read_annotations(root)
    results = [
        write_task(task, str(out), settings) for task in plan_shards(annotations, find_clips(root), find_gaze(root))
    ]
    records, problems = ([entry for result in results for entry in result[part]] for part in (0, 1))
    write_dataset(annotations, records, problems, settings.record(), str(out), False)  # type: ignore[arg-type]
    return str(out)


def rows_of(out: Path, clip: str) -> list[dict[str, Any]]:
    rows = pq.ParquetFile(out / "frames" / "part-0000.parquet").read().to_pylist()
    return [row for row in rows if row["clip"] == clip]


def decoded(row: dict[str, Any], column: str) -> np.ndarray:
    flag = cv2.IMREAD_COLOR_RGB if column == "rgb" else cv2.IMREAD_UNCHANGED
    return np.asarray(cv2.imdecode(np.frombuffer(row[column], np.uint8), flag))


@pytest.mark.parametrize(("offset", "first"), [(0, 40), (2, 42), (-3, 37)])
def test_gaze_is_that_of_the_clip_s_session_frames_plus_the_offset(
    root: Path, tmp_path: Path, offset: int, first: int
) -> None:
    result = write_task(task_of(root, [MOVING]), str(tmp_path), SETTINGS._replace(frame_offset=offset))
    rows = rows_of(tmp_path, MOVING)
    frames = [first + place for place in range(10)]
    assert [row["frame"] for row in rows] == list(range(10))
    assert [row["gaze_valid"] for row in rows] == [frame != 44 for frame in frames]
    assert [row["gaze_event"] for row in rows] == ["Blink" if frame == 44 else "Fixation" for frame in frames]
    for column, share in (("gaze_x", 10 / 1280), ("gaze_y", 5 / 960)):
        expected = [math.nan if frame == 44 else frame * share for frame in frames]
        stored = [math.nan if row[column] is None else row[column] for row in rows]
        assert stored == pytest.approx(expected, nan_ok=True, abs=1e-6)
        assert [row[column] is None for row in rows] == [frame == 44 for frame in frames]
    assert result.records[0]["gaze_frames"] == 9 and result.problems == []


def test_frames_before_the_recording_and_behind_it_have_no_gaze(root: Path, tmp_path: Path) -> None:
    result = write_task(task_of(root, [STILL, MOVING, SHORT]), str(tmp_path), SETTINGS._replace(frame_offset=-20))
    assert [row["gaze_valid"] for row in rows_of(tmp_path, STILL)] == [False] * 10 + [True] * 10
    result = write_task(task_of(root, [STILL, MOVING, SHORT]), str(tmp_path), SETTINGS._replace(frame_offset=15))
    assert [row["gaze_valid"] for row in rows_of(tmp_path, MOVING)] == [True] * 5 + [False] * 5
    assert [problem for problem in result.problems if problem.stage == "gaze"] == [
        Problem(SHORT, "gaze", "no frame with usable gaze", True)
    ]
    assert [record["gaze_frames"] for record in result.records] == [19, 5, 0]


def test_records_of_a_shard(root: Path, tmp_path: Path) -> None:
    """Ids count from 0 here; a clip of 20 frames has two row groups of at most 16."""
    task = task_of(root, [STILL, MOVING, SHORT])
    result = write_task(task, str(tmp_path), SETTINGS)
    fixed = {"session": SESSION, "subject": "OP01", "split1": "train", "split2": "", "split3": "test"}
    fixed |= {"shard": "frames/part-0000.parquet"}
    folds = {"stratified_fold": 4, "session_fold": 7}
    expected = [
        {"clip": STILL, "action": 1, "verb": 2, "nouns": [3, 0], "frames": 20, "gaze_frames": 20, "row_group": 0},
        {"clip": MOVING, "action": 0, "verb": 0, "nouns": [1], "frames": 10, "gaze_frames": 9, "row_group": 2},
        {"clip": SHORT, "action": 2, "verb": 1, "nouns": [2], "frames": 3, "gaze_frames": 3, "row_group": 3},
    ]
    assert result.records == [{**record, **fixed, **folds} for record in expected]
    assert result.problems == [Problem(SHORT, "length", "3 frames, its name says 2", True)]
    written = read_shard_records(f"{tmp_path}/frames/part-0000.parquet")
    assert written == (result.records, result.problems, {f"{SESSION}.txt": "1"})
    file = pq.ParquetFile(tmp_path / "frames" / "part-0000.parquet")
    groups = [file.read_row_group(group).to_pylist() for group in range(file.num_row_groups)]
    assert [[group[0]["clip"], group[0]["frame"], len(group)] for group in groups] == [
        [STILL, 0, 16],
        [STILL, 16, 4],
        [MOVING, 0, 10],
        [SHORT, 0, 3],
    ]


@pytest.mark.parametrize("gone", ["absent", "cut"])
def test_a_clip_that_cannot_be_read_leaves_no_rows_and_no_gap(root: Path, tmp_path: Path, gone: str) -> None:
    task = task_of(root, [STILL, MOVING, SHORT])
    if gone == "cut":
        (tmp_path / "cut.mp4").write_bytes((root / "cropped_clips" / f"{MOVING}.mp4").read_bytes()[:600])
    task.videos[1] = None if gone == "absent" else f"{tmp_path}/cut.mp4"
    result = write_task(task, str(tmp_path), SETTINGS)
    lost = [problem for problem in result.problems if not problem.kept]
    assert [(problem.clip, problem.stage) for problem in lost] == [(MOVING, "video")]
    assert lost[0].reason == "no mp4 of this name" or gone == "cut"
    assert [(record["clip"], record["row_group"]) for record in result.records] == [(STILL, 0), (SHORT, 2)]
    assert rows_of(tmp_path, MOVING) == []


def test_clips_of_a_session_without_a_gaze_file_are_kept(root: Path, tmp_path: Path) -> None:
    result = write_task(task_of(root, [MOVING], gaze=False), str(tmp_path), SETTINGS)
    assert result.problems == [Problem(MOVING, "gaze", "no gaze file of its session", True)]
    assert result.records[0]["gaze_frames"] == 0
    rows = rows_of(tmp_path, MOVING)
    assert {(row["gaze_x"], row["gaze_y"], row["gaze_event"], row["gaze_valid"]) for row in rows} == {
        (None, None, "", False)
    }


def test_stored_frames_are_red_where_the_video_is_red(root: Path, tmp_path: Path) -> None:
    """Twice as wide and half as high as the video; nothing moves, which is level 128 of the stored flow."""
    write_task(task_of(root, [STILL]), str(tmp_path), Settings((128, 24)))
    for row in rows_of(tmp_path, STILL):
        image, field = decoded(row, "rgb"), decoded(row, "flow")
        assert (image.shape, field.shape) == ((24, 128, 3), (48, 128))
        np.testing.assert_allclose(image[2:-2, 4:-76].mean(axis=(0, 1)), (200, 30, 40), atol=6)
        np.testing.assert_allclose(image[2:-2, 76:-4].mean(axis=(0, 1)), (30, 40, 200), atol=6)
        np.testing.assert_allclose(field, 128, atol=1)


def test_stored_flow_is_the_motion_to_the_next_frame_x_above_y(root: Path, tmp_path: Path) -> None:
    """(3, -2) pixels are the levels (3 + 20) 255 / 40 and (-2 + 20) 255 / 40."""
    write_task(task_of(root, [MOVING]), str(tmp_path), SETTINGS)
    rows = rows_of(tmp_path, MOVING)
    fields = [decoded(row, "flow").astype(float) for row in rows]
    for field in fields:
        assert np.median(field[8:40, 8:56]) == pytest.approx(146.6, abs=2)
        assert np.median(field[56:88, 8:56]) == pytest.approx(114.75, abs=2)
    assert rows[-1]["flow"] == rows[-2]["flow"] != rows[-3]["flow"]


def test_a_replaced_gaze_file_is_read_again(root: Path, tmp_path: Path) -> None:
    text = (root / "gaze_data" / f"{SESSION}.txt").read_text()
    file = tmp_path / f"{SESSION}.txt"
    for identity, event, frames in (("1", "Fixation", 9), ("2", "Blink", 0)):
        file.write_text(text.replace("Fixation", event))
        task = task_of(root, [MOVING])._replace(gaze=[str(file)], sources={file.name: identity})
        assert write_task(task, str(tmp_path / "out"), SETTINGS).records[0]["gaze_frames"] == frames


def planned(
    clips: list[tuple[int, tuple[str, str, str], int, int]], files: dict[str, SourceFile] | None = None
) -> list[ShardTask]:
    """The plan of clips given as (frames, roles, stratified fold, session fold), named in their order."""
    made = []
    for place, (frames, roles, stratified, session) in enumerate(clips):
        name = parse_clip_name(f"OP01-R01-Tea-{place:03d}-0-F000100-F{100 + frames:06d}")
        made.append(AnnotatedClip(name, 1, 1, (1,), roles, stratified, session))
    return plan_shards(Annotations(["a"], ["v"], ["n"], made), files or {}, {})


TRAIN, TEST = ("train", "train", "train"), ("test", "", "train")


def test_a_shard_holds_up_to_2000_frames() -> None:
    """Clips of one group in their order: 1200 + 800 fill a shard; the next ones start anew, and so does a long one."""
    sizes = [1200, 800, 1, 1998, 1, 1, 2500, 0, 1999, 1]
    tasks = planned([(frames, TRAIN, 0, 0) for frames in sizes])
    folder = "frames/roles=train-train-train/stratified_fold=0/session_fold=0"
    assert [task.shard for task in tasks] == [f"{folder}/part-{number:04d}.parquet" for number in range(6)]
    places = [[int(clip.name.name.split("-")[3]) for clip in task.clips] for task in tasks]
    assert places == [[0, 1], [2, 3, 4], [5], [6], [7, 8], [9]]
    # A name that says none counts as one frame.
    assert [task.frames for task in tasks] == [2000, 2000, 1, 2500, 2000, 1]


def test_each_set_of_roles_and_folds_has_shards_of_its_own() -> None:
    clips = [(1500, TRAIN, 0, 0), (10, TEST, 0, 0), (10, TRAIN, 3, 0), (10, TRAIN, 0, 5), (600, TRAIN, 0, 0)]
    tasks = planned([*clips, (10, TEST, 0, 0)])
    assert [(task.shard, len(task.clips)) for task in tasks] == [
        ("frames/roles=test-none-train/stratified_fold=0/session_fold=0/part-0000.parquet", 2),
        ("frames/roles=train-train-train/stratified_fold=0/session_fold=0/part-0000.parquet", 1),
        ("frames/roles=train-train-train/stratified_fold=0/session_fold=0/part-0001.parquet", 1),
        ("frames/roles=train-train-train/stratified_fold=0/session_fold=5/part-0000.parquet", 1),
        ("frames/roles=train-train-train/stratified_fold=3/session_fold=0/part-0000.parquet", 1),
    ]


def test_a_task_names_its_files_and_their_identities(root: Path) -> None:
    clips = [annotated(MOVING), annotated(STILL), annotated(f"{SESSION}-9-9-F000099-F000100")]
    videos, gaze = find_clips(root), find_gaze(root)
    (task,) = plan_shards(Annotations(["a"], ["v"], ["n"], clips), videos, gaze)
    files = [f"{root}/cropped_clips/{name}.mp4" for name in (MOVING, STILL)]
    assert task.videos == [*files, None]
    assert task.gaze == [f"{root}/gaze_data/{SESSION}.txt"] * 3
    text = Path(f"{root}/gaze_data/{SESSION}.txt").read_bytes()
    assert task.sources.keys() == {f"{MOVING}.mp4", f"{STILL}.mp4", f"{SESSION}.txt", "tune_ego video reader"}
    assert task.sources[f"{SESSION}.txt"] == hashlib.sha256(text).hexdigest()[:16]
    (task,) = plan_shards(Annotations(["a"], ["v"], ["n"], clips), videos, {})
    assert task.gaze == [None] * 3 and f"{SESSION}.txt" not in task.sources


def test_changed_annotations_are_not_mixed_with_former_shards(tmp_path: Path, made: list[str]) -> None:
    """A clip that gets another noun stays in the folder of shards that it was in."""
    root, out = write_folder(tmp_path / "egtea"), tmp_path / "out"
    info = prepare(str(root), str(out), SETTINGS)
    assert info["clips"] == 3 and len(made) == 3
    assert prepare(str(root), str(out), SETTINGS) == info and len(made) == 3
    write_labels(root, {**LABELS, MOVING: "1 1 4"})
    with pytest.raises(UserError, match=r"other settings \(annotations: '\w{16}' there, '\w{16}' now\); choose"):
        prepare(str(root), str(out), SETTINGS)
    assert json.loads((out / "dataset.json").read_text()) == info
    write_labels(root, LABELS)
    folder = root / "action_annotation"
    (folder / "verb_idx.txt").write_text("verb1 1\nverb2 2\nother 3\n")
    with pytest.raises(UserError, match=r"other settings \(annotations"):
        prepare(str(root), str(out), SETTINGS)
    assert len(made) == 3


@pytest.mark.parametrize(
    ("settings", "change"),
    [
        (Settings((64, 48), frame_offset=1), "frame_offset: 0 there, 1 now"),
        (Settings((48, 64)), r"image_size: \[64, 48\] there, \[48, 64\] now"),
        (Settings((64, 48), "farneback"), "flow: 'dis' there, 'farneback' now"),
    ],
)
def test_shards_of_two_settings_are_not_mixed(
    root: Path, tmp_path: Path, made: list[str], settings: Settings, change: str
) -> None:
    prepare(str(root), str(tmp_path / "out"), SETTINGS)
    claim = json.loads((tmp_path / "out" / "prepare.json").read_text())
    del claim["annotations"]
    assert claim == {"schema_version": 2, "image_size": [64, 48], "flow": "dis", "frame_offset": 0, "jpeg_quality": 90}
    with pytest.raises(UserError, match=rf"out: prepared with other settings \({change}\)"):
        prepare(str(root), str(tmp_path / "out"), settings)


@pytest.mark.parametrize(
    ("size", "flow", "good"),
    [
        ((32, 32), "dis", True),
        ((31, 32), "dis", False),
        ((32, 31), "dis", False),
        ((4096, 4096), "dis", True),
        ((4097, 32), "dis", False),
        ((32, 4097), "tvl1", False),
    ],
)
def test_image_sizes_go_from_32_to_4096(size: tuple[int, int], flow: str, good: bool) -> None:
    settings = Settings(size, flow)  # type: ignore[arg-type]
    if good:
        settings.check()
    else:
        with pytest.raises(UserError, match=f"--image-size {size[0]}x{size[1]}: with --flow {flow} both sides go from"):
            settings.check()


def test_defaults_of_prepare() -> None:
    assert Settings() == ((320, 240), "dis", None, 0, False)
