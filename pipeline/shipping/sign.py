"""A bundle → its signature, and one archive with both: the same bytes for the same bundle and key."""

import gzip
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bitferry.device import atomic, runner, signature, strict, whole
from bitferry.device.archive import MANIFEST
from bitferry.device.errors import InputError
from bitferry.pipeline import progress
from bitferry.pipeline.shipping import keys, provenance

ENDING = ".tar.gz"
APART = frozenset({signature.FILE, *whole.PARTS})
SHIPPED = ("pass", "unmeasured")
"""Outcomes that are signed and published."""
LEVEL = 6
MOST_BYTES = 8**11
"""Of a file, as POSIX ustar writes its size."""


def refuse_unproved(manifest: Mapping[str, Any], place: Path) -> None:
    """Raise InputError for what was measured and not found inside its budget; what was never measured may be shipped.

    Such a bundle comes of one that was built unmeasured and completed by `bitferry verify`.
    """
    verdict = manifest.get("verdict") or {}
    outcome = verdict.get("outcome")
    if outcome is not None and outcome not in SHIPPED:
        raise InputError(
            f"{place} is not proved inside its budget ({outcome}: {verdict.get('headline')}); deploy one that is, or "
            "complete its verdict with `bitferry verify BUNDLE --data IMAGES` on a machine and images that show it"
        )


def sign(bundle: Path, key: Path, password: str | None = None) -> Path:
    """Write BUNDLE/model.sig, in the OpenSSF model-signing format, over every file that belongs to the bundle."""
    bundle = bundle.resolve()  # `.` has no name
    manifest = runner.read_manifest(bundle)
    refuse_unproved(manifest, bundle)
    signing = keys.private(key, password)
    runner.check(bundle, manifest)
    payload = signature.statement(bundle.name, whole.digests(bundle, without=APART))
    made = keys.sign(signature.encoded(payload), signing)
    path = bundle / signature.FILE
    atomic.write(path, signature.enclose(payload, made, keys.name_of(signing, str(key))))
    return path


def archive(bundle: Path, out: Path | None = None) -> Path:
    """Write a signed bundle into OUT, by default BUNDLE.tar.gz: sorted, owned by nobody, dated by SOURCE_DATE_EPOCH."""
    bundle = bundle.resolve()
    out = out or bundle.with_name(bundle.name + ENDING)
    if not (bundle / signature.FILE).is_file():
        raise InputError(f"{bundle} is not signed; `bitferry sign {bundle} --key KEY` first")
    names = sorted(whole.digests(bundle, without=APART - {signature.FILE}))
    if strange := [name for name in names if not strict.plain(f"{bundle.name}/{name}")]:
        raise InputError(f"{bundle.name}/{strange[0]} is no name that every device can hold; rename it, or the folder")
    first = [MANIFEST, signature.FILE]
    date = _date()
    part = out.with_name(f".{out.name}.part")
    try:
        with part.open("wb") as file, gzip.GzipFile("", "wb", LEVEL, file, mtime=date) as packed:
            _pack(bundle, [*first, *(name for name in names if name not in first)], packed, date)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    progress.stage("archive", f"{out} ({out.stat().st_size / 1e6:.1f} MB)")
    return out


def _pack(bundle: Path, names: Sequence[str], packed: gzip.GzipFile, date: int) -> None:
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            _add(tar, f"{bundle.name}/{name}", bundle / name, date)


def _add(tar: tarfile.TarFile, name: str, path: Path, date: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = path.stat().st_size, 0o644, date
    if member.size >= MOST_BYTES:
        raise InputError(f"{path} has {member.size:,} bytes; a tar holds less than {MOST_BYTES:,} of each file")
    try:
        with path.open("rb") as file:
            tar.addfile(member, file)
    except ValueError as error:
        raise InputError(f"{name} is too long a name for an archive") from error


def _date() -> int:
    date = provenance.epoch() or 0
    if date >= 1 << 32:
        raise InputError(f"{provenance.EPOCH} is {date}, later than a gzip file can say")
    return date
