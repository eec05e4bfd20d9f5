"""How many right answers lie between two nights, and whether that is more than chance."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bitferry.pipeline.measure import segmentation
from bitferry.pipeline.report.record import Recorded
from bitferry.pipeline.statistics import mcnemar_mid_p, newcombe_interval, tango_interval

ALPHA = 0.005
"""Two-sided, so that 1 in 400 changed cells is said to have lost what it lost by chance. One that did not change
answers alike, loses nothing and is not at risk, however many nights pass."""
SIDE = 1 - ALPHA / 2

Flags = NDArray[np.bool_]
Who = Literal["artifact", "float"]


@dataclass(frozen=True)
class Apart:
    """Two nights' answers, the earlier first."""

    images: int
    """Of the later night that are compared."""
    fewer: int
    """Right answers fewer than before; negative where more are right. Of maps: images with fewer right pixels, net."""
    before: float
    after: float
    """Share of right answers, or mIoU, in percent."""
    drop_pp: float
    lower_pp: float
    upper_pp: float
    """Two-sided 95 %."""
    sure: bool
    """Whether the drop or gain is more than chance at `ALPHA`."""
    how: str
    """What is not plain about the comparison; mostly nothing."""


def apart(before: Recorded, after: Recorded, who: Who, *, same_data: bool) -> Apart | None:
    """Compare the answers of two nights: image by image where they are the same, else share with share.

    The same files that became other pixels are paired by position. None where one of them has no answers.
    """
    if who == "artifact" and (before.answers is None or after.answers is None):
        return None
    ours, theirs, how = _pairs(before, after, same_data=same_data)
    if after.labels.ndim == 3:
        return _maps(before, after, who, (ours, theirs), how) if len(ours) else None
    was, now = (_right(one, who) for one in (before, after))
    enough = 2 * len(ours) >= min(len(was), len(now))
    return paired(was[ours], now[theirs], how) if enough else _unpaired(was, now)


def _right(recorded: Recorded, who: Who) -> Flags:
    found = recorded.right if who == "artifact" else recorded.float_right
    return np.asarray(found).reshape(-1)


def _pairs(before: Recorded, after: Recorded, *, same_data: bool) -> tuple[list[int], list[int], str]:
    """Find the rows of the same image with the same label, or of the same position; none where the data are others."""
    rows = {_identity(after, row): row for row in range(len(after.labels))}
    pairs = [(row, rows[name]) for row in range(len(before.labels)) if (name := _identity(before, row)) in rows]
    if same_data and len(pairs) < len(before.labels) and np.array_equal(before.labels, after.labels):
        every = list(range(len(after.labels)))
        return every, every, "the files are the same and became other pixels, so they are paired by position"
    how = "" if len(pairs) == max(len(before.labels), len(after.labels)) else f"only {len(pairs):,} images are in both"
    return [a for a, _ in pairs], [b for _, b in pairs], how


def _identity(recorded: Recorded, row: int) -> tuple[bytes, bytes]:
    return recorded.digests[row].tobytes(), recorded.labels[row].tobytes()


def paired(was: Flags, now: Flags, how: str = "") -> Apart:
    """Compare which of the same N images are answered rightly: McNemar's test, and Tango's interval."""
    lost, gained, images = int((was & ~now).sum()), int((now & ~was).sum()), len(was)
    lower, upper = tango_interval(lost, gained, images, 0.975)
    sure = mcnemar_mid_p(lost, gained) < ALPHA
    return _apart(images, lost - gained, (float(was.mean()), float(now.mean())), (lower, upper), sure=sure, how=how)


def _unpaired(was: Flags, now: Flags) -> Apart:
    counts, images = (int(was.sum()), int(now.sum())), (len(was), len(now))
    shares = float(was.mean()), float(now.mean())
    low, high = newcombe_interval(counts, images, SIDE)
    bounds = newcombe_interval(counts, images, 0.975)
    fewer = round((shares[0] - shares[1]) * len(now))
    how = "the data changed, so this is not image by image"
    return _apart(len(now), fewer, shares, bounds, sure=low > 0 or high < 0, how=how)


def _apart(
    images: int, fewer: int, shares: tuple[float, float], bounds: tuple[float, float], *, sure: bool, how: str
) -> Apart:
    was, now, lower, upper = (100 * share for share in (*shares, *bounds))
    return Apart(images, fewer, was, now, was - now, lower, upper, sure, how)


def _maps(before: Recorded, after: Recorded, who: Who, pairs: tuple[list[int], list[int]], how: str) -> Apart | None:
    """Compare the mIoU of class maps by the bootstrap."""
    chosen = [one.answers if who == "artifact" else one.float_answers for one in (before, after)]
    if chosen[0] is None or chosen[1] is None:
        return None
    was = segmentation.unpacked(before.labels[pairs[0]], chosen[0][pairs[0]])
    now = segmentation.unpacked(after.labels[pairs[1]], chosen[1][pairs[1]])
    found, wide = (segmentation.change("mIoU", was, now, confidence) for confidence in (0.975, SIDE))
    gain = now.right.sum(axis=1) - was.right.sum(axis=1)
    return Apart(
        images=len(gain),
        fewer=int((gain < 0).sum() - (gain > 0).sum()),
        before=found.float_percent,
        after=found.percent,
        drop_pp=found.drop_pp,
        lower_pp=found.drop_lower_pp,
        upper_pp=found.drop_upper_pp,
        sure=wide.drop_lower_pp > 0 or wide.drop_upper_pp < 0,
        how=how,
    )
