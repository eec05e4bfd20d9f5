"""Whom a process runs for: a uid without a passwd entry, as containers have it, has neither a name nor a home."""

import os
from contextlib import suppress

NO_HOME = "/nonexistent"
"""What passwd says of a user without one."""
NAMES = ("LOGNAME", "USER", "LNAME", "USERNAME")
"""Environment variables that tell a user's name, in Python's order."""


def settle() -> None:
    """Set HOME and LOGNAME where nothing tells them: runtimes ask for both and raise, some already on import.

    And keep ONNX Runtime's telemetry off, which writes into the home folder, and warns where it cannot.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    if not hasattr(os, "getuid"):
        return
    entry = _entry(os.getuid())
    if entry is None and not any(os.environ.get(name) for name in NAMES):
        os.environ["LOGNAME"] = f"uid-{os.getuid()}"
    if not os.environ.get("HOME"):  # set to nothing, it would stand for the current folder
        os.environ["HOME"] = entry or NO_HOME


def _entry(uid: int) -> str | None:
    """Give the home that passwd tells of a uid; None without an entry."""
    import pwd  # noqa: PLC0415 - POSIX only

    with suppress(KeyError):
        return pwd.getpwuid(uid).pw_dir or NO_HOME
    return None
