"""Files on a local disk, YAML as people write it, and the user's mistakes behind other exceptions."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import COMMAND
from tune_ego import storage
from tune_ego.errors import StorageError, UserError, user_error_in


@pytest.mark.parametrize(
    ("parts", "joined"),
    [(("a", "b"), "a/b"), (("a/", "b", "c"), "a/b/c"), (("s3://bucket/x//", "y"), "s3://bucket/x/y"), (("/a",), "/a")],
)
def test_parts_are_joined_with_one_slash(parts: tuple[str, ...], joined: str) -> None:
    assert storage.join(*parts) == joined
    assert storage.join(Path("/a/b"), "c") == "/a/b/c"


def test_absolute_paths_do_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    assert storage.absolute("x/../y/") == str(tmp_path / "y")
    assert storage.absolute("~/x") == "/nowhere/x"
    assert storage.absolute("s3://bucket/../x/") == "s3://bucket/../x"
    assert storage.absolute(Path("y")) == str(tmp_path / "y")


@pytest.mark.parametrize(("uri", "local"), [("/a/b", True), ("a:b", True), ("s3://a", False), ("gs://a/b", False)])
def test_uris_are_not_local(uri: str, local: bool) -> None:
    assert storage.is_local(uri) is local


def test_addresses_that_no_file_system_has_are_named() -> None:
    with pytest.raises(UserError, match="nothing://x: not a path or URI that can be opened"):
        storage.read_bytes("nothing://x")


def test_names_below_a_folder_are_sorted(tmp_path: Path) -> None:
    for name in ("c", "a.txt", "B", "d/e"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert storage.list_names(tmp_path) == ["B", "a.txt", "c", "d"]
    assert storage.list_names(tmp_path / "absent") == []


def test_files_are_found_at_any_depth_and_in_any_case(tmp_path: Path) -> None:
    contents = {"z.MP4": b"1", "b/a.mp4": b"22", "b/c/d.Mp4": b"", "b/mp4": b"1", "a.txt": b"1"}
    for name, content in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
        os.utime(tmp_path / name, ns=(5, 1_000_000_007_000))
    (tmp_path / "folder.mp4").mkdir()
    assert storage.find_files(tmp_path, ".mp4") == [
        (f"{tmp_path}/b/a.mp4", 2, 1_000_000_007_000),
        (f"{tmp_path}/b/c/d.Mp4", 0, 1_000_000_007_000),
        (f"{tmp_path}/z.MP4", 1, 1_000_000_007_000),
    ]
    assert storage.find_files(tmp_path / "absent", ".mp4") == []


def test_what_is_there_and_what_is_removed(tmp_path: Path) -> None:
    storage.write_text(tmp_path / "new" / "folder" / "a.txt", "héllo")
    file, folder = tmp_path / "new" / "folder" / "a.txt", tmp_path / "new"
    assert storage.read_text(file) == "héllo" and file.read_bytes() == "héllo".encode()
    assert storage.read_bytes(file, 2) == b"h\xc3" and len(storage.read_bytes(file)) == 6
    assert [storage.exists(path) for path in (file, folder, tmp_path / "x")] == [True, True, False]
    assert [storage.is_file(path) for path in (file, folder, tmp_path / "x")] == [True, False, False]
    storage.remove(folder)  # no file
    storage.remove(tmp_path / "x")
    storage.remove_folder(file)  # no folder
    storage.remove_folder(tmp_path / "x")
    assert file.exists()
    storage.remove(file)
    assert not file.exists() and file.parent.exists()
    storage.remove_folder(folder)
    assert not folder.exists()


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_a_write_that_fails_leaves_the_former_content_and_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    storage.write_bytes(tmp_path / "a", b"former")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync" if broken == "write" else "replace", fail)
        with pytest.raises(StorageError, match=rf"{tmp_path}/a: cannot be written \(.*No space left"):
            storage.write_bytes(tmp_path / "a", b"half a file")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_bytes() == b"former"
    storage.write_bytes(tmp_path / "a", b"later")
    assert (tmp_path / "a").read_bytes() == b"later"


def test_a_copied_file_replaces_the_former_one_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "below" / "target"
    source.write_bytes(bytes(range(256)) * 1000)
    storage.write_file(target, source)
    assert target.read_bytes() == source.read_bytes()

    def fail(*paths: object) -> None:
        raise OSError("no space left")

    before = target.read_bytes()
    source.write_bytes(b"new")
    monkeypatch.setattr("tune_ego.storage.os.replace", fail)
    with pytest.raises(StorageError, match=r"target: cannot be written \(no space left\)"):
        storage.write_file(target, source)
    assert target.read_bytes() == before and [path.name for path in target.parent.iterdir()] == ["target"]


def test_content_appears_in_one_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the moment of renaming, all bytes lie under another name of the same folder."""
    seen: list[tuple[Path, bytes, bytes]] = []
    replace = os.replace

    def watched(source: str, target: str) -> None:
        seen.append((Path(source).parent, Path(source).read_bytes(), Path(target).read_bytes()))
        assert storage.is_partial(source) and not storage.is_partial(target)
        replace(source, target)

    (tmp_path / "a").write_bytes(b"former")
    monkeypatch.setattr(os, "replace", watched)
    storage.write_bytes(tmp_path / "a", b"later")
    assert seen == [(tmp_path, b"later", b"former")]


