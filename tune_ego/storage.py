"""Files at a local path or an object-store URI (`s3://`, `gs://`), through pyarrow's file systems."""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.fs as pafs

from tune_ego.errors import StorageError, UserError

_PARTIAL = ".partial"


class SourceFile(NamedTuple):
    uri: str
    bytes: int
    modified_ns: int
    """Since 1970; 0 where the file system does not say."""


def is_local(uri: str | Path) -> bool:
    return "://" not in str(uri)


def absolute(uri: str | Path) -> str:
    """The same place, independent of the working directory; URIs are returned without a trailing slash."""
    text = str(uri)
    if not is_local(text):
        return text.rstrip("/")
    return str(Path(text).expanduser().resolve())


def join(uri: str | Path, *parts: str) -> str:
    return "/".join([str(uri).rstrip("/"), *parts])


def resolve(uri: str | Path) -> tuple[pafs.FileSystem, str]:
    """(file system, path on it) of a local path or URI."""
    try:
        filesystem, path = pafs.FileSystem.from_uri(absolute(uri))
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{uri}: not a path or URI that can be opened ({error})") from error
    return filesystem, path


def exists(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != pafs.FileType.NotFound)


def is_file(uri: str | Path) -> bool:
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type == pafs.FileType.File)


def remove(uri: str | Path) -> None:
    """Delete a file, where it is there."""
    if is_file(uri):
        filesystem, path = resolve(uri)
        filesystem.delete_file(path)


def remove_folder(uri: str | Path) -> None:
    """Delete a folder with all that is in it, where it is there."""
    filesystem, path = resolve(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        filesystem.delete_dir(path)


def list_names(uri: str | Path) -> list[str]:
    """Names directly below a folder, sorted; an absent folder has none."""
    filesystem, path = resolve(uri)
    selector = pafs.FileSelector(path, allow_not_found=True)
    return sorted(info.base_name for info in filesystem.get_file_info(selector))


def find_files(uri: str | Path, suffix: str) -> list[SourceFile]:
    """Every file below a folder whose name ends in `suffix`, in any case, sorted; an absent folder has none."""
    filesystem, path = resolve(uri)
    found = filesystem.get_file_info(pafs.FileSelector(path, allow_not_found=True, recursive=True))
    files = [info for info in found if info.is_file and info.base_name.lower().endswith(suffix)]
    return [
        SourceFile(join(absolute(uri), os.path.relpath(info.path, path)), info.size, info.mtime_ns or 0)
        for info in sorted(files, key=lambda info: info.path)
    ]


def read_bytes(uri: str | Path, size: int | None = None) -> bytes:
    """A whole file, or its first `size` bytes."""
    filesystem, path = resolve(uri)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read(size))


def read_text(uri: str | Path) -> str:
    return read_bytes(uri).decode()


def write_bytes(uri: str | Path, data: bytes) -> None:
    """Write a whole file so that no reader ever sees half of it; raises `StorageError` where it cannot be."""
    try:
        _write_bytes(uri, data)
    except OSError as error:
        raise StorageError(f"{uri}: cannot be written ({error})") from error


def _write_bytes(uri: str | Path, data: bytes) -> None:
    filesystem, path = resolve(uri)
    if not isinstance(filesystem, pafs.LocalFileSystem):
        # An object appears when its stream is closed, and pyarrow's streams cannot be abandoned: each way out of here
        # closes it. So all bytes go in one call, which no signal's exception can cut in two; and where the store did
        # not take a part of them, closing fails as well.
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    partial = f"{path}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    try:
        Path(partial).write_bytes(data)
        os.replace(partial, path)
    finally:
        Path(partial).unlink(missing_ok=True)


def is_partial(name: str) -> bool:
    """Whether this is what a writer left that was killed while it wrote."""
    return name.endswith(_PARTIAL)


def remove_partial(folder: str | Path) -> None:
    """Delete what writers left below a folder that were killed while they wrote; object stores have no such files."""
    for file in find_files(folder, _PARTIAL) if is_local(folder) else ():
        remove(file.uri)


def write_text(uri: str | Path, text: str) -> None:
    write_bytes(uri, text.encode())


def read_json(uri: str | Path) -> Any:
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        raise UserError(f"{uri}: damaged: not JSON ({error})") from error


def write_json(uri: str | Path, value: Any) -> None:
    write_text(uri, json.dumps(value, indent=1, allow_nan=False) + "\n")
