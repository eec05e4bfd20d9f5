"""Versions: which comes after which, and which are inside given bounds."""

import re

from bitferry.device.errors import InputError

VERSION = re.compile(
    r"(?=.{1,100}\Z)(?P<numbers>[0-9]+(\.[0-9]+)*)(?P<before>[A-Za-z0-9._-]*)(\+(?P<build>[A-Za-z0-9._+-]*))?"
)
Order = tuple[tuple[int, ...], bool, tuple[tuple[bool, int, str], ...], tuple[tuple[bool, int, str], ...]]
CLAUSE = re.compile(r"(>=|<=|==|<|>)\s*([0-9][0-9.]*)")


def order(version: str) -> Order:
    """Give what versions compare by: 1.10.0 comes after 1.9.0, 1.9.0 after 1.9.0-rc1, and 1.9 is 1.9.0."""
    found = VERSION.fullmatch(version)
    if found is None:
        raise InputError(f"{version[:100]!r} is no version; it has the form 1.2.3, 1.2.3-rc1 or 1.2.3+build")
    numbers = [int(number) for number in found["numbers"].split(".")]
    while numbers and not numbers[-1]:
        numbers.pop()
    return tuple(numbers), not found["before"], _parts(found["before"]), _parts(found["build"] or "")


def within(found: str, ranges: str) -> bool:
    """Say whether a version is inside comma-separated bounds, as ">=2026.4,<2027"."""
    here = _numbers(found)
    for clause in ranges.split(","):
        match = CLAUSE.fullmatch(clause.strip())
        if not match:
            raise ValueError(f"{clause!r} is no bound of a version")
        sign, wanted = match[1], _numbers(match[2])
        length = max(len(here), len(wanted))
        a, b = (one + (0,) * (length - len(one)) for one in (here, wanted))
        if not {">=": a >= b, "<=": a <= b, "==": a == b, "<": a < b, ">": a > b}[sign]:
            return False
    return True


def _numbers(text: str) -> tuple[int, ...]:
    """Give the release of a version: 2.14.0 of 2.14.0+cpu or 2.14.0rc1."""
    match = re.match(r"[0-9]+(\.[0-9]+)*", text)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def _parts(text: str) -> tuple[tuple[bool, int, str], ...]:
    """Split letters from numbers, as rc and 1 of rc1; numbers come before letters."""
    return tuple((not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in re.findall("[0-9]+|[A-Za-z]+", text))
