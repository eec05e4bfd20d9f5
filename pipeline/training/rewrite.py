"""Write settings into a recipe's text, leaving every other character of it as it is, comments included."""

import json
import re
import tomllib
from collections.abc import Mapping

from bitferry.device.errors import InputError
from bitferry.pipeline.training.space import Value

HEADER = re.compile(r"^\s*\[training\]\s*(#.*)?$")
ANY_HEADER = re.compile(r"^\s*\[")


def write(text: str, settings: Mapping[str, Value]) -> str:
    """Set keys of the [training] table; raise InputError where the text is written in a way that this cannot edit."""
    lines = text.splitlines()
    start = next((number for number, line in enumerate(lines) if HEADER.match(line)), None)
    if start is None:
        lines += ["", "[training]"]
        start = len(lines) - 1
    end = next((n for n in range(start + 1, len(lines)) if ANY_HEADER.match(lines[n])), len(lines))
    table = lines[start + 1 : end]
    for key, value in settings.items():
        _set(table, key, json.dumps(value))  # numbers, texts and true are the same in TOML
    edited = "\n".join([*lines[: start + 1], *table, *lines[end:]]) + "\n"
    _check(text, edited, settings)
    return edited


def _set(table: list[str], key: str, value: str) -> None:
    """Replace the value of a key where it stands, keeping the comment behind it; or add it below the last one."""
    pattern = re.compile(rf"""^(\s*{key}\s*=\s*)("[^"]*"|'[^']*'|[^#]*?)(\s*(?:#.*)?)$""")
    for number, line in enumerate(table):
        found = pattern.match(line)
        if found:
            table[number] = found[1] + value + found[3]
            return
    last = max((n for n, line in enumerate(table) if line.strip()), default=-1)
    table.insert(last + 1, f"{key} = {value}")


def _check(before: str, after: str, settings: Mapping[str, Value]) -> None:
    """Prove that the text means what it did, but for the settings."""
    wanted = tomllib.loads(before)
    wanted["training"] = {**wanted.get("training", {}), **settings}
    try:
        same = tomllib.loads(after) == wanted
    except tomllib.TOMLDecodeError:
        same = False
    if not same:
        told = ", ".join(f"{key} = {json.dumps(value)}" for key, value in settings.items())
        raise InputError(f"the recipe's [training] is not written line by line, so edit it yourself: {told}")
