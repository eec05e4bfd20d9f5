"""Take the newest bundle from a publisher's TUF repository; what is forged, old, mixed or broken is refused."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from tuf.api import exceptions
from tuf.api.metadata import Metadata, Root, TargetFile, Targets
from tuf.ngclient import FetcherInterface, Updater

from bitferry.device import atomic, download, versions
from bitferry.device.errors import InputError, first_line

try:
    import fcntl
except ImportError:  # Windows: two updates at once are the user's to avoid
    fcntl = None  # type: ignore[assignment]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*\.tar\.gz")
"""Of an archive; nothing that leads out of a folder."""
KEPT = "nothing was taken over"


@dataclass(frozen=True)
class Offer:
    """A bundle that a repository offers."""

    name: str
    target: str
    version: str
    archive: str
    size: int


def newest(
    url: str, root: Path, *, name: str | None = None, target: str | None = None, trusted_root: Path | None = None
) -> Offer:
    """Say what `fetch` would bring, without bringing it."""
    with _opened(url, root, trusted_root):
        return _choose(_offers(root), url, name, target)


def fetch(
    url: str, root: Path, *, name: str | None = None, target: str | None = None, trusted_root: Path | None = None
) -> Path:
    """Bring the newest archive of `name` into ROOT/download, verified; what is there already is not brought again.

    `trusted_root` is the publisher's root.json, come by a way you trust; the first time, ROOT/tuf/root.json keeps it.
    """
    with _opened(url, root, trusted_root) as (updater, fetcher):
        offers = _offers(root)
        chosen = _choose(offers, url, name, target)
        info = updater.get_targetinfo(chosen.archive)
        if info is None:
            raise InputError(f"{url} no longer offers {chosen.archive}; try again")
        folder = root / "download"
        folder.mkdir(parents=True, exist_ok=True)
        final = folder / chosen.archive
        if not updater.find_cached_target(info, str(final)):
            _download(updater, fetcher, info, final)
        _prune(folder, chosen, offers)
        return final


class _Fetcher(FetcherInterface):
    """Downloads for python-tuf; while `part` is set, into that file, which is kept when the connection breaks."""

    part: Path | None = None

    def _fetch(self, url: str) -> Iterator[bytes]:
        with self.download_file(url, 1 << 62) as file:
            yield from iter(lambda: file.read(download.CHUNK), b"")

    @contextmanager
    def download_file(self, url: str, max_length: int) -> Iterator[IO[bytes]]:
        try:
            with self.part.open("a+b") if self.part else tempfile.TemporaryFile() as file:
                download.fill(file, url, max_length, whole=self.part is not None)
                file.seek(0)
                yield file
        except download.Refused as error:
            raise exceptions.DownloadHTTPError(str(error), error.status) from error
        except download.TooLong as error:
            raise exceptions.DownloadLengthMismatchError(str(error)) from error
        except download.Broken as error:
            raise exceptions.DownloadError(str(error)) from error


@contextmanager
def _opened(url: str, root: Path, trusted_root: Path | None) -> Iterator[tuple[Updater, _Fetcher]]:
    """Bring the repository's metadata up to date and verified; one update of a root at a time."""
    if not re.match("https?://", url):
        raise InputError(f"{url} is no address of a repository; it begins with https:// or http://")
    base = url.rstrip("/")
    with _explained(url, root), _locked(root):
        anchor = _anchor(root, trusted_root)
        metadata = root / "tuf/metadata"
        metadata.mkdir(parents=True, exist_ok=True)
        fetcher = _Fetcher()
        updater = Updater(str(metadata), f"{base}/metadata", None, f"{base}/targets", fetcher=fetcher, bootstrap=anchor)
        updater.refresh()
        yield updater, fetcher


def _anchor(root: Path, trusted_root: Path | None) -> bytes:
    """Give the root that this device was told to trust; it is never taken from the network."""
    pinned = root / "tuf/root.json"
    if trusted_root is None and not pinned.exists():
        raise InputError(
            f"{root} trusts no publisher yet; "
            "copy the repository's metadata/root.json here by a way you trust, and name it once by --trusted-root"
        )
    if trusted_root is None:
        return _root(pinned)
    given = _root(trusted_root)
    if not pinned.exists():
        atomic.write(pinned, given)
    followed = [path.read_bytes() for path in (root / "tuf/metadata/root_history").glob("*.root.json")]
    if given not in (_root(pinned), *followed):
        raise InputError(
            f"{root} trusts another publisher than {trusted_root} already; "
            f"remove {root / 'tuf'} if this device is to trust that one from now on"
        )
    return _root(pinned)


def _root(path: Path) -> bytes:
    """Read a root.json that is signed by its own keys."""
    content = path.read_bytes()
    try:
        metadata = Metadata[Root].from_bytes(content)
        if isinstance(metadata.signed, Root):
            metadata.signed.verify_delegate("root", metadata.signed_bytes, metadata.signatures)
            return content
    except exceptions.RepositoryError as error:
        raise InputError(f"{path} is no root.json of a repository: {first_line(error)}; copy it again") from error
    raise InputError(f"{path} is a {metadata.signed.type}.json; copy the repository's root.json")


