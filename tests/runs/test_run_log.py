"""The log that a training process leaves in its run's folder."""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import tiny_config
from tune_ego import __version__, cli, storage
from tune_ego.config_io import dump_config
from tune_ego.console import say
from tune_ego.errors import StorageError
from tune_ego.runs import run_log
from tune_ego.runs.run_log import RunLog, last_log_lines, log_uri, recording


def log_of(run: Path, rank: int = 0) -> str:
    return Path(log_uri(str(run), rank)).read_text()


def test_output_warnings_and_the_traceback_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr, list(logging.getLogger().handlers)

    def fail() -> None:
        with recording(str(tmp_path), 0):
            say("said")
            print("printed", file=sys.stderr)
            logging.getLogger("library").warning("warned")
            logging.getLogger("library").info("not this")
            raise ZeroDivisionError("the cause")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (sys.stdout, sys.stderr, list(logging.getLogger().handlers)) == before
    first, *lines = log_of(tmp_path).splitlines()
    assert first.startswith("--- ") and ": worker 0 starts on " in first
    assert first.endswith(f", tune_ego {__version__}")
    assert [line for line in lines if line in ("said", "printed", "WARNING library: warned")] == [
        "said",
        "printed",
        "WARNING library: warned",
    ]
    assert "Traceback (most recent call last):" in lines and lines[-1] == "ZeroDivisionError: the cause"
    assert "not this" not in log_of(tmp_path)
    assert "said" in capsys.readouterr().out  # the stream itself gets it, too


def test_a_log_goes_on_after_a_restart_and_each_worker_has_its_own(tmp_path: Path) -> None:
    for text, rank in (("first", 0), ("second", 0), ("other", 1)):
        with recording(str(tmp_path), rank):
            print(text)
    lines = log_of(tmp_path).splitlines()
    assert [line for line in lines if not line.startswith("---")] == ["first", "second"]
    assert log_of(tmp_path, 1).splitlines()[-1] == "other"
    assert last_log_lines(str(tmp_path), 1) == ["second"]
    assert last_log_lines(str(tmp_path / "none"), 5) == []


def test_a_log_keeps_its_last_64_kib_in_whole_lines(tmp_path: Path) -> None:
    log = RunLog(str(tmp_path / "log.txt"))
    for number in range(20_000):
        log.add(f"line {number:08d} é\n")
    log.flush()
    data = (tmp_path / "log.txt").read_bytes()
    lines = data.decode().splitlines()
    assert len(data) <= 1 << 16 and len(data) > (1 << 16) - 20
    assert lines[-1] == "line 00019999 é" and all(line.startswith("line ") for line in lines)


def test_a_log_is_written_while_the_process_runs_and_survives_its_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = RunLog(str(tmp_path / "log.txt"))
    log.add("a\n")
    with monkeypatch.context() as broken:

        def fail(uri: str, text: str) -> None:
            raise StorageError("full")

        broken.setattr(storage, "write_bytes", fail)
        log.flush()
    assert not (tmp_path / "log.txt").exists()
    log.flush()
    assert (tmp_path / "log.txt").read_text() == "a\n"
    (tmp_path / "log.txt").unlink()
    log.flush()  # nothing new
    assert not (tmp_path / "log.txt").exists()


def test_status_shows_the_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(dump_config(tiny_config()))
    (tmp_path / "log.txt").write_text("".join(f"line {number}\n" for number in range(50)))
    monkeypatch.setattr("sys.argv", ["tune-ego", "status", str(tmp_path)])
    with pytest.raises(SystemExit):
        cli.main()
    shown = capsys.readouterr().out.splitlines()
    assert shown[-20:] == [f"line {number}" for number in range(30, 50)] and "line 29" not in shown


def test_the_writer_s_period(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file changes while the body runs."""
    monkeypatch.setattr(run_log, "_WRITE_EVERY", 0.01)
    with recording(str(tmp_path), 0):
        print("now")
        for _ in range(500):
            if "now" in log_of(tmp_path):
                break
            time.sleep(0.01)
        assert "now" in log_of(tmp_path)


def test_a_log_takes_text_that_is_not_unicode(tmp_path: Path) -> None:
    """A path may hold any bytes, which Python shows as surrogates."""
    log = RunLog(str(tmp_path / "log.txt"))
    log.add("/clip\udcff.mp4\n")
    log.flush()
    assert (tmp_path / "log.txt").read_text() == "/clip?.mp4\n"
