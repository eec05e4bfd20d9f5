"""The program of a device: what it trusts, what it runs, and how it gets the next. No torch, nothing to install."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from bitferry.device import install, installed, trust, whole
from bitferry.device.errors import BitferryError, TargetUnavailable


def do_trust(options: argparse.Namespace) -> int:
    """Pin the first key, or take over a signed list."""
    trust.claim(options.root, options.keys)
    with install.locked(options.root):
        found = trust.take(options.root, options.keys)
    names = ", ".join(key.name[:12] for key in found.keys)
    print(f"{options.root} trusts list {found.version}: {names}")
    return 0


def do_install(options: argparse.Namespace) -> int:
    """Install an archive."""
    return _install(options, allow_downgrade=options.allow_downgrade)


def _install(options: argparse.Namespace, **allowed: bool) -> int:
    found, new = install.install(options.archive, options.root, **allowed)
    print(f"{found.title} runs{'' if new else ' already'}: {found.folder}")
    return 0


def do_update(options: argparse.Namespace) -> int:
    """Fetch the newest archive of a publisher and install it, unless it runs already or was rejected here."""
    try:
        from bitferry.device import update  # noqa: PLC0415 - python-tuf, which nothing else here needs
    except ImportError as error:
        needed = "updating needs python-tuf: `pip install tuf`; `install` takes an archive without it"
        raise TargetUnavailable(needed) from error
    trust.read(options.root)  # what could not be installed is not fetched
    wanted = {"name": options.name, "target": options.target, "trusted_root": options.trusted_root}
    options.archive = update.fetch(options.repository, options.root, **wanted)
    return _install(options, allow_rejected=False)


def do_rollback(options: argparse.Namespace) -> int:
    """Go back to what ran before."""
    found = install.rollback(options.root)
    print(f"{found.title} runs again: {found.folder}")
    return 0


def do_selftest(options: argparse.Namespace) -> int:
    """Check and try what runs; it goes back by itself where that fails."""
    found, told = install.prove(options.root)
    again = told.get("rebuilt", (found.folder / whole.REBUILT).exists())
    own = "; the model runs as it was compiled here, which nobody signed" if again else ""
    line = f"{found.title} is as it was signed, and answers as it was verified{own}"
    print(json.dumps({**told, "rebuilt": again}) if options.json else line)
    return 0


def do_status(options: argparse.Namespace) -> int:
    """Say what runs."""
    found = installed.status(options.root)
    print(json.dumps(found, indent=2) if options.json else "\n".join(f"{k}\t{_text(v)}" for k, v in found.items()))
    return 0


def _text(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_text(one)}" for name, one in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else "none" if value is None else str(value)


COMMANDS: Mapping[str, tuple[Callable[[argparse.Namespace], int], str]] = {
    "trust": (do_trust, "pin the key, KEY.pub, that bundles must be signed with, or take a newer signed list of keys"),
    "install": (do_install, "check, unpack, try and switch to a bundle's archive"),
    "update": (do_update, "fetch the newest archive from a publisher's repository (TUF), and install it"),
    "rollback": (do_rollback, "go back to what ran before"),
    "selftest": (do_selftest, "check and try what runs, and go back to what ran before if it fails"),
    "status": (do_status, "say what runs, what ran before, and what was done last"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    options = _parser().parse_args(arguments)
    try:
        return COMMANDS[options.command][0](options)
    except (BitferryError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what ran runs on, and the next command clears what was begun", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bitferry-device.pyz",
        description="Keep what a device runs: signed, tried, and replaced at once.",
        epilog="example: python bitferry-device.pyz install model.tar.gz --root /opt/model",
    )
    parsers = parser.add_subparsers(dest="command", required=True)
    commands = {name: parsers.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    for command in commands.values():
        command.add_argument("--root", type=Path, required=True, help="the folder that holds what runs")
    commands["trust"].add_argument("keys", type=Path, metavar="KEY.pub|LIST.json")
    commands["install"].add_argument("archive", type=Path, metavar="ARCHIVE")
    commands["install"].add_argument("--allow-downgrade", action="store_true", help="take an older version, too")
    commands["update"].add_argument("--repository", required=True, metavar="URL", help="where it is served")
    commands["update"].add_argument("--name", help="of the model, where the repository has several")
    commands["update"].add_argument("--target", help="of the bundle, where the model has several")
    once = "the publisher's root.json, come by a way you trust; needed once"
    commands["update"].add_argument("--trusted-root", type=Path, metavar="FILE", help=once)
    for name in ("selftest", "status"):
        commands[name].add_argument("--json", action="store_true", help="print JSON")
    return parser
