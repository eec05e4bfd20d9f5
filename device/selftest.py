"""A bundle tried on this device, in a process of its own: does it answer for its golden files as it was verified?"""

import contextlib
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitferry.device import strict
from bitferry.device.errors import InputError, StageFailed

MINUTES = 10
"""Of a self-test, which is then taken for one that hangs."""


class AnswersOtherwise(StageFailed):
    """The self-test ran to its end, and the bundle does not answer as it was verified."""


def selftest(folder: Path) -> Mapping[str, Any]:
    """Let a bundle answer for its golden files with its own runner.

    Raises AnswersOtherwise where it does not as verified, StageFailed where no answer came, which may be of the moment.
    """
    command = [sys.executable, "-P", str(folder / "run.pyz"), "selftest", "--json"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=60 * MINUTES,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise StageFailed(f"the self-test of {folder.name} did not end within {MINUTES} minutes") from error
    except OSError as error:  # no memory for another process
        raise StageFailed(f"the self-test of {folder.name} cannot be started: {error.strerror or error}") from error
    lines = done.stdout.strip().splitlines()
    if done.returncode in (0, 1) and lines:
        found = _read(lines[-1], folder)
        if done.returncode == 0 and found.get("passed") is True:
            return found
        if found.get("passed") is False:
            raise AnswersOtherwise(f"the self-test of {folder.name} failed: {_otherwise(found)}")
    told = (done.stderr.strip().splitlines() or [_ended(done.returncode)])[-1]
    raise StageFailed(f"the self-test of {folder.name} failed: {told.removeprefix('error: ')}")


def _read(line: str, folder: Path) -> Mapping[str, Any]:
    try:
        return strict.read(line.encode(), f"the self-test's answer of {folder.name}")
    except InputError as error:
        raise StageFailed(str(error)) from error


def _otherwise(found: Mapping[str, Any]) -> str:
    """Say how far the answers are from those verified."""
    limit, differences = found.get("score_limit"), found.get("differences")
    known = [one for one in (differences.values() if isinstance(differences, dict) else ()) if type(one) is float]
    far = f"its scores differ by up to {max(known):.2g} of the largest" if known else "its scores are no numbers"
    return f"this machine answers otherwise: {far}, {limit} allowed"


def _ended(code: int) -> str:
    """Say how a process ended that told nothing."""
    if code >= 0:
        return f"it ended with {code}"
    with contextlib.suppress(ValueError):
        return f"it was ended by {signal.Signals(-code).name}, as for want of memory"
    return f"it was ended by signal {-code}"
