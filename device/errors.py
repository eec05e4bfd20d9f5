"""Everything bitferry raises on purpose; the command lines catch `BitferryError` once and print its text.

BitferryError
├── InputError          what you gave cannot be used: a file, a recipe, an option
├── TargetUnavailable   this machine lacks a package or the hardware
└── StageFailed         a tool failed on a valid input; its own error is `__cause__`
"""

import re

COLOURS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
"""Codes by which tools colour what they print."""


def first_line(error: BaseException) -> str:
    """Give the first line of a foreign error's text, uncoloured, or its kind where it has none."""
    lines = COLOURS.sub("", str(error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class BitferryError(Exception):
    """A failure whose text says what was found, what was expected and what to do."""


class InputError(BitferryError):
    """What the user gave cannot be used."""


class TargetUnavailable(BitferryError):
    """This machine lacks what a target needs."""


class StageFailed(BitferryError):
    """A tool failed; raise it `from` the tool's own error."""