def test_what_killed_writers_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for name in ("a.1234.partial", "b/c.5678.partial", "b/c", "partial"):
        (tmp_path / name).touch()
    storage.remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["b", "c", "partial"]
    storage.remove_partial(tmp_path / "absent")


def test_json_is_strict_and_readable(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "a.json", {"b": [1, None], "a": "x"})
    assert (tmp_path / "a.json").read_text() == '{\n "b": [\n  1,\n  null\n ],\n "a": "x"\n}\n'
    assert storage.read_json(tmp_path / "a.json") == {"b": [1, None], "a": "x"}
    with pytest.raises(ValueError, match="JSON compliant"):
        storage.write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert json.loads((tmp_path / "a.json").read_text()) == {"b": [1, None], "a": "x"}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(UserError, match=r"b\.json: damaged: not JSON"):
        storage.read_json(tmp_path / "b.json")


class Wrapped(Exception):
    """An exception as Ray wraps one: its origin is an attribute."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__("a task failed")
        self.cause = cause


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "kind", "text"),
    [
        (UserError("x"), UserError, "x"),
        (StorageError("full"), StorageError, "full"),
        (Wrapped(UserError("x")), UserError, "x"),
        (Wrapped(Wrapped(StorageError("full"))), StorageError, "full"),
        (caused(RuntimeError("r"), caused(KeyError("k"), UserError("x"))), UserError, "x"),
        (caused(UserError("outer"), UserError("inner")), UserError, "inner"),  # Ray raises its copy from the original
        (caused(UserError("outer"), OSError("inner")), UserError, "outer"),
        (RuntimeError("r"), None, ""),
        (Wrapped(RuntimeError("r")), None, ""),
        (None, None, ""),
    ],
)
def test_the_user_s_mistake_behind_an_exception(
    error: BaseException | None, kind: type[UserError] | None, text: str
) -> None:
    mistake = user_error_in(error)
    assert (type(mistake), str(mistake)) == (kind, text) if kind else mistake is None


@pytest.mark.parametrize("name", ["full", "run-2", "0.5_a", "A" * 100])
def test_a_name_is_one_component_below_the_folder(name: str, tmp_path: Path) -> None:
    assert storage.join_name(tmp_path, name) == f"{tmp_path}/{name}"
    assert storage.join_name("s3://bucket/results/", name) == f"s3://bucket/results/{name}"


@pytest.mark.parametrize("name", ["", ".", "..", "../up", "a/b", "/etc", "-x", ".hidden", "a b", "ä", "a\n", "A" * 101])
def test_other_names_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^--name .* a name has up to 100 letters, digits, dots, dashes"):
        storage.join_name(tmp_path, name)


def test_a_time_limit_is_added_to_google_s_store_alone() -> None:
    for uri, limited in (
        ("gs://bucket/a", "gs://bucket/a?retry_limit_seconds=20"),
        ("gcs://bucket/a?scheme=http", "gcs://bucket/a?scheme=http&retry_limit_seconds=20"),
        ("gs://bucket/a?retry_limit_seconds=5", "gs://bucket/a?retry_limit_seconds=5"),
        ("s3://bucket/a", "s3://bucket/a"),
        ("/a", "/a"),
    ):
        assert storage._with_time_limit(uri) == limited


def test_errors_of_object_stores_become_one_readable_line() -> None:
    google = (
        "google::cloud::Status(UNAVAILABLE: Retry policy exhausted, with a last message of Could not create a token. "
        "The underlying error message was: PerformWork() - CURL error [6]=Could not resolve hostname "
        "error_info={reason=, domain=, metadata={}})"
    )
    assert storage.describe_error(OSError(google)) == "PerformWork() - CURL error [6]=Could not resolve hostname"
    assert storage.describe_error(OSError("two\nlines")) == "two lines"
    assert storage.describe_error(OSError("x" * 400)) == "x" * 300 + "..."


def test_a_store_without_network_ends_soon_with_one_line(tmp_path: Path) -> None:
    """A proxy that refuses stands for no network."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    environment |= {"https_proxy": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1"}
    script = f"import tune_ego.storage as s; s._RETRY_SECONDS = 1; {COMMAND}"
    for command in (["status", "gs://no-such-bucket/a"], ["inspect", "gs://no-such-bucket/a"]):
        start = time.monotonic()
        run = subprocess.run([sys.executable, "-c", script, *command], env=environment, capture_output=True, text=True)
        assert run.returncode == 2 and len(run.stderr.splitlines()) == 1 and len(run.stderr) < 500
        assert time.monotonic() - start < 30


