"""Archive → the bundle that a device runs: checked, unpacked beside, tried, and switched to at once.

Every state that a loss of power can leave is one in which ROOT/current points to a whole bundle, the old or the new;
what else lies around is cleared by the next command.
"""

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from bitferry.device import archive, atomic, fit, installed, signature, strict, trust, versions, whole
from bitferry.device.errors import BitferryError, InputError, StageFailed, TargetUnavailable, first_line
from bitferry.device.installed import CURRENT, NOTE, VERSIONS, Installed, current, tell
from bitferry.device.selftest import AnswersOtherwise, selftest
from bitferry.device.signature import Key

INCOMING = ".incoming"
OURS = re.compile(r".+-[0-9a-f]{12}(-again)?(\.json)?|\..+\.json\.part")
"""Names in ROOT/versions."""
SPARE_BYTES = 1 << 20
"""Left free on the disk, for what is written beside the bundle."""


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time change a root; others wait."""
    try:
        import fcntl  # noqa: PLC0415 - POSIX only
    except ImportError:
        raise TargetUnavailable("installing needs a POSIX system: symbolic links that are replaced at once") from None
    if not root.is_dir():
        raise InputError(f"{root} is no folder; pin a key in it first: `bitferry trust KEY.pub --root {root}`")
    with (root / trust.LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def install(
    path: Path, root: Path, *, allow_downgrade: bool = False, allow_rejected: bool = True
) -> tuple[Installed, bool]:
    """Install an archive under a root; give what runs then, and whether that is new.

    Without `allow_rejected` what failed its self-test here before, or was rolled back from, is refused.

    Signed by a trusted key, fitting this machine and newer than what runs: all that is asked before anything is
    unpacked. The bytes are compared with the signature as they are written, and the self-test runs on that very copy.
    Raises InputError, TargetUnavailable or StageFailed with what runs left as it was.
    """
    with locked(root):
        here = current(root)
        _clear(root)
        try:
            keys = trust.read(root).keys
            with archive.opened(path) as (head, reader):
                signed = signature.verify(head.signature, keys, f"{signature.FILE} of {path}")
                listed = _listed(head, signed, path)
                fit.check(head.manifest, str(path))
                same = here is not None and here.digest == head.digest
                if here and same and _whole(root, here):
                    tell(root, "installed already")
                    return here, False
                if not allow_rejected:
                    installed.refuse_rejected(root, head.digest, path)
                _admit(None if same else here, head, path, allow_downgrade=allow_downgrade)
                made = _unpack(reader, head, listed, signed.digests, root)
                key = next(key for key in keys if key.name == signed.key)
            found = _switch(root, made, here, _note(root, head, here, key, same=same))
        except (BitferryError, OSError) as error:
            with contextlib.suppress(OSError):
                _clear(root)
            tell(root, f"refused {path.name}: {first_line(error)}")
            raise
        tell(root, "installed", found[1])
        return found[0], True


def rollback(root: Path) -> Installed:
    """Go back to the bundle that ran before."""
    with locked(root):
        here = current(root)
        if here is None:
            raise InputError(f"nothing is installed in {root}")
        before = _back(root, here, "asked for")
        installed.reject(root, here.digest, "it was rolled back from")
        return before


def prove(root: Path) -> tuple[Installed, Mapping[str, Any]]:
    """Check what runs, signature and all, and try it; go back to what ran before where it fails, and say so."""
    with locked(root):
        here = current(root)
        if here is None:
            raise InputError(f"nothing is installed in {root}")
        intact = False
        try:
            signature.check(here.folder, installed.keys(root, here))
            intact = True
            found = selftest(here.folder)
        except BitferryError as error:
            fault = error
        else:
            tell(root, "proved", found)
            return here, found
        try:
            before = _back(root, here, first_line(fault))
        except InputError as error:
            tell(root, f"failed: {first_line(fault)}", {"passed": False})
            raise StageFailed(f"{here.title} failed, and {error}: {fault}") from fault
        if intact:  # a damaged copy says nothing of the bundle, and the next update mends it
            _note_failure(root, here.digest, fault)
    raise StageFailed(f"{here.title} failed, so {before.title} runs again: {fault}") from fault


def _note_failure(root: Path, digest: str | None, fault: BitferryError) -> str:
    """Reject a bundle that answers otherwise; count a try that gave no answer. Say which try that was."""
    if isinstance(fault, AnswersOtherwise):
        installed.reject(root, digest, first_line(fault))
        return ""
    return installed.count_failure(root, digest, first_line(fault))


def _back(root: Path, here: Installed, why: str) -> Installed:
    before = installed.before(root, here)
    if before is None:
        raise InputError(f"{root} has nothing to go back to")
    signature.check(before.folder, installed.keys(root, before))
    atomic.point(root / CURRENT, f"{VERSIONS}/{before.folder.name}")
    tell(root, f"rolled back from {here.version}: {why}", {})
    return before


def _listed(head: archive.Head, signed: signature.Signed, path: Path) -> dict[str, int]:
    """Give the size of each further file; raise InputError where the manifest is not the signed one."""
    manifest = head.manifest
    if signed.digests.get(archive.MANIFEST) != head.digest:
        raise InputError(f"{path} holds a manifest that was not signed with it; fetch or copy it again")
    wanted = {"files": dict, "tied": dict, "name": str, "version": str, "target": str}
    if missing := [name for name, kind in wanted.items() if not isinstance(manifest.get(name), kind)]:
        raise InputError(f"the manifest of {path} has no usable {', '.join(missing)}; bundle it again")
    versions.order(manifest["version"])  # later ones are compared with it
    files: Mapping[str, Any] = manifest["files"]
    strict.names(files, f"the manifest of {path}")
    digests = {name: one.get("sha256") for name, one in files.items() if isinstance(one, dict)}
    sizes = {name: one.get("size_bytes") for name, one in files.items() if isinstance(one, dict)}
    if digests | {archive.MANIFEST: head.digest} != signed.digests:
        raise InputError(f"{path} was signed with other files than its manifest lists; bundle and sign it again")
    if any(type(size) is not int or size < 0 for size in sizes.values()):
        raise InputError(f"the manifest of {path} lists a file without its size; bundle it again")
    return cast(dict[str, int], sizes)


def _whole(root: Path, here: Installed) -> bool:
    """Say whether what runs is as it was signed, so that installing it again would change nothing."""
    try:
        signature.check(here.folder, installed.keys(root, here))
    except InputError:
        return False
    return True


def _admit(here: Installed | None, head: archive.Head, path: Path, *, allow_downgrade: bool) -> None:
    """Raise InputError for another model, and for what is no newer than what runs."""
    if here is None:
        return
    new = head.manifest
    if here.name and new["name"] != here.name:
        raise InputError(f"{path} is '{new['name']}', and this root runs '{here.name}'; give each model its own root")
    if allow_downgrade or not here.version or versions.order(new["version"]) > versions.order(here.version):
        return
    if new["version"] == here.version:
        raise InputError(
            f"{path} is another build of version {new['version']}, which runs; raise the version in its recipe, or "
            "pass --allow-downgrade"
        )
    raise InputError(
        f"{path} is version {new['version']}, which is not newer than {here.version}, which runs; pass "
        "--allow-downgrade to take it"
    )


def _unpack(
    reader: archive.Reader, head: archive.Head, sizes: Mapping[str, int], digests: Mapping[str, str], root: Path
) -> Path:
    """Write every file into ROOT/.incoming, each compared with its signed digest; give the folder that they end in."""
    needed, free = sum(sizes.values()) + len(head.content) + len(head.signature), shutil.disk_usage(root).free
    if needed + SPARE_BYTES > free:
        raise InputError(f"{root} has {free / 1e6:.1f} MB free, and {needed / 1e6:.1f} MB are needed")
    incoming = root / INCOMING
    incoming.mkdir()
    found = {archive.MANIFEST: head.digest}
    for name, content in {archive.MANIFEST: head.content, signature.FILE: head.signature}.items():
        atomic.pour(incoming / name, [content])
    for member in reader:
        if member.name in found or member.size != sizes.get(member.name):
            raise InputError(f"{reader.path} holds {member.name} twice, unlisted or of another size; copy it again")
        place, hashing = incoming / member.name, hashlib.sha256()
        place.parent.mkdir(parents=True, exist_ok=True)
        atomic.pour(place, _hashed(reader.parts(), hashing))
        found[member.name] = hashing.hexdigest()
    whole.compare(found, digests, f"{reader.path} {signature.UNLIKE}", signature.REMEDY)
    for folder in (*(path for path in incoming.rglob("*") if path.is_dir()), incoming):
        atomic.settle(folder)
    manifest = head.manifest
    name = f"{manifest['name']}-{manifest['target']}-{manifest['version']}-{head.digest[:12]}"
    if not strict.plain(name) or "/" in name:
        raise InputError(f"{reader.path} names itself {name!r:.120}, which no folder can be called")
    return incoming.with_name(name)


def _hashed(parts: Iterator[bytes], hashing: Any) -> Iterator[bytes]:
    for part in parts:
        hashing.update(part)
        yield part


def _note(root: Path, head: archive.Head, here: Installed | None, key: Key, *, same: bool) -> dict[str, Any]:
    """Give what is noted of a new version; where it replaces a damaged copy of itself, what ran before that."""
    before = installed.before(root, here) if here and same else here
    return {
        **{name: head.manifest[name] for name in ("name", "version", "target")},
        "digest": head.digest,
        "before": before.folder.name if before else None,
        "key": signature.pem(key.public),
    }


def _switch(
    root: Path, made: Path, here: Installed | None, note: dict[str, Any]
) -> tuple[Installed, Mapping[str, Any]]:
    """Give the unpacked folder its place, try it there, and let `current` point to it."""
    final = root / VERSIONS / made.name
    final.parent.mkdir(exist_ok=True)
    if here and final == here.folder:
        final = final.with_name(final.name + "-again")  # what runs was damaged
    if final.exists():
        atomic.remove(final)  # of an install that was interrupted
    (root / INCOMING).rename(final)
    atomic.protect(final)
    atomic.write(final.with_name(final.name + NOTE), json.dumps(note).encode())
    atomic.settle(final.parent)
    try:
        found = selftest(final)
    except StageFailed as error:
        tried = _note_failure(root, note["digest"], error)
        raise StageFailed(f"{error}{tried}") from error
    atomic.point(root / CURRENT, f"{VERSIONS}/{final.name}")
    installed.readmit(root, note["digest"])
    with contextlib.suppress(OSError):
        _clear(root)
    return installed.read(final), found


def _clear(root: Path) -> None:
    """Remove what an interrupted command left, and every version but what runs and what ran before it.

    Only names that are given here are removed; one that cannot be is left.
    """
    incoming, here = root / INCOMING, current(root)
    if incoming.exists() or incoming.is_symlink():
        atomic.remove(incoming)
    if here and not here.folder.is_dir():
        return  # what was meant to run is gone; nothing that may take its place goes, too
    kept = {here.folder.name, str(installed.note(here.folder).get("before"))} if here else set()
    for path in (root / VERSIONS).glob("*"):
        if OURS.fullmatch(path.name) and path.name.removesuffix(NOTE) not in kept:
            with contextlib.suppress(OSError):
                atomic.remove(path)
