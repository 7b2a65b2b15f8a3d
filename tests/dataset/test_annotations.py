from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tune_ego.dataset.annotations import (
    FOLDS,
    ClipName,
    find_clips,
    find_duplicate_clips,
    find_gaze,
    parse_clip_name,
    read_annotations,
    read_index,
    read_split,
    session_folds,
    stratified_folds,
)
from tune_ego.errors import UserError

A1, A2, B1, B2, C1 = (
    "OP01-R01-Tea-1000-2000-F000024-F000048",
    "OP01-R01-Tea-3000-5000-F000072-F000120",
    "P02-R03-Pizza-0-500-F000000-F000012",
    "P02-R03-Pizza-9000-9500-F000216-F000228",
    "P10-R01-Tea-250-1250-F000006-F000030",
)
INDEX = {
    "action": "Open fridge 2\nInspect/Read recipe 1\nCut tomato 3\n",
    "verb": "Inspect/Read 1\nOpen 2\nCut 3\n",
    "noun": "recipe 1\nfridge 2\ntomato 3\nknife 4\n",
}
SPLITS = {
    "train_split1": [f"{B2} 3 3 3 4", f"{A1} 1 1 1", f"{C1} 2 2 2"],
    "test_split1": [f"{A2} 2 2 2", f"{B1} 3 3 4 3"],
    "train_split2": [f"{A2} 2 2 2", f"{A1} 1 1 1"],
    "test_split2": [f"{B2} 3 3 3 4", f"{C1} 2 2 2"],
    "train_split3": [f"{A2} 2 2 2", f"{B1} 3 3 4 3", f"{C1} 2 2 2"],
    "test_split3": [f"{A1} 1 1 1"],
}


def write_annotations(root: Path, splits: dict[str, list[str]] | None = None) -> Path:
    folder = root / "action_annotation"
    folder.mkdir(parents=True)
    for kind, text in INDEX.items():
        (folder / f"{kind}_idx.txt").write_text(text)
    for name, lines in {**SPLITS, **(splits or {})}.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return root