@pytest.mark.parametrize("command", [["status", "gs://no-such-bucket/a"], ["status", "s3://no-such-bucket/a"]])
def test_a_store_that_does_not_answer_can_be_interrupted(command: list[str]) -> None:
    """A server, or a proxy, that accepts connections and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy = f"http://127.0.0.1:{silent.getsockname()[1]}"
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        environment |= {"AWS_ENDPOINT_URL": proxy, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
        environment |= dict.fromkeys(("https_proxy", "http_proxy", "HTTPS_PROXY", "HTTP_PROXY"), proxy)
        started = [sys.executable, "-m", "tune_ego", *command]
        run = subprocess.Popen(started, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        silent.settimeout(60)
        silent.accept()  # it is waiting for the store now
        time.sleep(0.5)
        start = time.monotonic()
        run.send_signal(signal.SIGINT)
        _, errors = run.communicate(timeout=30)
    assert time.monotonic() - start < 5
    assert (run.returncode, errors) == (130, "tune-ego: interrupted\n")


def test_an_error_that_ends_the_waiting_for_a_store_ends_the_process_at_once() -> None:
    """For example a cluster that is lost meanwhile. PyArrow would wait for the store at the exit."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "AWS_ACCESS_KEY_ID": "a"}
        environment |= {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_SECRET_ACCESS_KEY": "b",
        }
        code = (
            "import sys, threading\n"
            "from tune_ego import __main__, driver_signals, errors\n"
            "ended = threading.Event()\n"
            "def lose(): input(); driver_signals.abort(errors.ClusterLost('lost'), ended)\n"
            "threading.Thread(target=lose, daemon=True).start()\n"
            "sys.argv = ['tune-ego', 'status', 's3://no-such-bucket/a']\n"
            "__main__.main()\n"
        )
        started = [sys.executable, "-c", code]
        pipe = subprocess.PIPE
        run = subprocess.Popen(started, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
        silent.settimeout(60)
        silent.accept()
        start = time.monotonic()
        _, errors = run.communicate("\n", timeout=40)
    assert time.monotonic() - start < 8
    assert (run.returncode, errors) == (2, "tune-ego: lost\n")


def test_a_device_or_a_pipe_is_written_to_and_not_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    storage.write_text(pipe, "content")
    assert os.read(reader, 99) == b"content" and stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    controller, terminal = os.openpty()  # no device that others need, such as /dev/null: this test may fail as root
    device = os.ttyname(terminal)
    (tmp_path / "device").symlink_to(device)
    storage.write_text(tmp_path / "device", "content")
    assert os.read(controller, 99) == b"content" and stat.S_ISCHR(os.stat(device).st_mode)
    assert (tmp_path / "device").is_symlink()
    os.close(terminal)
    os.close(controller)
    code = "from tune_ego import storage; storage.write_text('/dev/stdout', 'content')"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "content"


def test_a_file_is_durable_before_its_name_and_the_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine that fails leaves: the old content or the new one."""
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        fsync(number)

    def note_replace(source: str, target: str) -> None:
        events.append("renamed")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    storage.write_text(tmp_path / "a", "x")
    assert events == ["file", "renamed", "folder"]


@pytest.mark.parametrize("kind", ["directory", "below a file"])
def test_a_place_that_is_no_file_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    """However patient: waiting does not help."""
    (tmp_path / "file").write_text("former")
    place = tmp_path if kind == "directory" else tmp_path / "file" / "x"
    start = time.monotonic()
    with pytest.raises(StorageError, match="cannot be written"), storage.patience(30):
        storage.write_text(place, "x")
    assert time.monotonic() - start < 5 and (tmp_path / "file").read_text() == "former"


def test_reads_and_writes_are_tried_again_under_patience_and_not_longer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a").write_text("content")
    left = [OSError(5, "Input/output error")] * 2
    resolve = storage.resolve

    def fail(uri: str) -> Any:
        if left:
            raise left.pop()
        return resolve(uri)

    monkeypatch.setattr(storage, "resolve", fail)
    with storage.patience(20):
        assert storage.read_bytes(tmp_path / "a") == b"content"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "Input/output error; trying again for 20 s" in lines[0]
    assert lines[1] == f"{tmp_path}/a: can be reached again"
    left += [OSError(5, "Input/output error")] * 100
    with pytest.raises(OSError, match="Input/output error"), storage.patience(0.7):
        storage.read_bytes(tmp_path / "a")
    assert len(left) == 97  # at once, after 0.5 s, and at the end
    with pytest.raises(OSError, match="Input/output error"):
        storage.read_bytes(tmp_path / "a")
    assert len(left) == 96
    assert storage._PATIENCE == 120


@pytest.mark.parametrize("uri", ["gs://b/r?project_id=p", "s3://b/r?region=us-east-1"])
def test_a_uri_with_options_is_refused(uri: str) -> None:
    """Names are appended to it: all files would be one object."""
    with pytest.raises(UserError, match=r"a URI with options \(\?\.\.\.\) is not supported"):
        storage.join_name(uri, "a")


def test_what_checks_before_a_further_write_ends_its_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checks: list[str] = []

    def refuse() -> None:
        checks.append("asked")
        raise UserError("lost")

    def fail(uri: str) -> Any:
        raise OSError(5, "Input/output error")

    (tmp_path / "a").write_text("former")
    with storage.patience(20, refuse):
        storage.write_text(tmp_path / "b", "x")
        assert not checks  # the first attempt needs no check
        monkeypatch.setattr(storage, "resolve", fail)
        with pytest.raises(UserError, match=r"^lost$"):
            storage.write_text(tmp_path / "a", "x")
        with pytest.raises(UserError, match=r"^lost$"):
            storage.remove(tmp_path / "a")
    assert checks == ["asked"] * 2 and (tmp_path / "a").read_text() == "former"
    start = time.monotonic()
    with storage.patience(0.7, refuse), pytest.raises(OSError, match="Input/output error"):
        storage.exists(tmp_path / "a")  # reading harms nobody
    with storage.patience(0.7), pytest.raises(OSError, match="Input/output error"):
        storage.remove(tmp_path / "a")  # within it, `is_file` is called once an attempt
    assert len(checks) == 2 and time.monotonic() - start < 3
