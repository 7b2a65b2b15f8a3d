from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from tune_ego.dataset.annotations import find_gaze
from tune_ego.dataset.gaze import Gaze, check_gaze_layout, no_gaze, read_gaze
from tune_ego.errors import UserError

HEADER = "## [BeGaze]\r\n## Calibration Area:\t{area}\r\n##\r\n"
COLUMNS_31 = "Time\tType\tTrial\tL POR X [px]\tL POR Y [px]\tFrame\tAux1\tL Event Info\r\n"


def write_31(
    path: Path, samples: Sequence[tuple[object, object, int, str]], area: str = "1280\t960", tail: str = ""
) -> Path:
    lines = [f"1\tSMP\t1\t{x}\t{y}\t{frame}\t\t{event}\r\n" for x, y, frame, event in samples]
    path.write_bytes((HEADER.format(area=area) + COLUMNS_31 + "".join(lines) + tail).encode())
    return path


def literal(path: Path) -> dict[int, tuple[float, float] | None]:
    """The rules once more, sample by sample: session frame -> point, None without a usable sample."""
    area, columns = (1280.0, 960.0), [""]
    points: dict[int, list[tuple[float, float]]] = {}
    for line in path.read_bytes().decode("latin-1").replace("\r\n", "\n").split("\n"):
        if line.startswith("## Calibration Area:"):
            area = (float(line.split("\t")[1]), float(line.split("\t")[2]))
        elif line.startswith("Time"):
            columns = line.split("\t")
        elif line and not line.startswith("##"):
            row = dict(zip(columns, line.split("\t")))
            eye = "B" if "B POR X [px]" in columns else "L"
            frame = row["Frame"]
            if ":" in frame:
                h, m, s, f = map(int, frame.split(":"))
                frame = str(((h * 60 + m) * 60 + s) * 24 + f)
            x, y = float(row[f"{eye} POR X [px]"]) / area[0], float(row[f"{eye} POR Y [px]"]) / area[1]
            usable = row[f"{eye} Event Info"] in ("Fixation", "Saccade")
            usable = usable and math.isfinite(x) and math.isfinite(y) and 0 <= x <= 1 and 0 <= y <= 1
            points.setdefault(int(frame), []).extend([(x, y)] if usable else [])
    return {
        frame: (sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)) if found else None
        for frame, found in points.items()
    }


def assert_same(gaze: Gaze, expected: dict[int, tuple[float, float] | None]) -> None:
    assert len(gaze) == max(expected) + 1
    for frame in range(len(gaze)):
        point = expected.get(frame)
        assert gaze.valid[frame] == (point is not None)
        if point is not None:
            assert (gaze.x[frame], gaze.y[frame]) == pytest.approx(point, abs=1e-6)
        else:
            assert np.isnan(gaze.x[frame]) and np.isnan(gaze.y[frame])
        assert (gaze.event[frame] == "") == (frame not in expected)


def test_both_layouts_equal_a_literal_reader(egtea: Path) -> None:
    files = [Path(file.uri) for file in find_gaze(egtea).values()]
    assert {"B POR" in file.read_text() for file in files} == {True, False}
    for file in files:
        gaze = read_gaze(file)
        assert_same(gaze, literal(file))
        assert 0.7 < gaze.valid.mean() < 1


def test_real_gaze_equals_a_literal_reader(shared: Path) -> None:
    files = sorted((shared / "egtea" / "gaze_data").rglob("*.txt"))
    assert len(files) == 5
    for file in files:
        assert_same(read_gaze(file), literal(file))


def test_a_frame_has_the_mean_of_its_usable_samples(tmp_path: Path) -> None:
    samples = [
        (640, 480, 0, "Fixation"),
        (768, 240, 0, "Saccade"),
        (0, 0, 0, "Blink"),
        (1300, 480, 1, "Fixation"),
        ("NaN", "NaN", 2, "-"),
        (0, 960, 4, "Fixation"),
        (320, 240, 3, "Saccade"),
        (320, 240, 6, "Blink"),
        (320, 240, 6, "-"),
        (64, 96, 6, "-"),
        (64, "NaN", 7, "Saccade"),
        (128, 96, 7, "Fixation"),
    ]
    gaze = read_gaze(write_31(tmp_path / "a.txt", samples))
    nan = math.nan
    assert gaze.valid.tolist() == [True, False, False, True, True, False, False, True]
    assert gaze.x.tolist() == pytest.approx([0.55, nan, nan, 0.25, 0, nan, nan, 0.1], nan_ok=True)
    assert gaze.y.tolist() == pytest.approx([0.375, nan, nan, 0.25, 1, nan, nan, 0.1], nan_ok=True)
    assert gaze.event.tolist() == ["Fixation", "Fixation", "-", "Saccade", "Fixation", "", "-", "Fixation"]
    assert gaze.skipped == 0


