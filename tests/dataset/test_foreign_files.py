"""Files that are stored in the place of gaze files, annotations and videos."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zipfile
from pathlib import Path

import pytest

from tune_ego.dataset import video
from tune_ego.dataset.annotations import find_clips, find_duplicate_clips, find_gaze, read_index, read_split
from tune_ego.dataset.foreign_files import describe_foreign_file
from tune_ego.dataset.gaze import check_gaze_layout, read_gaze
from tune_ego.errors import UserError
from tune_ego.storage import SourceFile

TEXT = "Time\tL POR X [px]\tL POR Y [px]\tFrame\tL Event Info\n1\t10\t20\t3\tFixation\n"


def zipped(text: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("gaze.txt", text)
    return buffer.getvalue()


FOREIGN = {
    "gzip": (gzip.compress(TEXT.encode()), "gunzip"),
    "zip": (zipped(TEXT), "unzip"),
    "bzip2": (bz2.compress(TEXT.encode()), "bunzip2"),
    "xz": (lzma.compress(TEXT.encode()), "unxz"),
    "utf-16": (TEXT.encode("utf-16"), "iconv -f UTF-16 "),
    "utf-16be": (b"\xfe\xff" + TEXT.encode("utf-16-be"), "iconv -f UTF-16 "),
    "utf-16 without a mark": (TEXT.encode("utf-16-le"), "iconv -f UTF-16LE"),
    "utf-16be without a mark": (TEXT.encode("utf-16-be"), "iconv -f UTF-16BE "),
    "utf-32": (TEXT.encode("utf-32"), "iconv -f UTF-32 "),
    "utf-32be": (b"\x00\x00\xfe\xff" + TEXT.encode("utf-32-be"), "iconv -f UTF-32 "),
    "utf-32le without a mark": (TEXT.encode("utf-32-le"), "iconv -f UTF-32LE "),
    "utf-32be without a mark": (TEXT.encode("utf-32-be"), "iconv -f UTF-32BE "),
    "office": (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(100), "an old office document"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(range(100)), "unzstd"),
    "7z": (b"7z\xbc\xaf\x27\x1c" + bytes(range(100)), "7z x"),
    "page with a comment": (b"<!-- saved -->\n<html>", "a web page"),
    "error of a store": (b"<Error><Code>NoSuchKey</Code></Error>", "a web page"),
    "error in JSON": (b'{"error": "not found"}', "a text in JSON"),
    "dvc": (b"outs:\n- md5: 0123\n  size: 3\n  path: OP01-R01-Tea.txt\n", "dvc pull"),
    "old dvc": (b"md5: 4567\nouts:\n- md5: 0123\n  path: OP01-R01-Tea.txt\n", "dvc pull"),
    "page": (b"<!DOCTYPE html>\n<html><body>404</body></html>", "a web page"),
    "page with blanks": (b"\n  <HTML><head></head>", "a web page"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s3--1.txt\n", "git annex get"),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_each_kind_is_named_with_its_remedy_wherever_it_lies(kind: str, tmp_path: Path) -> None:
    data, remedy = FOREIGN[kind]
    path = tmp_path / "OP01-R01-Tea.txt"
    path.write_bytes(data)
    for read, what in (
        (read_gaze, "gaze file"),
        (check_gaze_layout, "gaze file"),
        (read_index, "annotation file"),
        (read_split, "annotation file"),
    ):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}: no {what} but ") and remedy in str(caught.value)
    for open_video in (video.probe, video.check_opens):
        with pytest.raises(UserError) as caught:
            open_video(str(path))
        assert str(caught.value).startswith("no video but ") and remedy in str(caught.value)


@pytest.mark.parametrize(
    "head", [b"", b"a", TEXT.encode(), b"\xef\xbb\xbf" + TEXT.encode(), b"## [BeGaze]\r\n", bytes(7)]
)
def test_other_files_are_not_described(head: bytes) -> None:
    assert describe_foreign_file(head) == ""


def test_compressed_files_and_pointers_stand_for_the_file_where_it_is_absent(tmp_path: Path) -> None:
    gaze, clips = tmp_path / "gaze_data", tmp_path / "cropped_clips" / "deep"
    for folder in (gaze, clips):
        folder.mkdir(parents=True)
    (gaze / "a.txt.gz").write_bytes(b"x")
    (gaze / "b.txt").write_bytes(b"x")
    (gaze / "b.txt.dvc").write_bytes(b"x")
    (gaze / "c.TXT.ZIP").write_bytes(b"x")
    (gaze / "c.txt").write_bytes(b"")
    (gaze / "d.gz").write_bytes(b"x")
    (clips / "e.mp4.dvc").write_bytes(b"x")
    (clips / "f.mp4").write_bytes(b"x")
    (clips / "f.mp4.dvc").write_bytes(b"x")

    def names(files: dict[str, SourceFile]) -> dict[str, str]:
        return {name: Path(file.uri).name for name, file in files.items()}

    assert names(find_gaze(tmp_path)) == {"a": "a.txt.gz", "b": "b.txt", "c": "c.txt"}
    assert names(find_clips(tmp_path)) == {"e": "e.mp4.dvc", "f": "f.mp4"}
    assert find_duplicate_clips(tmp_path) == {}
