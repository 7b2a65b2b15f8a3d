"""Signals and exit codes of the command line, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tune_ego import driver_signals
from tune_ego.driver_signals import abort, raise_interrupt, signals_handled
from tune_ego.errors import ClusterLost

HEADER = "import os, signal, sys, threading, time\nfrom tune_ego.errors import ClusterLost\n"
HEADER += "from tune_ego.driver_signals import abort, last_act, signals_handled\n"


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", HEADER + code], capture_output=True, text=True, timeout=60, check=False
    )


def test_signals_that_this_process_ignores_stay_ignored() -> None:
    """`nohup` ignores SIGHUP, a shell's background job SIGINT. SIGTERM is always handled."""
    run = run_python(
        "for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)\n"
        "with signals_handled():\n"
        "    os.kill(os.getpid(), signal.SIGHUP)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    print('here')\n"
        "    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)\n"
        "    except KeyboardInterrupt: print('interrupted')\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_IGN)\n"
    )
    assert run.stdout.split() == ["here", "interrupted", "True"] and run.returncode == 0


def test_handlers_within_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGTERM)
    numbers: list[int] = []
    with signals_handled():
        with signals_handled(lambda number, frame: numbers.append(number)):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGHUP)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGTERM)
    assert numbers == [signal.SIGTERM, signal.SIGHUP] and signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(KeyboardInterrupt):
        raise_interrupt()


def test_an_error_of_a_thread_is_raised_in_the_main_thread() -> None:
    """Also in a system call that would last."""
    ended = threading.Event()
    thread = threading.Thread(target=abort, args=(ClusterLost("gone"), ended))
    start = time.monotonic()

    def wait() -> None:
        with signals_handled():
            thread.start()
            time.sleep(30)

    with pytest.raises(ClusterLost, match="gone"):
        wait()
    assert time.monotonic() - start < 5
    ended.set()
    thread.join()


def test_a_main_thread_that_hangs_is_ended_after_the_last_acts() -> None:
    """It catches the error and goes on, as a library's loop would. The later act comes first."""
    run = run_python(
        "import tune_ego.driver_signals as i\n"
        "i._UNWIND_WITHIN = 1.0\n"
        "with signals_handled(), last_act(lambda: print('first')), last_act(lambda: print('second')):\n"
        "    with last_act(lambda: print('over')): pass\n"
        "    i._Abort.last_acts.append(lambda: 1 / 0)\n"
        "    threading.Timer(0.5, abort, (ClusterLost('Ray died'), threading.Event())).start()\n"
        "    while True:\n"
        "        try: time.sleep(1)\n"
        "        except ClusterLost: continue\n"
    )
    assert run.returncode == 2
    assert run.stdout.split() == ["second", "first"] and run.stderr == "tune-ego: Ray died\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("moment", ["from tune_ego import cli", "cli.main()"])
def test_a_command_that_is_interrupted_ends_with_130_and_one_line(
    number: signal.Signals, moment: str, tmp_path: Path
) -> None:
    """While the command line is imported, and while a command runs."""
    code = (
        "import tune_ego.__main__ as entry, builtins, os, sys\n"
        "sys.argv = ['tune-ego', 'inspect', 'x']\n"
        f"def end(*_): os.kill(os.getpid(), {int(number)})\n"
    )
    if moment == "cli.main()":
        code += "import tune_ego.evaluation.inspection as i\ni.show_counts = end\n"
    else:
        code += "class Finder:\n    def find_spec(self, name, *_):\n        if name == 'tune_ego.cli': end()\n"
        code += "sys.meta_path.insert(0, Finder())\n"
    run = run_python(code + "entry.main()\n")
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "tune-ego: interrupted\n")


@pytest.mark.parametrize(
    ("end", "code"), [("KeyboardInterrupt", 130), ("SystemExit(15)", 130), ("SystemExit(2)", 2), ("SystemExit(0)", 0)]
)
def test_a_signal_while_the_process_ends_does_not_change_its_exit_code(end: str, code: int) -> None:
    """For example a second Ctrl+C while Ray's processes are ended by an exit handler."""
    run = run_python(
        "import atexit\n"
        "from tune_ego import __main__, cli\n"
        "def last():\n"
        "    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), number)\n"
        "    time.sleep(0.2)\n"
        "    print('cleaned')\n"
        "atexit.register(last)\n"
        f"def run(): raise {end}\n"
        "cli.main = run\n"
        "__main__.main()\n"
    )
    assert (run.returncode, run.stdout) == (code, "cleaned\n")
    assert run.stderr == ("tune-ego: interrupted\n" if code == 130 else "")


def test_a_program_that_handles_no_signals_is_not_ended(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver_signals._Abort, "handlers", 0)  # a session of Ray may be open
    abort(ClusterLost("gone"), threading.Event())
    assert capsys.readouterr().err == "tune-ego: gone\n"
