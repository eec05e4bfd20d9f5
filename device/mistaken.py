"""What a file is that should be another: a web page, a pointer to what was never fetched, an archive."""

import json
import re
from pathlib import Path

LOOKED_AT = 4096
AGAIN = "get the file itself"
LFS = "a pointer of Git LFS: fetch what it stands for, git lfs pull"
POINTERS = (
    (re.compile(rb"version https://(git-lfs\.github\.com|hawser)"), LFS),
    (
        re.compile(rb"[./\\]*(git/)?annex/objects/"),
        "a pointer of git-annex: fetch what it stands for, git annex get FILE",
    ),
    (re.compile(rb"(outs:\s*\n|md5: [0-9a-f]{32}\s)"), "a pointer of DVC: fetch what it stands for, dvc pull"),
)
PAGES = (b"<!doctype html", b"<html", b"<head", b"<body", b"<!--")
MAGIC = {
    b"\x1f\x8b": "compressed by gzip; unpack it",
    b"BZh": "compressed by bzip2; unpack it",
    b"\xfd7zXZ\x00": "compressed by xz; unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\x89HDF\r\n\x1a\n": "HDF5, as Keras writes it",
    b"\x93NUMPY": "a NumPy array (.npy)",
    b"GGUF": "GGUF, of a language model",
    b"%PDF": "a PDF document",
    b"\x7fELF": "a program of Linux (ELF)",
    b"PAR1": "a Parquet table",
}
"""First bytes → what such a file is."""


def told(content: bytes, size: int | None = None) -> str | None:
    """Say what a file is by its first bytes; None where they say nothing. `size` in bytes, where it is not all."""
    start = content[:LOOKED_AT]
    if not (len(content) if size is None else size):
        return f"empty: 0 bytes; {AGAIN}"
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n")
    if text[:20].lower().startswith(PAGES):
        title = _title(start)
        return f"a web page (HTML{title}), as servers send in place of a file that needs a login or is gone; {AGAIN}"
    if text.startswith(b"<?xml"):
        return f"an XML message ({_shown(text)}), as storage servers send in place of a file; {AGAIN}"
    for pattern, what in POINTERS:
        if pattern.match(text) and len(content) < LOOKED_AT:
            return what
    if start[257:262] == b"ustar":
        return "a tar archive; unpack it"
    found = next((what for magic, what in MAGIC.items() if start.startswith(magic)), None)
    return found or _message(content, text)


def of(path: Path) -> str | None:
    """Say what the file at `path` is; None where that is not seen, or it cannot be read."""
    try:
        with path.open("rb") as stream:
            return told(stream.read(LOOKED_AT), path.stat().st_size)
    except OSError:
        return None


def missing(path: Path) -> str | None:
    """Say why there is nothing at the end of a link; None where the path is no link."""
    if not path.is_symlink():
        return None
    end = path.readlink()
    if "annex/objects" in end.as_posix():
        return "it is a link into git-annex's store, where it is not yet: git annex get FILE"
    return f"it is a link to {end}, which does not exist"


def _message(content: bytes, text: bytes) -> str | None:
    """Tell JSON that a server answered with, and other text."""
    if text[:1] in (b"{", b"[") and len(content) < LOOKED_AT:
        try:
            json.loads(text)
        except ValueError:
            pass
        else:
            return f"JSON ({_shown(text)}), as servers send in place of a file; {AGAIN}"
    shown = text[:200]
    if len(shown) >= 8 and all(byte in b"\t\r\n" or 32 <= byte < 127 for byte in shown):
        return f"text ({_shown(text)}); {AGAIN}"
    return None


def _title(start: bytes) -> str:
    found = re.search(rb"<title[^>]*>([^<]{1,120})", start, re.IGNORECASE)
    return f", '{found[1].decode(errors='replace').strip()}'" if found else ""


def _shown(text: bytes) -> str:
    line = text[:60].decode(errors="replace").splitlines()[0].strip()
    return f"{line}…" if len(text) > 60 else line
