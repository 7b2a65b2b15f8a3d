"""One driver at a time, and what signals do to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.drivers import driver_record, ended_process, write_driver
from tune_ego import storage
from tune_ego.errors import ClusterLost, FolderLost, StorageError, UserError
from tune_ego.processes import is_running, this_process
from tune_ego.results import driver
from tune_ego.results.decisions import Decision, write_decisions
from tune_ego.results.driver import driving, is_alive
from tune_ego.results.trial_records import TrialRecords


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_second_driver_on_this_machine_is_refused_whatever_its_heartbeat(tmp_path: Path) -> None:
    write_driver(tmp_path, time=0.0)  # suspended, or its clock was changed
    assert is_alive(str(tmp_path))
    before = (tmp_path / "driver.json").read_text()
    ours = rf"process {os.getppid()} on .* drives this search or run"
    with pytest.raises(UserError, match=ours), driving(str(tmp_path), ""):
        pytest.fail("not refused")
    assert (tmp_path / "driver.json").read_text() == before


@pytest.mark.parametrize(
    "dead", [{"pid": 2**30}, {"started": 1}, {"pid": -1}], ids=["no such process", "the pid was used again", "no pid"]
)
def test_a_dead_driver_does_not_stand_in_the_way(tmp_path: Path, dead: dict[str, int]) -> None:
    for changes in (dead, ended_process()):
        write_driver(tmp_path, **changes)
        assert not is_alive(str(tmp_path))
        with driving(str(tmp_path), ""):
            assert is_alive(str(tmp_path))
        assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("changes", [{"boot": "another"}, {"pid_namespace": "pid:[1]"}])
def test_a_process_of_another_machine_or_container_cannot_be_seen(changes: dict[str, str]) -> None:
    """Also with the pid of a process of this machine."""
    assert is_running(this_process()) is True
    assert is_running({**this_process(), **changes}) is None


def test_a_zombie_does_not_run() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: is_running(driver_record(process.pid)) is False)
    process.wait()


@pytest.mark.parametrize("time_there", [0.0, 4e9])
def test_a_driver_elsewhere_is_watched_and_clocks_are_not_compared(
    tmp_path: Path, time_there: float, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(driver, "_DEAD_AFTER", 0.5)
    write_driver(tmp_path, elsewhere=True, time=time_there)
    start = time.monotonic()
    with driving(str(tmp_path), ""):
        assert time.monotonic() - start >= 0.5
    assert "was driven from elsewhere; watching" in capsys.readouterr().out
    write_driver(tmp_path, elsewhere=True, time=time_there)
    sleep = time.sleep

    def beat(seconds: float) -> None:
        sleep(seconds)
        write_driver(tmp_path, elsewhere=True, time=time_there, beat=2)

    monkeypatch.setattr("tune_ego.results.driver.time.sleep", beat)
    with pytest.raises(UserError, match="on elsewhere drives this search or run"), driving(str(tmp_path), ""):
        pytest.fail("not refused")


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"beat": "x"}', b'{"id": 1, "beat": NaN}'],
)
def test_a_damaged_record_is_nobody_s_and_this_is_said(
    tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "driver.json").write_bytes(content)
    assert not is_alive(str(tmp_path))
    assert f"{tmp_path}/driver.json: damaged, and ignored" in capsys.readouterr().out
    with driving(str(tmp_path), ""):
        assert is_alive(str(tmp_path))
    damaged = {**driver_record(), "pid": "x"}
    (tmp_path / "driver.json").write_text(json.dumps(damaged))
    assert not is_alive(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_asks_the_runs_to_stop_and_the_second_ends(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def drive() -> None:
        with driving(str(tmp_path), "do this") as interruption:
            assert not interruption
            signal.raise_signal(number)
            assert interruption
            wait_for((tmp_path / "stop").exists)
            signal.raise_signal(number)
            pytest.fail("the second signal did not end it")

    with pytest.raises(SystemExit) as caught:
        drive()
    assert caught.value.code == 130
    assert "Interrupted. To resume from the last checkpoint, run: do this" in capsys.readouterr().out
    assert signal.getsignal(number) == before
    assert not list(tmp_path.iterdir())


def test_a_stop_file_of_an_earlier_driver_does_not_stop_this_one(tmp_path: Path) -> None:
    """A driver that was killed leaves `stop` behind, and half-written files."""
    for name in ("stop", "trials.json.0123abcd.partial", "trials.json"):
        (tmp_path / name).write_text("")
    with driving(str(tmp_path), ""):
        assert sorted(path.name for path in tmp_path.iterdir()) == ["driver.json", "trials.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["trials.json"]


def test_of_two_that_claim_a_folder_at_the_same_moment_the_last_writer_drives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one writes its claim after ours, while ours is waited for. Its record and its stop file stay."""
    waits: list[float] = []

    def claim(seconds: float) -> None:
        waits.append(seconds)
        write_driver(tmp_path, id="other")
        (tmp_path / "stop").write_text("")

    monkeypatch.setattr("tune_ego.results.driver.time.sleep", claim)
    with pytest.raises(UserError, match=f"process {os.getppid()} on "), driving(str(tmp_path), ""):
        pytest.fail("not refused")
    assert waits == [0.5]
    assert json.loads((tmp_path / "driver.json").read_text())["id"] == "other"
    assert (tmp_path / "stop").exists()


