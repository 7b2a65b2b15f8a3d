"""Entry point of the command line, `tune-ego` and `python -m tune_ego`."""

from __future__ import annotations

import os
import signal
import sys

from tune_ego.driver_signals import INTERRUPTED, ignore_signals, signals_handled


def main() -> None:
    """Run the command line. From here on signals end it with code 130 and one line, also while it imports."""
    code: int | str | None
    with signals_handled():
        try:
            from tune_ego import cli

            cli.main()
        except KeyboardInterrupt:
            code = _interrupted()
        except SystemExit as end:
            ignore_signals()
            # Ray's own handler of SIGTERM exits with the signal's number, without a word.
            code = _interrupted() if end.code == signal.SIGTERM else end.code
        else:
            return
    _end_now(code)
    raise SystemExit(code)


def _interrupted() -> int:
    ignore_signals()
    print("tune-ego: interrupted", file=sys.stderr)
    return INTERRUPTED


def _end_now(code: int | str | None) -> None:
    """End this process if an interrupted call to an object store goes on: PyArrow would wait for it at the exit."""
    storage = sys.modules.get("tune_ego.storage")
    if storage is not None and storage.has_abandoned_calls():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    main()
