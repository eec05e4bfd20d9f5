"""Images that are in two splits, or too often in one: the same by their pixels."""

from bitferry.device.errors import InputError
from bitferry.pipeline.data.split import Split

MOST_COPIES = 0.01
"""Share of a split's images that may be copies of others in it; each counts as evidence, and a copy is none."""


def refuse(*splits: Split) -> None:
    """Raise InputError when one image, by its pixels, is in two splits, or too often in one.

    Of several views all must be the same: a reference image may rightly be one view of many.
    """
    seen: dict[bytes, tuple[Split, str]] = {}
    for part in splits:
        copies = len(part) - len(set(part.digests))
        if copies > MOST_COPIES * len(part):
            raise InputError(
                f"{copies} of the {len(part)} {part.name} images are copies of others among them; remove them"
            )
        leaks = []
        for digest, source in zip(part.digests, part.sources, strict=True):
            first, other = seen.setdefault(digest, (part, source))
            if first is not part:
                leaks.append((source, first.name, other))
        if leaks:
            source, other_name, other = leaks[0]
            raise InputError(
                f"{len(leaks)} {part.name} images are also in the {other_name} data, "
                f"for example {source} = {other}; take them out of one of the two"
            )
