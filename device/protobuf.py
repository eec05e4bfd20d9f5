"""The wire format of protocol buffers, walked without a schema: fields in order, never beyond their message."""

from collections.abc import Iterator

MOST_VARINT = 10
"""Bytes of the longest number."""


def fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """Give each field's number and value: a whole number, or bytes; raise ValueError where they are no message."""
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        number, kind = tag >> 3, tag & 7
        if kind == 0:
            value, place = _varint(message, place)
            yield number, value
            continue
        size, place = _varint(message, place) if kind == 2 else ({1: 8, 5: 4}.get(kind, -1), place)
        if number == 0 or size < 0 or size > len(message) - place:
            raise ValueError(f"a field of {size} bytes where {len(message) - place} are left")
        yield number, message[place : place + size]
        place += size


def signed(value: int) -> int:
    """Give a number of 64 bits its sign."""
    return value - (1 << 64) if value >= 1 << 63 else value


def numbers(value: int | memoryview) -> list[int]:
    """Give the whole numbers of a repeated field, packed into bytes or one by one."""
    if isinstance(value, int):
        return [signed(value)]
    found, place = [], 0
    while place < len(value):
        number, place = _varint(value, place)
        found.append(signed(number))
    return found


def _varint(message: memoryview, place: int) -> tuple[int, int]:
    found = 0
    for position in range(MOST_VARINT):
        if place + position >= len(message):
            raise ValueError("a number that is cut off")
        byte = message[place + position]
        found |= (byte & 127) << 7 * position
        if byte < 128:
            return found & ((1 << 64) - 1), place + position + 1
    raise ValueError("a number of more than 64 bits")
