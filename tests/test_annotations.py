from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from tune_ego.dataset.annotations import (
    FOLDS,
    find_clips,
    find_doubled_clips,
    find_gaze,
    parse_clip_name,
    read_annotations,
    read_index,
    read_split,
)
from tune_ego.errors import UserError


def test_clip_name_is_taken_apart() -> None:
    name = parse_clip_name("OP01-R04-ContinentalBreakfast-69970-77130-F001662-F001869")
    assert name.session == "OP01-R04-ContinentalBreakfast"
    assert (name.subject, name.recipe) == ("OP01", "ContinentalBreakfast")
    assert (name.start_ms, name.end_ms, name.first_frame, name.last_frame) == (69970, 77130, 1662, 1869)


@pytest.mark.parametrize("name", ["", "P01-R01-Pizza", "P01-R01-Pizza-1-2-F1-F2.mp4", "P01-R01-Pizza-a-2-F1-F2"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="clip name"):
        parse_clip_name(name)


def test_split_lines_have_one_to_three_nouns(tmp_path: Path) -> None:
    clip = "P01-R01-Pizza-1-2-F000001-F000002"
    file = tmp_path / "split.txt"
    file.write_bytes(f"{clip} 5 2 7\r\n\r\n{clip} 6 3 1 2 3\r\n".encode())
    assert [(line.action, line.verb, line.nouns) for line in read_split(file)] == [(5, 2, (7,)), (6, 3, (1, 2, 3))]
    file.write_text(f"{clip} 5 2\n")
    with pytest.raises(UserError, match=r"split\.txt:1"):
        read_split(file)


def test_a_bad_clip_name_is_named_with_its_line(tmp_path: Path) -> None:
    (tmp_path / "split.txt").write_text("P01-R01-Pizza-1-2-F000001-F000002 1 1 1\nP01 1 1 1\n")
    with pytest.raises(UserError, match=r"split\.txt:2: 'P01' is not a clip name"):
        read_split(tmp_path / "split.txt")


def test_of_files_of_one_name_the_first_that_holds_something_counts(tmp_path: Path) -> None:
    for folder, content in (("a", b""), ("b", b"1"), ("c", b"2"), ("d", b"")):
        for path in (tmp_path / "cropped_clips" / folder / "x.mp4", tmp_path / "gaze_data" / folder / "x.txt"):
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
    assert Path(find_clips(tmp_path)["x"].uri).read_bytes() == Path(find_gaze(tmp_path)["x"].uri).read_bytes() == b"1"
    assert [Path(file.uri).parent.name for file in find_doubled_clips(tmp_path)["x"]] == ["a", "b", "c", "d"]


def test_class_names_hold_spaces_and_slashes(tmp_path: Path) -> None:
    (tmp_path / "action_idx.txt").write_text("Open fridge 2\nInspect/Read recipe 1\n")
    assert read_index(tmp_path / "action_idx.txt") == ["Inspect/Read recipe", "Open fridge"]
    (tmp_path / "action_idx.txt").write_text("Open fridge 1\nClose fridge 3\n")
    with pytest.raises(UserError, match="without gaps"):
        read_index(tmp_path / "action_idx.txt")


def test_absent_annotations_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_split1\.txt.*noun_idx\.txt"):
        read_annotations(tmp_path)


def test_contradicting_labels_are_refused(egtea: Path, tmp_path: Path) -> None:
    shutil.copytree(egtea / "action_annotation", tmp_path / "action_annotation")
    path = tmp_path / "action_annotation" / "train_split2.txt"
    lines = path.read_text().splitlines()
    clip, *_ = lines[0].split()
    other = "2 1 2" if not lines[0].endswith(" 2 1 2") else "1 1 1"
    path.write_text("\n".join([f"{clip} {other}", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match=clip):
        read_annotations(tmp_path)


def test_folds_are_balanced_and_sessions_whole(egtea: Path) -> None:
    clips = read_annotations(egtea).clips
    for action in {clip.action for clip in clips}:
        counts = Counter(clip.stratified_fold for clip in clips if clip.action == action)
        sizes = [counts[fold] for fold in range(FOLDS)]
        assert max(sizes) - min(sizes) <= 1
    folds_of_session: dict[str, set[int]] = {}
    for clip in clips:
        folds_of_session.setdefault(clip.name.session, set()).add(clip.session_fold)
    assert all(len(folds) == 1 for folds in folds_of_session.values())


def test_flat_and_nested_layouts_are_found(egtea: Path, tmp_path: Path) -> None:
    nested = find_clips(egtea)
    (tmp_path / "cropped_clips").mkdir()
    (tmp_path / "gaze_data").mkdir()
    for name in nested:
        (tmp_path / "cropped_clips" / f"{name}.MP4").write_bytes(b"")
    for name in find_gaze(egtea):
        (tmp_path / "gaze_data" / f"{name}.txt").write_bytes(b"")
    assert find_clips(tmp_path).keys() == nested.keys()
    assert find_gaze(tmp_path).keys() == find_gaze(egtea).keys()


def test_real_annotations(shared: Path) -> None:
    found = read_annotations(shared / "egtea")
    assert len(found.clips) == 10321
    assert (len(found.actions), len(found.verbs), len(found.nouns)) == (106, 19, 53)
    assert Counter(clip.roles for clip in found.clips) == {
        ("train", "train", "train"): 4256,
        ("test", "train", "train"): 2022,
        ("train", "test", "train"): 2022,
        ("train", "train", "test"): 2021,
    }
    assert found.actions[0] == "Inspect/Read recipe"
    counts = Counter((clip.action, clip.stratified_fold) for clip in found.clips if clip.roles[0] == "train")
    for action in range(1, 107):
        sizes = [counts[action, fold] for fold in range(FOLDS)]
        assert max(sizes) - min(sizes) <= 4
