"""Bounds and intervals, each with its source; plain functions on numbers."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from device.arrays import Outputs


def tango_interval(lost: int, gained: int, images: int, confidence: float) -> tuple[float, float]:
    """Bound the paired difference lost/n − gained/n from both sides, each side at `confidence`.

    Tango's score interval (Statistics in Medicine 17, 1998): the differences whose score statistic stays within
    the normal quantile. Returns fractions between −1 and 1.
    """
    z = NormalDist().inv_cdf(confidence)
    estimate = (lost - gained) / images
    upper = _solve(lambda d: tango_statistic(lost, gained, images, d) + z, estimate, 1.0)
    lower = _solve(lambda d: tango_statistic(lost, gained, images, d) - z, -1.0, estimate)
    return lower, upper


def tango_statistic(lost: int, gained: int, images: int, difference: float) -> float:
    """Give Tango's score statistic of the hypothesis p(lost) − p(gained) = `difference`; falls as that grows.

    The variance uses the maximum-likelihood p(gained) under the hypothesis, the root of a quadratic.
    """
    a = 2 * images
    b = -lost - gained + (2 * images - lost + gained) * difference
    c = -gained * difference * (1 - difference)
    p_gained = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)
    variance = images * (2 * p_gained + difference * (1 - difference))
    excess = lost - gained - images * difference
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def _solve(falling: Callable[[float], float], low: float, high: float) -> float:
    """Find where a falling function crosses zero, by bisection to 1e-12."""
    if falling(high) > 0:
        return high
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def sqnr_db(reference: Outputs, found: Outputs) -> float:
    """Give the signal-to-quantization-noise ratio in decibels: 10·log10(Σ reference² / Σ (reference − found)²)."""
    noise = float(np.sum((reference.astype(np.float64) - found) ** 2))
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def ratio_interval(
    numerator: NDArray[np.float64],
    denominator: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    draws: int = 2000,
) -> tuple[float, float]:
    """Bound the ratio of medians of two interleaved series, blocks × calls each, by a bootstrap over blocks.

    Blocks are drawn, not calls, because calls next to each other share the machine's state (Kalibera & Jones 2013).
    """
    rng = np.random.default_rng(0)
    picked = rng.integers(len(numerator), size=(draws, len(numerator)))
    above = np.median(numerator[picked].reshape(draws, -1), axis=1)
    below = np.median(denominator[picked].reshape(draws, -1), axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(above / below, [tail, 1 - tail])
    return float(low), float(high)
