"""Lines, tables and progress as they are printed."""

from __future__ import annotations

import pytest

from tune_ego.console import percent, print_table, progress, say


def test_percent_has_one_decimal() -> None:
    assert [percent(value) for value in (None, 0, 0.1234, 0.99951, 1)] == ["-", "0.0 %", "12.3 %", "100.0 %", "100.0 %"]


def test_a_line_is_neither_wrapped_nor_read_as_markup(capsys: pytest.CaptureFixture[str]) -> None:
    say("[bold]" + "x" * 300)
    assert capsys.readouterr().out == "[bold]" + "x" * 300 + "\n"


def test_numbers_stand_to_the_right_and_words_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("Title", ["name", "share"], [["a", "5.0 %"], ["longer [b]", "100.0 %"]])
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert lines == ["Title", "name          share", "a             5.0 %", "longer [b]  100.0 %"]


def test_a_table_without_column_names_has_no_header(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("", ["", ""], [["a", "b"]])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == ["a  b"]


def test_progress_counts_clips_and_says_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """10 of 100 clips were done before; then 20 clips every 40 s: half a clip a second. A line at most each minute."""
    now = 1000.0
    monkeypatch.setattr("tune_ego.console.time.monotonic", lambda: now)
    monkeypatch.setattr("tune_ego.console.console.get_time", lambda: now)
    with progress("clips", 100, 10) as advance:
        for _ in range(3):
            now += 40
            advance(20)
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 100 clips, " in line]
    assert lines == ["50 of 100 clips, 0.5 clips/s, 0:01:40 left"]
