"""What is wrong with a recipe: pydantic's faults in words."""

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from bitferry.pipeline.data.source import written


def _place(loc: tuple[str | int, ...]) -> tuple[str | int, ...]:
    """Give where a fault is, without what pydantic adds to tell the types of a choice."""
    return tuple(part for part in loc if not str(part).startswith(("literal[", "constrained-", "function-")))


def joined(details: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Give the faults, those of a choice between fixed words as one that lists all of them."""
    words: dict[tuple[str | int, ...], list[str]] = {}
    others = {_place(detail["loc"]) for detail in details if detail["type"] != "literal_error"}
    for detail in details:
        if detail["type"] == "literal_error":
            words.setdefault(_place(detail["loc"]), []).append(str(detail["ctx"]["expected"]).replace(" or ", ", "))
    for detail in details:
        place = _place(detail["loc"])
        listed = place in words and place not in others
        yield dict(detail) | {"loc": place} | ({"msg": f"expected one of {', '.join(words[place])}"} if listed else {})


def told(detail: Mapping[str, Any], loc: Sequence[str | int], known: Sequence[str]) -> str:
    """Say one fault of pydantic's, found at `loc`, where the keys `known` may stand."""
    where = ".".join(written(loc) if loc[:1] == ("data",) else map(str, loc))
    if not where:
        return str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        close = get_close_matches(str(loc[-1]), known, n=1, cutoff=0.5)
        hint = f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(known)}"
        return f"unknown key '{where}', {hint}"
    if detail["type"] in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"the key '{where}' is missing"
    return f"{where}: {detail['msg'].removeprefix('Value error, ')} (found {detail['input']!r})"
