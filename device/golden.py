"""The golden files of a bundle: does this machine answer for them as it was verified?"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitferry.device import pixels
from bitferry.device.arrays import Outputs, Predict
from bitferry.device.errors import InputError
from bitferry.device.preprocess import Preprocessing


@dataclass(frozen=True)
class Expected:
    """What must be answered for some image files, one for each view."""

    views: tuple[str, ...]
    scores: Outputs


def compare(
    bundle: Path, manifest: Mapping[str, Any], contract: Preprocessing, predict: Predict
) -> tuple[float, dict[str, float]]:
    """Answer for each golden file; give the limit, and each file's largest difference as a share of the largest score.

    The bytes take the same way as any image's: decoded, resized, answered.
    """
    limit, expected = _read(bundle / "golden/expected.json")
    strange = [view for one in expected for view in one.views if f"golden/{view}" not in manifest["files"]]
    if strange:
        raise InputError(f"{bundle}/golden/expected.json names {strange[0]!r}, which is not a file of the bundle")
    if any(len(one.views) != contract.views for one in expected):
        raise InputError(f"{bundle}/golden/expected.json does not name {contract.views} files for each answer")
    differences = {}
    for one in expected:
        images = contract.read([bundle / "golden" / view for view in one.views])
        found, wanted = pixels.thin(predict(images[None]))[0], one.scores
        same = found.shape == wanted.shape
        differences[one.views[0]] = (
            float(np.abs(found - wanted).max()) / max(1e-6, float(np.abs(wanted).max())) if same else math.inf
        )
    return limit, differences


def finite(differences: Mapping[str, float]) -> dict[str, float | None]:
    """Give None, which JSON can hold, for scores that are not finite or are another number of them."""
    return {name: value if math.isfinite(value) else None for name, value in differences.items()}


def show(limit: float, differences: Mapping[str, float], milliseconds: float, *, rebuilt: bool, as_json: bool) -> int:
    """Print how far each file's answer is from the expected one, and how long one takes; give the exit code."""
    passed = all(difference <= limit for difference in differences.values())
    if as_json:
        found = {"passed": passed, "score_limit": limit, "differences": finite(differences)}
        print(json.dumps(found | {"milliseconds": round(milliseconds, 3), "rebuilt": rebuilt}))
        return 0 if passed else 1
    for name, difference in differences.items():
        print(f"{name}\t{difference:.2g} of the largest score, {limit:.2g} allowed")
    print(f"{milliseconds:.3f} ms, the median of a few calls")
    print("every golden file is answered as it was verified" if passed else "this machine answers otherwise")
    return 0 if passed else 1


def _read(path: Path) -> tuple[float, list[Expected]]:
    try:
        expected = json.loads(path.read_bytes())
        found = [
            Expected(tuple(map(str, file.get("views", [name]))), np.array(file["scores"], np.float32))
            for name, file in expected["files"].items()
        ]
        limit = float(expected["score_limit"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} cannot be used ({error!r}); copy the bundle again") from error
    if not found:
        raise InputError(f"{path} names no file to answer for; copy the bundle again")
    return limit, found
