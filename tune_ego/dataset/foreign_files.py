"""Recognition of files that are stored in the place of another file: failed downloads, pointers, compressed files."""

from __future__ import annotations

HEAD = 512
"""Bytes of a file that are enough."""
_BEGINNINGS = {
    b"\x1f\x8b": "compressed with gzip; unpack it: gunzip FILE",
    b"PK\x03\x04": "a zip archive; unpack it: unzip FILE",
    b"BZh": "compressed with bzip2; unpack it: bunzip2 FILE",
    b"\xfd7zXZ": "compressed with xz; unpack it: unxz FILE",
    b"\xff\xfe": "a text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"\xfe\xff": "a text in UTF-16; convert it: iconv -f UTF-16 -t UTF-8",
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; fetch it: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex and not the file itself; fetch it: git annex get FILE",
}
_PAGE = (b"<!doctype html", b"<html", b"<?xml", b"<head")


def describe_foreign_file(head: bytes) -> str:
    """Return what a file is, with the remedy, from its first bytes; empty for all but the kinds known here."""
    for beginning, words in _BEGINNINGS.items():
        if head.startswith(beginning):
            return words
    text = head[:HEAD].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if text.startswith(_PAGE):
        return "a web page, such as the error page of a failed download; fetch it again"
    every_second = head[1:HEAD:2]
    if len(head) >= 8 and every_second.count(0) > 0.9 * len(every_second):
        return "a text in UTF-16; convert it: iconv -f UTF-16LE -t UTF-8"
    return ""
