"""Entry point of the command line, `tune-ego` and `python -m tune_ego`."""

from __future__ import annotations

import sys

from tune_ego.driver_signals import INTERRUPTED, signals_handled


def main() -> None:
    """Run the command line. From here on signals end it with code 130 and one line, also while it imports."""
    with signals_handled():
        try:
            from tune_ego import cli

            cli.main()
        except KeyboardInterrupt:
            print("tune-ego: interrupted", file=sys.stderr)
            raise SystemExit(INTERRUPTED) from None


if __name__ == "__main__":
    main()