def test_rows_of_a_small_data_set(tmp_path: Path) -> None:
    annotations = read_annotations(write_annotations(tmp_path))
    assert annotations.actions == ["Inspect/Read recipe", "Open fridge", "Cut tomato"]
    assert annotations.verbs == ["Inspect/Read", "Open", "Cut"]
    assert annotations.nouns == ["recipe", "fridge", "tomato", "knife"]
    # Every class and set of roles has one clip here. Its place among them, sorted, and 3 folds more for each class:
    # A1 0 + 3, A2 (class 2, test first) 1 + 6, C1 2 + 6, B1 (class 3, test first) 3 + 9, B2 4 + 9.
    # Sessions: two clips in OP01's and P02's, one in P10's.
    assert [tuple(clip[1:]) for clip in annotations.clips] == [
        (1, 1, (1,), ("train", "train", "test"), 3, 0),
        (2, 2, (2,), ("test", "train", "train"), 7, 0),
        (3, 3, (4, 3), ("test", "", "train"), 2, 1),
        (3, 3, (3, 4), ("train", "test", ""), 3, 1),
        (2, 2, (2,), ("train", "test", "train"), 8, 2),
    ]
    assert [clip.name for clip in annotations.clips] == [
        ClipName(A1, "OP01-R01-Tea", "OP01", "Tea", 1000, 2000, 24, 48),
        ClipName(A2, "OP01-R01-Tea", "OP01", "Tea", 3000, 5000, 72, 120),
        ClipName(B1, "P02-R03-Pizza", "P02", "Pizza", 0, 500, 0, 12),
        ClipName(B2, "P02-R03-Pizza", "P02", "Pizza", 9000, 9500, 216, 228),
        ClipName(C1, "P10-R01-Tea", "P10", "Tea", 250, 1250, 6, 30),
    ]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test_split3", [f"{A1} 2 2 2"], rf"test_split3\.txt: {A1} has other labels"),
        ("test_split3", [f"{A1} 1 1 2"], rf"test_split3\.txt: {A1} has other labels"),
        ("test_split3", [f"{A1} 1 1 1", f"{C1} 2 2 2"], rf"{C1} is in both train and test of split 3"),
        ("test_split1", [f"{A2} 2 2 2", f"{B1} 4 3 4 3"], rf"{B1}: action id 4 is not in action_idx"),
        ("test_split1", [f"{A2} 2 2 2", f"{B1} 0 3 4 3"], rf"{B1}: action id 0 is not in action_idx"),
        ("test_split1", [f"{A2} 2 2 2", f"{B1} 3 4 4 3"], rf"{B1}: verb id 4 is not in verb_idx"),
        ("test_split1", [f"{A2} 2 2 2", f"{B1} 3 3 4 5"], rf"{B1}: noun id 5 is not in noun_idx"),
        ("test_split1", [f"{A2} 2 2"], r"test_split1\.txt:1: expected 'ClipName ActionID VerbID Noun1"),
        ("test_split1", ["", f"{A2} 2 2 2 2 2 2"], r"test_split1\.txt:2: expected 'ClipName ActionID VerbID Noun1"),
        ("test_split1", [f"{A2} 2 -2 2"], r"test_split1\.txt:1: expected 'ClipName ActionID VerbID Noun1"),
        ("test_split1", [f"{A2} 2 2 2", "P01 1 1 1"], r"test_split1\.txt:2: 'P01' is not a clip name"),
    ],
)
def test_annotations_that_contradict_themselves_are_refused(
    tmp_path: Path, name: str, change: list[str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        read_annotations(write_annotations(tmp_path, {name: change}))


def test_a_clip_listed_twice_with_the_same_labels_counts_once(tmp_path: Path) -> None:
    root = write_annotations(tmp_path, {"test_split3": [f"{A1} 1 1 1", f"{A1} 1 1 1"]})
    assert [clip.name.name for clip in read_annotations(root).clips] == [A1, A2, B1, B2, C1]


def test_clip_name_is_taken_apart() -> None:
    assert parse_clip_name("OP01-R04-ContinentalBreakfast-69970-77130-F001662-F001869") == (
        "OP01-R04-ContinentalBreakfast-69970-77130-F001662-F001869",
        "OP01-R04-ContinentalBreakfast",
        "OP01",
        "ContinentalBreakfast",
        69970,
        77130,
        1662,
        1869,
    )


@pytest.mark.parametrize("name", ["", "P01-R01-Pizza", "P01-R01-Pizza-1-2-F1-F2.mp4", "P01-R01-Pizza-a-2-F1-F2"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="clip name"):
        parse_clip_name(name)


def test_split_lines_have_one_to_three_nouns(tmp_path: Path) -> None:
    file = tmp_path / "split.txt"
    file.write_bytes(f"\ufeff{A1} 5 2 7\r\n\r\n{A2} 6 3 1 2 3\r\n".encode())
    assert read_split(file) == [(A1, 5, 2, (7,)), (A2, 6, 3, (1, 2, 3))]


def test_of_files_of_one_name_the_first_that_holds_something_counts(tmp_path: Path) -> None:
    for folder, content in (("a", b""), ("b", b"1"), ("c", b"2"), ("d", b"")):
        for path in (tmp_path / "cropped_clips" / folder / "x.mp4", tmp_path / "gaze_data" / folder / "x.txt"):
            path.parent.mkdir(parents=True)
            path.write_bytes(content)
    assert Path(find_clips(tmp_path)["x"].uri).read_bytes() == Path(find_gaze(tmp_path)["x"].uri).read_bytes() == b"1"
    assert [Path(file.uri).parent.name for file in find_duplicate_clips(tmp_path)["x"]] == ["a", "b", "c", "d"]


def test_flat_and_nested_layouts_are_found(tmp_path: Path) -> None:
    for name in ("cropped_clips/x.MP4", "cropped_clips/s/t/y.mp4", "cropped_clips/z.mpg", "gaze_data/gaze_data/s.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    (tmp_path / "gaze_data" / "t.TXT").write_bytes(b"1")
    assert {name: file.uri for name, file in find_clips(tmp_path).items()} == {
        "x": f"{tmp_path}/cropped_clips/x.MP4",
        "y": f"{tmp_path}/cropped_clips/s/t/y.mp4",
    }
    assert find_gaze(tmp_path).keys() == {"s", "t"}
    assert find_duplicate_clips(tmp_path) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Open fridge 1\nClose fridge 3\n", "ids are not 1 to 2 without gaps"),
        ("Open fridge 0\nClose fridge 1\n", "ids are not 1 to 2 without gaps"),
        ("Open fridge 1\n\nClose fridge 1\n", r"idx\.txt:3: expected 'name id' with ids that differ"),
        ("1\n", r"idx\.txt:1: expected 'name id'"),
        ("Open fridge\n", r"idx\.txt:1: expected 'name id'"),
    ],
)
def test_class_names_without_distinct_numbers_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "idx.txt").write_text(text)
    with pytest.raises(UserError, match=message):
        read_index(tmp_path / "idx.txt")


def test_files_that_are_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "idx.txt").write_bytes(b"\xff\xfa\x00")
    for read in (read_index, read_split):
        with pytest.raises(UserError, match=r"idx\.txt: cannot be read"):
            read(tmp_path / "idx.txt")