def _offers(root: Path) -> list[Offer]:
    """List what the metadata, just verified, offers and this device can use."""
    targets = Metadata[Targets].from_file(str(root / "tuf/metadata/targets.json")).signed.targets
    return [offer for path, entry in targets.items() if (offer := _offer(path, entry))]


def _offer(path: str, entry: TargetFile) -> Offer | None:
    custom = entry.custom if isinstance(entry.custom, dict) else {}
    fields = custom.get("bitferry")
    if not isinstance(fields, dict) or not NAME.fullmatch(path) or "sha256" not in entry.hashes:
        return None
    name, target, version = (fields.get(key) for key in ("name", "target", "version"))
    if not isinstance(name, str) or not isinstance(target, str) or not isinstance(version, str):
        return None
    return Offer(name, target, version, path, entry.length) if versions.VERSION.fullmatch(version) else None


def _choose(offers: list[Offer], url: str, name: str | None, target: str | None) -> Offer:
    if not offers:
        raise InputError(f"{url} offers no bundles; publish one there first")
    names = sorted({offer.name for offer in offers})
    if name is None and len(names) > 1:
        raise InputError(f"{url} offers {', '.join(names)}; name the one for this device")
    named = [offer for offer in offers if name in {None, offer.name}]
    if not named:
        raise InputError(f"{url} offers no {name}; it offers {', '.join(names)}")
    targets = sorted({offer.target for offer in named})
    if target is None and len(targets) > 1:
        raise InputError(f"{url} offers {named[0].name} for {', '.join(targets)}; name the target of this device")
    fitting = [offer for offer in named if target in {None, offer.target}]
    if not fitting:
        raise InputError(f"{url} offers {named[0].name} not for {target}, but for {', '.join(targets)}")
    return max(fitting, key=lambda offer: (versions.order(offer.version), offer.archive))


def _download(updater: Updater, fetcher: _Fetcher, info: TargetFile, final: Path) -> None:
    """Download into SHA256.part, verify, name it; what grew from a wrong beginning is brought anew once."""
    part = final.with_name(f"{info.hashes['sha256']}.part")
    verified = final.with_name(f".{final.name}.part")
    begun = part.exists()
    fetcher.part = part
    try:
        updater.download_target(info, str(verified))
    except (exceptions.LengthOrHashMismatchError, exceptions.DownloadLengthMismatchError):
        part.unlink(missing_ok=True)
        if not begun:
            raise
        _download(updater, fetcher, info, final)
        return
    with verified.open("rb+") as stream:
        os.fsync(stream.fileno())
    verified.replace(final)
    atomic.settle(final.parent)
    part.unlink()


def _prune(folder: Path, chosen: Offer, offers: list[Offer]) -> None:
    """Remove what earlier updates left: all but this archive and those of other bundles that are offered."""
    others = {offer.archive for offer in offers if (offer.name, offer.target) != (chosen.name, chosen.target)}
    for path in folder.iterdir():
        if path.name not in {chosen.archive, *others} and path.suffix in {".gz", ".part"}:
            path.unlink()


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    (root / "tuf").mkdir(parents=True, exist_ok=True)
    with (root / "tuf/lock").open("w") as stream:
        if fcntl is not None:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(f"{root} is being updated by another process; try again when it has ended") from None
        yield


@contextmanager
def _explained(url: str, root: Path) -> Iterator[None]:
    """Turn what python-tuf raises into one line that says whose turn it is."""
    now = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
    try:
        yield
    except exceptions.ExpiredMetadataError as error:
        raise InputError(
            f"{url} has expired ({first_line(error)}) by this device's clock, {now}; "
            "check the clock, and if it is right, have the publisher refresh the repository"
        ) from error
    except exceptions.UnsignedMetadataError as error:
        raise InputError(f"{url} is not signed by the keys that {root} trusts ({first_line(error)}); {KEPT}") from error
    except exceptions.BadVersionNumberError as error:
        raise InputError(f"{url} offers older metadata than there was before ({first_line(error)}); {KEPT}") from error
    except (exceptions.LengthOrHashMismatchError, exceptions.DownloadLengthMismatchError) as error:
        raise InputError(f"{url} sends other bytes than were signed ({first_line(error)}); {KEPT}") from error
    except exceptions.RepositoryError as error:
        raise InputError(f"{url} is no usable repository ({first_line(error)}); {KEPT}") from error
    except exceptions.DownloadError as error:
        raise InputError(f"{first_line(error)}; {KEPT}; try again") from error
    except OSError as error:
        raise InputError(f"{error.filename or root} cannot be read or written: {error.strerror or error}") from error
