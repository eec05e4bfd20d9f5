"""WebDataset shards: tar files whose members of one name are one sample, read where they lie."""

import json
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bitferry.device.errors import InputError
from bitferry.pipeline.data import sample
from bitferry.pipeline.data.formats import path_of, several
from bitferry.pipeline.data.formats.folder import ENDINGS
from bitferry.pipeline.data.records import GROUP, LABELS, MASKS, Record, to_sample
from bitferry.pipeline.data.sample import Picture, Sample, Wanted
from bitferry.pipeline.data.source import Table, Whole

MOST_LABEL_BYTES = 1_000_000


@dataclass(frozen=True)
class Member:
    """Where a member's bytes are."""

    shard: Path
    name: str
    offset: int
    size: int

    def read(self) -> bytes:
        """Read it, and nothing around it."""
        try:
            with self.shard.open("rb") as stream:
                stream.seek(self.offset)
                return stream.read(self.size)
        except OSError as error:
            raise InputError(f"{self.shard} cannot be read: {error.strerror}") from error


def reads(source: Whole) -> bool:
    """Take what ends in .tar, and compressed ones to refuse them."""
    path = path_of(source)
    return path is not None and path.name.endswith((".tar", ".tar.gz", ".tgz"))


def files(source: Whole) -> Iterable[Path]:
    """List the shards."""
    path = path_of(source)
    return several(path) if path else []


def read(source: Whole, wanted: Wanted) -> list[Sample]:
    """Read the index and the labels of every shard; images stay where they are until they are decoded."""
    columns = source if isinstance(source, Table) else Table(path=source)
    return [
        to_sample(_record(shard, key, members, columns, wanted), None, wanted)
        for shard in files(source)
        for key, members in _grouped(shard).items()
        if not columns.image or set(members) & set(columns.image) or wanted.labelled
    ]


def _grouped(shard: Path) -> dict[str, dict[str, Member]]:
    """Put members of one name together, by what follows the first dot of their file name."""
    if shard.suffix != ".tar":
        raise InputError(f"{shard} is compressed, so that nothing in it can be found; unpack it to a plain .tar")
    found: dict[str, dict[str, Member]] = {}
    for member in _members(shard):
        folder, _, name = member.name.rpartition("/")
        stem, _, ending = name.partition(".")
        if stem and ending:
            found.setdefault(f"{folder}/{stem}" if folder else stem, {})[ending.lower()] = member
    return found


def _members(shard: Path) -> Iterator[Member]:
    """List a shard's files; links and devices are left out, and a file with holes is not where it says."""
    try:
        with tarfile.open(shard, "r:") as archive:
            for one in archive:
                if one.isreg() and not one.issparse():
                    yield Member(shard, one.name, one.offset_data, one.size)
                archive.members = []  # type: ignore[attr-defined]  # it keeps all of them, of which there are millions
    except (tarfile.TarError, OSError, ValueError) as error:
        raise InputError(f"{shard} is not a tar file that can be read: {error}") from error
    if shard.stat().st_size % tarfile.BLOCKSIZE:
        raise InputError(f"{shard} ends in the middle of a block; it was cut off. Write it or copy it again")


def _record(shard: Path, key: str, members: Mapping[str, Member], columns: Table, wanted: Wanted) -> Record:
    where = f"{shard.name}/{key}"
    masks = [ending for ending in members if ending.partition(".")[0] in MASKS and _is_image(ending)]
    mask = columns.mask or next(iter(masks), None)
    endings = columns.image or tuple(sorted(one for one in members if _is_image(one) and one not in masks))
    if len(endings) != wanted.contract.views or not set(endings) <= set(members):
        wants = f"{wanted.contract.views} image{'s'[: wanted.contract.views != 1]}"
        named = f" ({', '.join(columns.image)})" if columns.image else " (.jpg, .png, .webp, …)"
        raise InputError(f"{where}: expected {wants}{named}, found {', '.join(sorted(members)) or 'nothing'}")
    views = tuple(_picture(f"{where}.{ending}", members[ending]) for ending in endings)
    told = _told(where, members)
    label = _label(where, members, told, columns, endings)
    found = members.get(mask) if mask and wanted.task == "segmentation" else None
    return Record(where, views, label, found.read if found else None, told.get(columns.group or GROUP))


def _is_image(ending: str) -> bool:
    return f".{ending.rpartition('.')[2]}" in ENDINGS


def _picture(source: str, member: Member) -> Picture:
    return sample.encoded(source, partial(Member.read, member))


def _told(where: str, members: Mapping[str, Member]) -> Mapping[str, object]:
    """Give what the `json` member says."""
    if "json" not in members:
        return {}
    try:
        found = json.loads(_text(where, members["json"]))
    except (json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{where}.json is not JSON: {error}") from None
    return found if isinstance(found, dict) else {LABELS[0]: found}


def _label(
    where: str, members: Mapping[str, Member], told: Mapping[str, object], columns: Table, images: Sequence[str]
) -> object:
    """Give the text of the `cls` member, or what the `json` says of the label."""
    name = columns.label or "cls"
    if name in members and name != "json" and name not in images:
        text = _text(f"{where}.{name}", members[name]).strip()
        return text if "|" in text or not text.isdecimal() else int(text)
    return next((told[one] for one in ([columns.label] if columns.label else LABELS) if one in told), None)


def _text(where: str, member: Member) -> str:
    if member.size > MOST_LABEL_BYTES:
        raise InputError(f"{where} has {member.size} bytes, which no label has")
    try:
        return member.read().decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not text: {error.reason}") from None
