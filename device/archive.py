"""A bundle as one file: a gzipped tar with the manifest and the signature first, read as a stream and by the letter.

Only what `bitferry archive` writes is read (plain files of POSIX ustar, one folder around them), because every further
feature of tar is one more way out of the folder: links, devices, long names in headers of any size.
"""

import hashlib
import itertools
import os
import stat
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bitferry.device import strict
from bitferry.device.errors import InputError
from bitferry.device.signature import FILE as SIGNATURE

MANIFEST = "manifest.json"
BLOCK, PART = 512, 1 << 20
PACKED, GZIP = 1 << 16, 31
"""Bytes that are read at a time; what zlib calls one gzip member."""
MOST_IDLE = 1 << 18
"""Bytes in a row that unpack to nothing, as those of an endless header."""
MOST_END = 1 << 16
"""Zero bytes after the last member; tar fills up to 10,240."""
KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a device",
    b"4": "a device",
    b"5": "a folder",
    b"6": "a FIFO",
    b"x": "an extended header",
    b"g": "an extended header",
    b"L": "a long name",
    b"S": "a sparse file",
}


@dataclass(frozen=True)
class Member:
    """One file of an archive, whose bytes come next."""

    name: str
    size: int


class Reader:
    """Reads an archive from its beginning to its end, once.

    Raises InputError for everything that is not as it was written, at the first byte that shows it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.folder, self.left, self.padding = path, "", 0, 0
        try:
            handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise InputError(f"{path} is no file; the archive that `bitferry sign` wrote is expected")
        self.raw = os.fdopen(handle, "rb")
        self.inflating, self.ready, self.idle = zlib.decompressobj(wbits=GZIP), bytearray(), 0
        self.seen: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.raw.close()

    def __iter__(self) -> Iterator[Member]:
        """Give each file; what is left unread of one is skipped."""
        while True:
            for _ in self.parts():
                pass
            self._exactly(self.padding)
            header = self._exactly(BLOCK)
            if not header.strip(b"\0"):
                self._end()
                return
            yield self._member(header)

    def parts(self) -> Iterator[bytes]:
        """Give the bytes of the file that was given last, in parts."""
        while self.left:
            part = self._read(min(PART, self.left))
            if not part:
                raise self._broken("it ends too early")
            self.left -= len(part)
            yield part

    def whole(self, most: int = strict.MOST_BYTES) -> bytes:
        """Give all the bytes of the file that was given last."""
        if self.left > most:
            raise self._broken(f"{self.seen[-1]} has {self.left:,} bytes, and {most:,} are allowed")
        return b"".join(self.parts())

    def _member(self, header: bytes) -> Member:
        total = sum(header[:148]) + 8 * ord(" ") + sum(header[156:])
        if header[257:265] != b"ustar\x0000" or total != self._number(header[148:156]):
            raise self._broken("there is a header that bitferry does not write")
        if header[156:157] != b"0":
            raise self._broken(f"it holds {KINDS.get(header[156:157], 'something other than a plain file')}")
        parts = [header[345:500].rstrip(b"\0"), header[:100].rstrip(b"\0")]
        name = b"/".join(part for part in parts if part).decode(errors="replace")
        folder, _, inside = name.partition("/")
        if not strict.plain(name) or not inside or folder != (self.folder or folder):
            raise self._broken(f"it holds {name!r:.120}, which is no plain name inside its one folder")
        self.folder = folder
        self.seen.append(inside)
        if len(self.seen) > strict.MOST_FILES:
            raise self._broken(f"it holds more than {strict.MOST_FILES:,} files")
        self.left = self._number(header[124:136])
        self.padding = -self.left % BLOCK
        return Member(inside, self.left)

    def _number(self, field: bytes) -> int:
        text = field.rstrip(b"\0 ")
        if not text or text.strip(b"01234567"):
            raise self._broken("there is a header that bitferry does not write")
        return int(text, 8)

    def _exactly(self, count: int) -> bytes:
        found = self._read(count) if count else b""
        if len(found) < count:
            raise self._broken("it ends too early")
        return found

    def _end(self) -> None:
        rest = self._read(MOST_END + 1)
        if rest.strip(b"\0") or len(rest) > MOST_END:
            raise self._broken("something follows its end")

    def _read(self, count: int) -> bytes:
        """Give up to `count` bytes, fewer at the end only; raise InputError for a stream that is not whole."""
        while len(self.ready) < count and not self.inflating.eof:
            self.ready += self._inflated()
        found, self.ready = self.ready[:count], self.ready[count:]
        return bytes(found)

    def _inflated(self) -> bytes:
        packed = self.inflating.unconsumed_tail or self.raw.read(PACKED)
        if not packed:
            raise self._broken("it ends too early")
        try:
            found = self.inflating.decompress(packed, PART)
        except zlib.error as error:
            raise self._broken("it is damaged" if self.seen else "it is no gzipped tar") from error
        self.idle = 0 if found else self.idle + len(packed)
        if self.idle > MOST_IDLE:
            raise self._broken("its beginning says nothing")
        if self.inflating.eof and (self.inflating.unused_data or self.raw.read(1)):
            raise self._broken("something follows its end")
        return found

    def _broken(self, reason: str) -> InputError:
        return InputError(f"{self.path} is no whole archive of a bundle: {reason}; fetch or copy it again")


@dataclass(frozen=True)
class Head:
    """What an archive begins with, which is enough to refuse it."""

    manifest: Mapping[str, Any]
    content: bytes
    """Of the manifest."""
    signature: bytes
    folder: str

    @property
    def digest(self) -> str:
        """Give the sha256 of the manifest, which names every file's: one for each bundle."""
        return hashlib.sha256(self.content).hexdigest()


@contextmanager
def opened(path: Path) -> Iterator[tuple[Head, Reader]]:
    """Read the head of an archive, and leave the reader before its first further file."""
    with Reader(path) as reader:
        found = []
        for member, wanted in zip(itertools.islice(reader, 2), (MANIFEST, SIGNATURE), strict=False):
            if member.name != wanted:
                missing = "it is not signed: `bitferry sign` it first" if wanted == SIGNATURE else f"it has no {wanted}"
                raise InputError(f"{path} is no archive of a signed bundle: {missing}")
            found.append(reader.whole())
        if len(found) < 2:
            raise InputError(f"{path} is no archive of a signed bundle: it holds {len(found)} files")
        manifest = strict.read(found[0], f"{MANIFEST} of {path}")
        yield Head(manifest, found[0], found[1], reader.folder), reader


def read_head(path: Path) -> Head:
    """Read what an archive begins with, and no further."""
    with opened(path) as (head, _):
        return head