@pytest.mark.parametrize(
    ("events", "commonest"),
    [
        (["Blink", "Blink", "Blink", "Saccade"], "Saccade"),  # one usable sample outvotes all others
        (["Fixation", "Saccade", "Saccade", "Blink", "Blink", "Blink"], "Saccade"),
        (["-", "Blink", "Blink"], "Blink"),
        (["-", "-", "Blink"], "-"),
    ],
)
def test_the_event_of_a_frame_is_the_commonest_of_its_usable_samples(
    tmp_path: Path, events: list[str], commonest: str
) -> None:
    path = write_31(tmp_path / "a.txt", [(64, 96, 1, "Saccade"), *((64, 96, 0, event) for event in events)])
    assert read_gaze(path).event.tolist() == [commonest, "Saccade"]


def test_samples_outside_the_image_are_not_usable_on_any_side(tmp_path: Path) -> None:
    """A calibration area of 1000 x 500 pixels."""
    points = {
        (0, 250): (0, 0.5),
        (-0.01, 250): None,
        (1000, 250): (1, 0.5),
        (1000.01, 250): None,
        (400, 0): (0.4, 0),
        (400, -0.01): None,
        (400, 500): (0.4, 1),
        (400, 500.01): None,
        (900, 300): (0.9, 0.6),
    }
    samples = [(x, y, frame, "Fixation") for frame, (x, y) in enumerate(points)]
    gaze = read_gaze(write_31(tmp_path / "a.txt", samples, area="1000\t500"))
    assert gaze.valid.tolist() == [point is not None for point in points.values()]
    assert np.isnan(gaze.x[~gaze.valid]).all() and np.isnan(gaze.y[~gaze.valid]).all()
    stored = np.stack([gaze.x, gaze.y], axis=1)[gaze.valid]
    np.testing.assert_allclose(stored, [point for point in points.values() if point is not None], atol=1e-7)
    assert (gaze.event == "Fixation").all()


def test_without_a_calibration_area_it_is_1280_x_960(tmp_path: Path) -> None:
    path = write_31(tmp_path / "a.txt", [(320, 120, 0, "Fixation")])
    path.write_bytes(path.read_bytes().replace(b"## Calibration Area:\t1280\t960\r\n", b""))
    gaze = read_gaze(path)
    assert (gaze.x[0], gaze.y[0]) == (0.25, 0.125)


COLUMNS_34 = ["Time", "B POR X [px]", "B POR Y [px]", "L POR X [px]", "L POR Y [px]", "Frame"]


def test_begaze_3_4_has_clock_times_and_the_binocular_point(tmp_path: Path) -> None:
    """The last two digits of a time count 24ths of a second; the left eye has columns of its own."""
    frames = {"00:00:00:00": 0, "00:00:00:23": 23, "00:00:01:00": 24, "00:01:02:05": 1493, "01:00:00:01": 86401}
    columns = [*COLUMNS_34, "B Event Info", "L Event Info"]
    lines = [f"1\t640\t240\t64\t96\t{clock}\tFixation\tBlink" for clock in frames]
    lines.append("1\t64\t96\t640\t240\t00:00:00:01\tBlink\tFixation")
    (tmp_path / "a.txt").write_text("\n".join(["\t".join(columns), *lines]) + "\n")
    gaze = read_gaze(tmp_path / "a.txt")
    assert len(gaze) == 86402
    assert np.flatnonzero(gaze.valid).tolist() == [0, 23, 24, 1493, 86401]
    assert set(zip(gaze.x[gaze.valid].tolist(), gaze.y[gaze.valid].tolist())) == {(0.5, 0.25)}
    assert gaze.event[[0, 1, 2]].tolist() == ["Fixation", "Blink", ""]


