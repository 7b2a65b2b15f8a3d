"""Signals of the driver: SIGINT, SIGTERM and SIGHUP. Nothing is imported here that takes time to import."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import ClassVar, NoReturn

INTERRUPTED = 130
"""Exit code of a command that was interrupted, as shells have it."""
FAILED = 2
"""Exit code of a command that cannot do its work; its last line says why."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""SIGINT is Ctrl+C. SIGTERM is sent by schedulers, container runtimes and `timeout`, SIGHUP by a closed terminal."""
_UNWIND_WITHIN = 10.0
"""Seconds that the main thread has to end after `abort`. It may hang in a library's call."""

Handler = Callable[[int, "FrameType | None"], None]


class EndedInterrupted(SystemExit):
    """Exit of an interrupted command that has already printed how to resume."""


def raise_interrupt(number: int = signal.SIGINT, frame: FrameType | None = None) -> None:
    """Raise `KeyboardInterrupt`; a signal handler."""
    raise KeyboardInterrupt


@contextmanager
def signals_handled(handler: Handler = raise_interrupt) -> Iterator[None]:
    """Call `handler` at each of the signals while the body runs. Signals that this process ignores stay ignored.

    An error given to `abort` is raised instead. In another thread than the main one nothing is changed, as Python
    allows handlers there only.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def dispatch(number: int, frame: FrameType | None) -> None:
        if _Abort.error is not None:
            error, _Abort.error = _Abort.error, None
            raise error
        handler(number, frame)

    before = {number: signal.getsignal(number) for number in _SIGNALS}
    handled = [number for number in _SIGNALS if before[number] != signal.SIG_IGN or number == signal.SIGTERM]
    for number in handled:
        signal.signal(number, dispatch)
    _Abort.handlers += 1
    try:
        yield
    finally:
        _Abort.handlers -= 1
        for number in handled:
            if signal.getsignal(number) != signal.SIG_IGN:  # `ignore_signals`
                signal.signal(number, before[number])


def ignore_signals() -> None:
    """Ignore the signals from here on, for a process whose work is over: its exit code stays as it is."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


class _Abort:
    """State of `abort`, which is called in another thread than the main one."""

    error: Exception | None = None
    handlers = 0
    """Number of `signals_handled` that are active."""
    last_acts: ClassVar[list[Callable[[], None]]] = []


@contextmanager
def last_act(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` if `abort` has to end the process while the body runs."""
    _Abort.last_acts.append(action)
    try:
        yield
    finally:
        _Abort.last_acts.remove(action)


def abort(error: Exception, ended: threading.Event) -> None:
    """Raise `error` in the main thread, within `signals_handled`, and wait for `ended`.

    A main thread that hangs in a library's call is given 10 s. Then the error is printed, the actions of `last_act` are
    called, the last one first, and the process ends with code 2. Without `signals_handled`, in a program that uses this
    package in another thread, the error is printed only.
    """
    if not _Abort.handlers:
        print(f"tune-ego: {error}", file=sys.stderr)
        return
    _Abort.error = error
    end = time.monotonic() + _UNWIND_WITHIN
    main = threading.main_thread().ident
    while _Abort.error is not None and main is not None and time.monotonic() < end:
        signal.pthread_kill(main, signal.SIGTERM)  # interrupts a system call, unlike `_thread.interrupt_main`
        ended.wait(0.5)
    if ended.wait(max(0.0, end - time.monotonic())):
        return
    print(f"tune-ego: {error}", file=sys.stderr)
    for action in reversed(_Abort.last_acts):
        with suppress(Exception):  # the storage may be what is lost
            action()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(FAILED)


def end_interrupted(resume_command: str) -> NoReturn:
    """Print how to resume, and end this process with the exit code of an interrupted command."""
    from tune_ego.console import say

    say(f"Interrupted. To resume from the last checkpoint, run: {resume_command}")
    raise EndedInterrupted(INTERRUPTED)
