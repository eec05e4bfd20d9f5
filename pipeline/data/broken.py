"""Images that cannot be decoded: left out and listed where they are few, refused where they are not."""

import json
from collections.abc import Mapping
from pathlib import Path

from bitferry.device.errors import InputError, first_line
from bitferry.pipeline import cache, progress

FILE = "broken.json"


def write(found: Mapping[int, str], folder: Path) -> None:
    """Keep which samples are broken, by their place, and why."""
    (folder / FILE).write_text(json.dumps(found, indent=1, ensure_ascii=False))


def read(folder: Path) -> dict[int, str]:
    """Give which samples were broken, and why."""
    return {int(place): why for place, why in json.loads((folder / FILE).read_text()).items()}


def tell(name: str, total: int, found: Mapping[int, str], folder: Path) -> None:
    """Say how many were left out, and where the list of them is."""
    if found:
        example = next(iter(found.values()))
        told = f"left out {len(found)} of {total} that are broken, for example {example}; all are in {folder / FILE}"
        progress.stage("data", f"{name}: {told}")


def refuse_many(name: str, total: int, found: Mapping[int, str], share: float, root: Path) -> None:
    """Raise InputError when more than the share allows are broken, with a list of them in the build folder."""
    if len(found) <= share * total:
        return
    kept = root / f"broken-{name}.json"
    cache.own(root)
    kept.write_text(json.dumps(list(found.values()), indent=1, ensure_ascii=False))
    are = "is" if len(found) == 1 else "are"
    raise InputError(
        f"{len(found)} of the {total} {name} images {are} broken, more than data.broken_share = {share:g} allows: "
        f"{next(iter(found.values()))}; mend them or take them out. All are in {kept}"
    )


def reason(error: InputError) -> str:
    """Give the one line that is kept of an error."""
    return first_line(error)