def test_the_left_eye_counts_where_there_is_no_binocular_point(tmp_path: Path) -> None:
    """A column of the right eye is passed over."""
    columns = "Time\tR POR X [px]\tR POR Y [px]\tL POR Y [px]\tL POR X [px]\tR Event Info\tL Event Info\tFrame\n"
    (tmp_path / "a.txt").write_text(columns + "1\t64\t96\t240\t640\tBlink\tSaccade\t2\n")
    gaze = read_gaze(tmp_path / "a.txt")
    assert gaze.valid.tolist() == [False, False, True]
    assert (gaze.x[2], gaze.y[2], gaze.event[2]) == (0.5, 0.25, "Saccade")


@pytest.mark.parametrize(
    ("text", "x"),
    [("64.0", 0.05), ("64,0", 0.05), ("6.4e1", 0.05), ("+64", 0.05), ("64.", 0.05), ("64,0000", 0.05)]
    + [("1,280", None), ("0x40", None), ("64 0", None), ("", None), ("-", None), ("nan", None)],
)
def test_numbers_as_exports_write_them(tmp_path: Path, text: str, x: float | None) -> None:
    gaze = read_gaze(write_31(tmp_path / "a.txt", [(64, 96, 1, "Fixation")] * 20 + [(text, 96, 0, "Fixation")]))
    assert gaze.valid.tolist() == [x is not None, True]
    assert x is None or gaze.x[0] == pytest.approx(x)
    assert gaze.skipped == (text in ("1,280", "0x40", "64 0"))


@pytest.mark.parametrize(("bad", "readable"), [(1, True), (2, False)])
def test_a_tenth_of_the_samples_may_be_lost(tmp_path: Path, bad: int, readable: bool) -> None:
    samples = [(64, 96, frame, "Fixation") for frame in range(10 - bad)] + [(64, 96, "x", "Fixation")] * bad
    path = write_31(tmp_path / "a.txt", samples)  # type: ignore[arg-type]
    if readable:
        assert read_gaze(path).skipped == 1 and len(read_gaze(path)) == 9
    else:
        with pytest.raises(UserError, match="of 10 samples 2 cannot be read: 2 with frames that are no frame numbers"):
            read_gaze(path)


def test_frames_beyond_a_day_are_damaged_numbers(tmp_path: Path) -> None:
    samples = [(64, 96, frame % 10, "Fixation") for frame in range(18)]
    path = write_31(tmp_path / "a.txt", [*samples, (64, 96, 24 * 3600 * 24, "Fixation"), (64, 96, -1, "Fixation")])
    assert (len(read_gaze(path)), read_gaze(path).skipped) == (10, 2)
    write_31(path, [*samples, (64, 96, 24 * 3600 * 24 - 1, "Fixation")])
    assert (len(read_gaze(path)), read_gaze(path).skipped) == (2073600, 0)


def test_quotes_and_damaged_numbers_swallow_nothing(tmp_path: Path) -> None:
    samples = [(640, 480, frame, "Fixation") for frame in range(12)]
    path = write_31(tmp_path / "a.txt", samples, tail="9\tSMP\t1\t64\t64\t99999999999999\t\tFixation\r\n")
    path.write_bytes(path.read_bytes().replace(b"\t2\t\tFix", b'\t2\t"\tFix'))
    assert read_gaze(path).valid.tolist() == [True] * 12
    write_31(tmp_path / "b.txt", samples, area="0\t0")
    with pytest.raises(UserError, match=r"b\.txt.*pixels"):
        read_gaze(tmp_path / "b.txt")


def test_messages_and_a_cut_off_last_line_are_passed_over(tmp_path: Path) -> None:
    path = write_31(
        tmp_path / "a.txt", [(640, 480, 0, "Fixation")], tail="9\tMSG\t1\t# Message: hello\r\n9\tSMP\t1\t64"
    )
    assert len(read_gaze(path)) == 1


def test_frames_outside_the_recording_are_not_valid(tmp_path: Path) -> None:
    path = write_31(tmp_path / "a.txt", [(128 * frame, 96 * frame, frame, "Fixation") for frame in range(4)])
    clip = read_gaze(path).frames(-2, 8)
    assert clip.valid.tolist() == [False, False, True, True, True, True, False, False]
    nan = math.nan
    for values in (clip.x, clip.y):
        assert values.tolist() == pytest.approx([nan, nan, 0, 0.1, 0.2, 0.3, nan, nan], nan_ok=True)
    assert clip.event.tolist() == ["", "", *["Fixation"] * 4, "", ""]
    assert read_gaze(path).frames(2, 1).x.tolist() == pytest.approx([0.2])
    empty = no_gaze(0).frames(5, 3)
    assert empty.valid.tolist() == [False] * 3 and empty.event.tolist() == [""] * 3
    assert np.isnan(empty.x).all() and np.isnan(empty.y).all()


