"""FFmpeg's log about damaged video. Apart from video.py, which is long.

FFmpeg conceals damage: it returns frames with `is_corrupt` false and raises nothing. Only its log reports it, at level
ERROR ("error while decoding MB"), or at level INFO where errors are concealed without a further message.
"""

from __future__ import annotations

import logging
import threading
from types import TracebackType

import av.logging

_CONCEALED = "concealing "
# Messages of threads without a `DecoderLog` go nowhere. Without a handler Python would print them.
logging.getLogger("libav").addHandler(logging.NullHandler())
logging.getLogger("libav").propagate = False


class DecoderLog:
    """Context manager that records what FFmpeg reports about damage in this thread."""

    _lock = threading.Lock()
    _users = 0

    def __init__(self) -> None:
        self._capture = av.logging.Capture()
        self._messages: list[tuple[int, str, str]] = []
        self.ignored: set[str] = set()
        """Origins whose messages do not count, e.g. decoders of the sound."""

    def __enter__(self) -> DecoderLog:
        with DecoderLog._lock:
            DecoderLog._users += 1
            av.logging.set_level(av.logging.INFO)
            av.logging.set_skip_repeated(False)  # else a repeated message is held back, and given to a later log
        self._messages = self._capture.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._capture.__exit__(kind, error, trace)
        with DecoderLog._lock:
            DecoderLog._users -= 1
            if not DecoderLog._users:
                av.logging.set_level(None)  # PyAV's default: no log, for speed

    @property
    def damage(self) -> str:
        """The first message about damage; empty where there is none."""
        for level, origin, message in self._messages:
            if origin not in self.ignored and (level <= av.logging.ERROR or message.startswith(_CONCEALED)):
                return f"{origin}: {message.strip()}"
        return ""