def test_absent_annotations_are_named(tmp_path: Path) -> None:
    write_annotations(tmp_path)
    for name in ("train_split1", "test_split3", "noun_idx"):
        (tmp_path / "action_annotation" / f"{name}.txt").unlink()
    with pytest.raises(UserError, match=r"no train_split1\.txt, test_split3\.txt, noun_idx\.txt$"):
        read_annotations(tmp_path)


def test_stratified_folds_are_dealt_out_in_turn_inside_each_class_and_role() -> None:
    """Class 1: ten training clips; class 2: ten training and five test clips."""
    actions = [1, 2, 2] * 5 + [1, 2] * 5
    train, test = ("train",), ("test",)
    roles: list[tuple[str, ...]] = [*[train, train, test] * 5, *[train, train] * 5]
    # NumPy's default_rng(0).permutation(25), in which the clips of each group are taken.
    shuffled = [19, 4, 10, 11, 24, 2, 23, 6, 16, 22, 3, 21, 8, 0, 20, 12, 18, 13, 7, 5, 17, 14, 9, 1, 15]
    expected = [-1] * 25
    place = 0
    for action, role in ((1, "train"), (2, "test"), (2, "train")):
        for clip in shuffled:
            if (actions[clip], roles[clip][0]) == (action, role):
                expected[clip] = (place + 3 * action) % 10
                place += 1
    assert stratified_folds(actions, roles) == expected
    by_group = Counter(zip(actions, roles, expected))
    assert all(by_group[action, ("train",), fold] == 1 for action in (1, 2) for fold in range(10))


def test_sessions_go_to_the_emptiest_fold_the_largest_first() -> None:
    sizes = {"a": 1, "b": 5, "c": 5, "d": 4, "e": 3, "f": 3, "g": 2, "h": 2, "i": 2, "j": 2, "k": 2, "l": 1, "m": 1}
    # b to k open the ten folds; then a, l and m go to the first of those with two clips: 5, 6, 7.
    folds = {"a": 5, "b": 0, "c": 1, "d": 2, "e": 3, "f": 4, "g": 5, "h": 6, "i": 7, "j": 8, "k": 9, "l": 6, "m": 7}
    sessions = [name for turn in range(5) for name, size in sizes.items() if turn < size]
    assert session_folds(sessions) == [folds[name] for name in sessions]


def test_real_annotations(shared: Path) -> None:
    annotations = read_annotations(shared / "egtea")
    assert len(annotations.clips) == 10321
    assert (len(annotations.actions), len(annotations.verbs), len(annotations.nouns)) == (106, 19, 53)
    assert Counter(clip.roles for clip in annotations.clips) == {
        ("train", "train", "train"): 4256,
        ("test", "train", "train"): 2022,
        ("train", "test", "train"): 2022,
        ("train", "train", "test"): 2021,
    }
    assert annotations.actions[0] == "Inspect/Read recipe"
    counts = Counter((clip.action, clip.stratified_fold) for clip in annotations.clips if clip.roles[0] == "train")
    for action in range(1, 107):
        sizes = [counts[action, fold] for fold in range(FOLDS)]
        assert max(sizes) - min(sizes) <= 4
