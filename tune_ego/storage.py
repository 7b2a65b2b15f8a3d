"""Files at a local path or an object-store URI (`s3://`, `gs://`), through PyArrow's file systems."""

from __future__ import annotations

import functools
import json
import os
import re
import stat
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from tune_ego.console import say
from tune_ego.errors import StorageError, UserError

_PARTIAL = ".partial"
_RETRY_SECONDS = 20
_LONGEST_ERROR = 300
_PATIENCE = 120.0
"""Seconds for which a driver or worker tries again to reach its storage."""
_LONGEST_PAUSE = 10.0
_NO_RETRY_HELPS = (FileExistsError, FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)
P = ParamSpec("P")
R = TypeVar("R")


def _no_check() -> None:
    """Allow a further attempt to write."""


_patience = 0.0
_check_before_writing_again: Callable[[], None] = _no_check
_this_thread = threading.local()
"""Has the attribute `tries` while a function tries again in this thread."""


@contextmanager
def patience(seconds: float = _PATIENCE, before_writing_again: Callable[[], None] = _no_check) -> Iterator[None]:
    """Try failing reads and writes again for so many seconds while the body runs, in all threads of this process.

    A full disk, a lost mount or an object store that is overloaded may be back within this time.
    `before_writing_again` is called before each further attempt to write; what it raises ends the attempts.
    """
    global _patience, _check_before_writing_again
    before = _patience, _check_before_writing_again
    _patience, _check_before_writing_again = seconds, before_writing_again
    try:
        yield
    finally:
        _patience, _check_before_writing_again = before


def _patient(*, writes: bool = False) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Let a function try again under `patience`, with pauses of 0.5 s, 1 s, 2 s, ..., 10 s.

    A call within such a call is made once: the outer one tries again.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def with_patience(*arguments: P.args, **named: P.kwargs) -> R:
            if getattr(_this_thread, "tries", False):
                return function(*arguments, **named)
            _this_thread.tries = True
            try:
                return _try_patiently(lambda: function(*arguments, **named), arguments[0], writes=writes)
            finally:
                _this_thread.tries = False

        return with_patience

    return decorate


def _try_patiently(call: Callable[[], R], uri: object, *, writes: bool) -> R:
    end, pause, failed = time.monotonic() + _patience, 0.5, False
    while True:
        try:
            if failed and writes:
                _check_before_writing_again()
            result = call()
        except (OSError, StorageError) as error:
            cause = error.__cause__ if isinstance(error, StorageError) else error
            left = end - time.monotonic()
            if left <= 0 or isinstance(cause, _NO_RETRY_HELPS):
                raise
            if not failed:
                say(f"{uri}: {describe_error(cause or error)}; trying again for {left:.0f} s")
                failed = True
            time.sleep(min(pause, left))
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        if failed:
            say(f"{uri}: can be reached again")
        return result


def _interruptible(function: Callable[P, R]) -> Callable[P, R]:
    """Let signals end the waiting for an object store. PyArrow's calls return to Python only when they are over.

    For functions that read: a thread whose result nobody needs goes on until its time limit.
    """

    @functools.wraps(function)
    def in_thread(*arguments: P.args, **named: P.kwargs) -> R:
        if is_local(str(arguments[0])) or threading.current_thread() is not threading.main_thread():
            return function(*arguments, **named)
        outcome: SimpleQueue[Callable[[], R]] = SimpleQueue()

        def call() -> None:
            try:
                result = function(*arguments, **named)
            except BaseException as error:
                raised = error

                def fail() -> R:
                    raise raised

                outcome.put(fail)
            else:
                outcome.put(lambda: result)

        thread = threading.Thread(target=call, daemon=True)
        thread.start()
        try:
            give_result = outcome.get()
        except BaseException:
            _abandoned.append(thread)
            raise
        return give_result()

    return in_thread


_abandoned: list[threading.Thread] = []
"""Threads of interrupted calls."""


def has_abandoned_calls() -> bool:
    """Return whether an interrupted call to an object store still goes on."""
    return any(thread.is_alive() for thread in _abandoned)


class SourceFile(NamedTuple):
    """A file with the properties that tell whether it has changed."""

    uri: str
    bytes: int
    modified_ns: int
    """Nanoseconds since 1970; 0 where the file system has no time."""


def is_local(uri: str | Path) -> bool:
    return "://" not in str(uri)


def absolute(uri: str | Path) -> str:
    """Return a path that does not depend on the working directory, or a URI without a trailing slash."""
    text = str(uri)
    if not is_local(text):
        if "?" in text:
            raise UserError(f"{uri}: a URI with options (?...) is not supported; set them by environment variables")
        return text.rstrip("/")
    return str(Path(text).expanduser().resolve())


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


def join_name(folder: str | Path, name: str) -> str:
    """Return the path or URI of a result below a folder. Raises `UserError` for a name that is no path component."""
    if _NAME.fullmatch(name) is None:
        raise UserError(
            f"--name {name!r}: a name has up to 100 letters, digits, dots, dashes and underscores, and begins with a "
            "letter or digit"
        )
    return join(absolute(folder), name)