SAMPLES = [(640.25, 480.5, frame, ("Fixation", "Saccade", "Blink", "-")[frame % 4]) for frame in range(40)]


def data_lines(change: Callable[[str], str]) -> Callable[[bytes], bytes]:
    """The change, made to every line behind the column line."""

    def apply(raw: bytes) -> bytes:
        head, columns, data = raw.decode().partition(COLUMNS_31)
        return (head + columns + "".join(change(line) for line in data.splitlines(keepends=True))).encode()

    return apply


def quoted(line: str) -> str:
    return "\t".join(f'"{field}"' for field in line.rstrip().split("\t")) + "\r\n"


@pytest.mark.parametrize(
    "change",
    [
        lambda raw: b"\xef\xbb\xbf" + raw,
        lambda raw: raw.replace(b"\r\n", b"\t\r\n"),
        data_lines(lambda line: line.replace("\r\n", "\t\r\n")),
        data_lines(quoted),
        data_lines(lambda line: line.replace(".", ",")),
        data_lines(lambda line: line.replace("Fixation", "Fixation ").replace("Saccade", " Saccade")),
        lambda raw: raw.replace(b"1280\t960", b"1280.0\t960.0"),
        lambda raw: raw.replace(b"## Calibration Area:\t", b"##calibration area : "),
        lambda raw: raw + b"9\tSMP\t1\t64\t64\t39\t\tB",
        lambda raw: raw[:-2],
    ],
    ids=["BOM", "tabs at ends", "tabs at data's ends", "quotes", "commas", "blanks", "area", "area's name"]
    + ["cut in the event", "no last line end"],
)
def test_variants_of_a_file_say_the_same(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    path = write_31(tmp_path / "a.txt", SAMPLES)
    expected = read_gaze(path)
    assert expected.valid.sum() == 20
    path.write_bytes(change(path.read_bytes()))
    check_gaze_layout(path)
    gaze = read_gaze(path)
    for name in ("x", "y", "valid", "event"):
        np.testing.assert_array_equal(getattr(gaze, name), getattr(expected, name))
    assert gaze.skipped == 0


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda line: line.replace("SMP\t", "SMP\t\t") if "Saccade" in line else line, "number of fields"),
        (lambda line: line.replace("640.25", "640,251"), "40 with coordinates that are no numbers"),
        (lambda line: line.replace("Fix", "Visual Fix"), "10 with events other than Fixation"),
        (lambda line: line.replace("\t\tBlink", "x\t\tBlink"), "10 with frames that are no frame numbers"),
        (lambda line: line.replace("640", "6\0"), "NUL bytes"),
        (lambda line: line + "\0" * (2 << 20) if "\t39\t" in line else line, "NUL bytes"),
    ],
    ids=["fields", "coordinates", "events", "frames", "holes", "a long tail"],
)
def test_a_file_of_which_much_cannot_be_read_is_refused(
    tmp_path: Path, change: Callable[[str], str], cause: str
) -> None:
    path = write_31(tmp_path / "a.txt", SAMPLES)
    path.write_bytes(data_lines(change)(path.read_bytes()))
    with pytest.raises(UserError, match=rf"a\.txt: .*{cause}.* again"):
        read_gaze(path)


def test_single_samples_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    samples = [*SAMPLES, ("x", 480, 40, "Fixation"), (640, 480, 41, "Visual"), ("NaN", "-", 42, "-")]
    path = write_31(tmp_path / "a.txt", samples, tail="9\tSMP\t1\r\n9\tMSG\t1\t# hello\r\n")
    gaze = read_gaze(path)
    assert gaze.skipped == 3
    assert gaze.event[40:].tolist() == ["Fixation", "-", "-"] and not gaze.valid[40:].any()


def test_a_file_that_ends_with_its_column_line_holds_no_gaze(tmp_path: Path) -> None:
    path = write_31(tmp_path / "a.txt", [])
    assert len(read_gaze(path)) == 0
    path.write_bytes(path.read_bytes().rstrip())
    assert len(read_gaze(path)) == 0


@pytest.mark.parametrize("content", ["", "hello\n", "## x\nTime\tX\tY\n1\t2\t3\n"])
def test_other_files_are_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "S.txt"
    path.write_text(content)
    with pytest.raises(UserError, match=r"S\.txt"):
        check_gaze_layout(path)
