"""One driver at a time, and what a signal does to it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tune_ego.errors import UserError
from tune_ego.results.driver import driving, is_alive


def write_driver(root: Path, **changes: object) -> None:
    record = {"id": "x", "host": socket.gethostname(), "pid": os.getppid(), "beat": time.time()}
    (root / "driver.json").write_text(json.dumps({**record, **changes}))


def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_second_driver_is_refused(tmp_path: Path) -> None:
    write_driver(tmp_path)
    ours = rf"process {os.getppid()} on {socket.gethostname()} drives this search or run"
    with pytest.raises(UserError, match=ours), driving(str(tmp_path), ""):
        pytest.fail("not refused")
    assert is_alive(str(tmp_path))  # and it was not disturbed
    write_driver(tmp_path, host="elsewhere", pid=ended_process())
    with pytest.raises(UserError, match="on elsewhere drives this search or run"), driving(str(tmp_path), ""):
        pytest.fail("not refused")


@pytest.mark.parametrize("dead", [{"pid": -1}, {"host": "elsewhere", "beat": 0.0}, {"beat": 0.0}])
def test_a_dead_driver_does_not_stand_in_the_way(tmp_path: Path, dead: dict[str, object]) -> None:
    write_driver(tmp_path, **({"pid": ended_process()} if dead == {"pid": -1} else dead))
    assert not is_alive(str(tmp_path))
    with driving(str(tmp_path), ""):
        assert is_alive(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_runs_to_stop_and_the_second_ends(
    tmp_path: Path, number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)

    def drive() -> None:
        with driving(str(tmp_path), "do this") as interruption:
            assert not interruption
            signal.raise_signal(number)
            assert interruption
            for _ in range(100):
                if (tmp_path / "stop").exists():
                    break
                time.sleep(0.02)
            assert (tmp_path / "stop").exists()
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
    """Else a driver on another machine would be taken for dead after a minute."""
    monkeypatch.setattr("tune_ego.results.driver._HEARTBEAT_EVERY", 0.05)
    with driving(str(tmp_path), ""):
        first = json.loads((tmp_path / "driver.json").read_text())
        for _ in range(100):
            time.sleep(0.02)
            if (last := json.loads((tmp_path / "driver.json").read_text()))["beat"] > first["beat"]:
                break
        assert last["beat"] > first["beat"] and last["id"] == first["id"]


@pytest.mark.parametrize(("age", "alive"), [(59.0, True), (61.0, False)])
def test_a_driver_elsewhere_is_dead_after_a_minute_without_a_beat(tmp_path: Path, age: float, alive: bool) -> None:
    write_driver(tmp_path, host="elsewhere", beat=time.time() - age)
    assert is_alive(str(tmp_path)) == alive