def test_a_driver_renews_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver on another machine would otherwise take the folder over after a minute."""
    monkeypatch.setattr(driver, "_HEARTBEAT_EVERY", 0.05)
    with driving(str(tmp_path), ""):
        first = json.loads((tmp_path / "driver.json").read_text())
        wait_for(lambda: json.loads((tmp_path / "driver.json").read_text())["beat"] > first["beat"])
        assert json.loads((tmp_path / "driver.json").read_text())["id"] == first["id"]


def test_a_driver_whose_folder_was_taken_over_ends_and_writes_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its heartbeat notices, in the middle of a call that would last for ever."""
    monkeypatch.setattr(driver, "_HEARTBEAT_EVERY", 0.05)
    taken = driver_record(elsewhere=True, id="other")

    def drive() -> None:
        with driving(str(tmp_path), ""):
            (tmp_path / "driver.json").write_text(json.dumps(taken))
            (tmp_path / "stop").write_text("")
            time.sleep(30)

    with pytest.raises(FolderLost, match="another driver has taken this over"):
        drive()
    assert json.loads((tmp_path / "driver.json").read_text()) == taken
    assert (tmp_path / "stop").exists()


@pytest.mark.parametrize("case", ["unmounted", "written to meanwhile", "removed"])
def test_a_folder_without_the_driver_s_record_is_named_as_gone(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unmounted disk: an empty folder is left, or one with what a worker has written since. Nothing is written."""
    monkeypatch.setattr(driver, "_HEARTBEAT_EVERY", 0.05)
    root = tmp_path / "search"

    def drive() -> None:
        with driving(str(root), "do this"):
            (root / "driver.json").unlink()
            if case == "removed":
                root.rmdir()
            elif case == "written to meanwhile":
                (root / "stop").write_text("")
            time.sleep(30)

    with pytest.raises(UserError, match=r"driver.json is gone: .*\. To resume .*, run: do this$"):
        drive()
    left = sorted(path.name for path in root.iterdir()) if root.exists() else None
    assert left == {"unmounted": [], "written to meanwhile": ["stop"], "removed": None}[case]


def test_a_driver_that_was_taken_over_unnoticed_leaves_the_files_of_the_other(tmp_path: Path) -> None:
    """It was suspended, and ends before its next heartbeat: by itself, and at a signal."""
    with driving(str(tmp_path), ""):
        write_driver(tmp_path, id="other")
        (tmp_path / "stop").write_text("of the other")
    assert json.loads((tmp_path / "driver.json").read_text())["id"] == "other"
    assert (tmp_path / "stop").read_text() == "of the other"
    (tmp_path / "stop").unlink()
    (tmp_path / "driver.json").unlink()
    with driving(str(tmp_path), "") as interruption:
        write_driver(tmp_path, id="other")
        signal.raise_signal(signal.SIGTERM)
        interruption.end()
    assert not (tmp_path / "stop").exists() and (tmp_path / "driver.json").exists()


def test_a_write_that_is_tried_again_is_not_made_in_a_folder_that_was_lost_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[OSError] = []
    fsync = os.fsync

    def fail(number: int) -> None:
        if left:
            write_driver(tmp_path, id="other")
            raise left.pop()
        fsync(number)

    def drive() -> None:
        with driving(str(tmp_path), ""):
            monkeypatch.setattr(os, "fsync", fail)
            left.append(OSError(5, "Input/output error"))
            storage.write_text(tmp_path / "trials.json", "late")

    (tmp_path / "trials.json").write_text("of the other")
    with pytest.raises(FolderLost):
        drive()
    assert (tmp_path / "trials.json").read_text() == "of the other"


def test_a_driver_that_was_suspended_reads_its_claim_before_it_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its first heartbeat after 30 s, which comes too late for the write that it is about to do."""
    root = str(tmp_path)

    def drive() -> None:
        with driving(root, ""):
            records = TrialRecords(root)
            records.add([{"trial": "00000", "repeat": 0, "sampled": {}}])
            write_driver(tmp_path, id="other")
            records.note("00000", "running")  # confirmed a moment ago
            before = (tmp_path / "trials.json").read_text()
            monkeypatch.setattr(driver, "_CONFIRM_AFTER", 0.0)  # as if 30 s had passed
            with pytest.raises(FolderLost):
                write_decisions(root, "00000", [Decision(0, "00000", 1, 0.5, "STOP")])
            with pytest.raises(FolderLost):
                records.note("00000", "finished")
            assert (tmp_path / "trials.json").read_text() == before and not (tmp_path / "runs").exists()
            driver.confirm(str(tmp_path / "another"))  # not driven by this process
            records.note("00000", "failed")

    with pytest.raises(FolderLost):
        drive()


@pytest.mark.parametrize("error", [ClusterLost("Ray died"), StorageError("disk full"), OSError("not read")])
def test_the_first_cause_is_shown_with_the_resume_command(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever fails while the driver leaves."""
    words = f"^{error}. To resume from the last checkpoint, run: do this$"

    def fail(uri: str) -> None:
        raise OSError("later")

    def drive() -> None:
        with driving(str(tmp_path), "do this"):
            monkeypatch.setattr(storage, "remove", fail)
            raise error

    with pytest.raises(UserError, match=words):
        drive()


def test_an_error_that_is_raised_within_compiled_code_keeps_its_cause(tmp_path: Path) -> None:
    """Python makes a `SystemError` of an exception that a signal handler raises in a function of Cython."""

    def drive(cause: Exception) -> None:
        with driving(str(tmp_path), "do this"):
            raise SystemError("returned a result with an exception set") from cause

    with pytest.raises(UserError, match=r"^Ray died\. To resume from the last checkpoint, run: do this$"):
        drive(ClusterLost("Ray died"))
    with pytest.raises(SystemError):
        drive(ValueError("a bug"))


def test_a_folder_that_cannot_be_claimed_is_refused_at_once_without_a_resume_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk. Nothing has begun, so there is nothing to resume."""

    def fail(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    start = time.monotonic()
    refusal = pytest.raises(UserError, match=r"driver\.json: cannot be written \(.*No space left on device\)$")
    with refusal, driving(str(tmp_path), "do this"):
        pytest.fail("driven")
    assert time.monotonic() - start < 5
    assert not list(tmp_path.iterdir())


def test_storage_errors_are_waited_for_while_driving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync, left = os.fsync, [OSError(28, "No space left on device")] * 2

    def fail(number: int) -> None:
        if left:
            raise left.pop()
        fsync(number)

    with driving(str(tmp_path), ""):
        monkeypatch.setattr(os, "fsync", fail)
        storage.write_text(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x" and not left


@pytest.mark.parametrize("broken", ["write_json", "read_json"])
def test_a_driver_whose_storage_stays_away_ends_with_the_cause_and_how_to_resume(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trials may hang in their own attempts to write."""
    monkeypatch.setattr(driver, "_HEARTBEAT_EVERY", 0.05)
    fault = StorageError("disk full") if broken == "write_json" else OSError("disk full")

    def fail(*_: object) -> None:
        raise fault

    def drive() -> None:
        with driving(str(tmp_path), "do this"):
            monkeypatch.setattr(storage, broken, fail)
            time.sleep(30)

    with pytest.raises(UserError, match=r"disk full.*\. To resume from the last checkpoint, run: do this$"):
        drive()


def test_a_signal_while_the_folder_is_claimed_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the first writing of the claim and its reading."""
    monkeypatch.setattr("tune_ego.results.driver.time.sleep", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(KeyboardInterrupt), driving(str(tmp_path), ""):
        pytest.fail("not interrupted")
    assert not list(tmp_path.iterdir())


def test_a_signal_while_the_driver_leaves_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove = storage.remove

    def interrupted(uri: str) -> None:
        signal.raise_signal(signal.SIGTERM)
        remove(uri)

    with driving(str(tmp_path), ""):
        (tmp_path / "stop").write_text("")
        monkeypatch.setattr(storage, "remove", interrupted)
    assert not list(tmp_path.iterdir())


def test_a_heartbeat_during_the_end_does_not_bring_the_lock_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The heartbeat is being written when the driver leaves."""
    monkeypatch.setattr(driver, "_HEARTBEAT_EVERY", 0.01)
    beating = threading.Event()
    write_json = storage.write_json

    def slow(uri: str, value: object) -> None:
        beating.set()
        time.sleep(0.3)
        write_json(uri, value)

    with driving(str(tmp_path), ""):
        monkeypatch.setattr(storage, "write_json", slow)
        assert beating.wait(10)
    time.sleep(0.5)
    assert not list(tmp_path.iterdir())
