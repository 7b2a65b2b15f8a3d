"""Recognition of files in the place of videos, gaze or annotations: failed downloads, pointers, compressed files."""

from __future__ import annotations

HEAD = 512
"""Bytes of a file that are enough."""
WRAPPINGS = (".gz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".dvc")
"""Endings that are added to the name of a file that is compressed, or stored elsewhere."""
_UTF_16 = "a text in UTF-16; convert it: iconv -f UTF-16{} -t UTF-8"
_UTF_32 = "a text in UTF-32; convert it: iconv -f UTF-32{} -t UTF-8"
_BEGINNINGS = {
    b"\x1f\x8b": "compressed with gzip; unpack it: gunzip FILE",
    b"PK\x03\x04": "a zip archive or an office document; unpack it (unzip FILE) or save it as text",
    b"BZh": "compressed with bzip2; unpack it: bunzip2 FILE",
    b"\xfd7zXZ": "compressed with xz; unpack it: unxz FILE",
    b"\x28\xb5\x2f\xfd": "compressed with zstd; unpack it: unzstd FILE",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it: 7z x FILE",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an old office document; save it as text",
    b"\xff\xfe\x00\x00": _UTF_32.format(""),
    b"\x00\x00\xfe\xff": _UTF_32.format(""),
    b"\xff\xfe": _UTF_16.format(""),
    b"\xfe\xff": _UTF_16.format(""),
    b"version https://git-lfs": "a pointer of Git LFS and not the file itself; fetch it: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex and not the file itself; fetch it: git annex get FILE",
}
_ZEROS: dict[tuple[bool, ...], str] = {
    (False, True, True, True): _UTF_32.format("LE"),
    (True, True, True, False): _UTF_32.format("BE"),
    (False, True, False, True): _UTF_16.format("LE"),
    (True, False, True, False): _UTF_16.format("BE"),
}
"""Bytes of four that are zero in a text of Latin letters -> its encoding."""


def describe_foreign_file(head: bytes) -> str:
    """Return what a file is, with the remedy, from its first bytes; empty for all but the kinds known here."""
    for beginning, words in _BEGINNINGS.items():
        if head.startswith(beginning):
            return words
    head = head[:HEAD]
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if text[:1] == b"<":
        return "a web page, such as the error page of a failed download; fetch it again"
    if text[:1] == b"{":
        return "a text in JSON, such as the error message of a failed download; fetch it again"
    if b"outs:" in text and b"md5:" in text:
        return "a pointer of DVC and not the file itself; fetch it: dvc pull"
    if len(head) < 8:
        return ""
    columns = [head[start::4] for start in range(4)]
    return _ZEROS.get(tuple(column.count(0) > 0.9 * len(column) for column in columns), "")