def resolve(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """Return (file system, path on it) of a local path or URI. Raises `UserError` where there is none."""
    try:
        filesystem, path = pafs.FileSystem.from_uri(_with_time_limit(absolute(uri)))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{uri}: not a path or URI that can be opened ({describe_error(error)})") from error
    return filesystem, path


def _with_time_limit(uri: str) -> str:
    """Add a time limit to a URI of Google's store without one. Its own limit, 15 minutes, looks like a hang."""
    if not uri.startswith(("gs://", "gcs://")) or "retry_limit_seconds=" in uri:
        return uri
    return f"{uri}{'&' if '?' in uri else '?'}retry_limit_seconds={_RETRY_SECONDS}"


def describe_error(error: BaseException) -> str:
    """Return the cause of a storage error in at most 300 characters; the messages of object stores are longer."""
    text = " ".join(str(error).split())
    text = text.rpartition("The underlying error message was: ")[2].partition(" error_info=")[0]
    return text if len(text) <= _LONGEST_ERROR else f"{text[:_LONGEST_ERROR]}..."


@_patient()
@_interruptible
def exists(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


@_patient()
@_interruptible
def is_file(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


@_patient(writes=True)
def remove(uri: str | Path) -> None:
    """Delete a file, if it exists."""
    if is_file(uri):
        filesystem, path = resolve(uri)
        filesystem.delete_file(path)


def remove_folder(uri: str | Path) -> None:
    """Delete a folder and its content, if it exists."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


@_patient()
@_interruptible
def list_names(uri: str | Path) -> list[str]:
    """Return the names directly below a folder, sorted; an absent folder has none."""
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


@_interruptible
def find_files(uri: str | Path, suffix: str | tuple[str, ...]) -> list[SourceFile]:
    """Return the files below a folder whose names end in `suffix`, or in one of several, in any case, sorted by path.

    An absent folder has none.
    """
    filesystem, path = resolve(uri)
    infos = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    files = [info for info in infos if info.is_file and info.base_name.lower().endswith(suffix)]
    return [
        SourceFile(join(absolute(uri), os.path.relpath(info.path, path)), info.size, info.mtime_ns or 0)
        for info in sorted(files, key=lambda info: info.path)
    ]


@_patient()
@_interruptible
def read_bytes(uri: str | Path, size: int | None = None) -> bytes:
    """Read a whole file, or its first `size` bytes."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read(size))


def read_text(uri: str | Path) -> str:
    return read_bytes(uri).decode()


@_patient(writes=True)
def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a whole file atomically: no reader sees a part of it. Raises `StorageError` where writing fails.

    A device or a pipe (`/dev/stdout`) is written to, not replaced.
    """
    try:
        _write_bytes(uri, data)
    except OSError as error:
        raise StorageError(f"{uri}: cannot be written ({describe_error(error)})") from error


def _write_bytes(uri: str | Path, data: bytes) -> None:
    if is_special(uri):
        with open(uri, "wb") as stream:
            stream.write(data)
        return
    with _open_output(*resolve(uri)) as stream:
        # An object appears when its stream is closed, and leaving this block closes the stream on every path. All
        # bytes are written in one call, which the exception of a signal cannot split. If the store rejected a part of
        # them, closing fails as well.
        stream.write(data)


def _open_output(filesystem: pafs.FileSystem, path: str) -> AbstractContextManager[Any]:
    """Open a file for writing; it has its new content when it is closed."""
    return _replacing(path) if isinstance(filesystem, pafs.LocalFileSystem) else filesystem.open_output_stream(path)


@contextmanager
def _replacing(path: str) -> Iterator[BinaryIO]:
    """Open a new file that takes the place of a local one when the block ends without an exception."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # a machine that fails after the rename has the content, not an empty file
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)
    _sync_folder(Path(path).parent)


def _sync_folder(folder: Path) -> None:
    """Make renames in a local folder durable, where its file system can."""
    try:
        number = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        with suppress(OSError):  # some file systems cannot; the content itself is durable
            os.fsync(number)
    finally:
        os.close(number)


@_patient(writes=True)
def write_file(uri: str | Path, source: str | Path) -> None:
    """Write a copy of a local file that is not empty, without reading it into memory; atomically, as `write_bytes`."""
    try:
        with pa.memory_map(str(source)) as file, _open_output(*resolve(uri)) as stream:
            stream.write(file.read_buffer())  # in one call, as above
    except OSError as error:
        raise StorageError(f"{uri}: cannot be written ({describe_error(error)})") from error


def is_special(uri: str | Path) -> bool:
    """Return whether a path is a device, a pipe or a socket."""
    try:
        mode = os.stat(uri).st_mode if is_local(uri) else stat.S_IFREG
    except OSError:
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def is_partial(name: str) -> bool:
    """Return whether a file was left by a process that was killed while it wrote."""
    return name.endswith(_PARTIAL)


def remove_partial(folder: str | Path) -> None:
    """Delete the partial files of killed processes below a folder; object stores have none."""
    for file in find_files(folder, _PARTIAL) if is_local(folder) else ():
        remove(file.uri)


def write_text(uri: str | Path, text: str) -> None:
    write_bytes(uri, text.encode())


def parse_json(text: bytes | str) -> Any:
    """Parse JSON. Raises `ValueError`, also for a key that is given twice and for values nested very deeply."""

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r:.80} is given twice")
        return result

    try:
        return json.loads(text, object_pairs_hook=build)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(uri: str | Path) -> Any:
    """Read a JSON file. Raises `UserError` for damaged content, as `parse_json` does."""
    try:
        return parse_json(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: damaged: not JSON ({error})") from error


def write_json(uri: str | Path, value: Any) -> None:
    write_text(uri, json.dumps(value, indent=1, allow_nan=False) + "\n")
