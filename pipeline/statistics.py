"""Bounds and intervals, each with its source; plain functions on numbers."""

import math
from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from bitferry.device.arrays import Outputs
from bitferry.device.errors import InputError

Indices = NDArray[np.int64]
"""Positions of images; one may come several times."""

LEAST_DRAWS, MOST_DRAWS = 1000, 200_000
"""Resamples of a bootstrap."""
BEYOND = 10
"""Resamples that must lie beyond a bound: the quantile of fewer is little more than the extreme one."""
RELOAD = 0.01
"""What a ratio may change by when a model is merely loaded again into other memory, which no number of calls averages
out. Without it `benchmarks/self_ratio.py` found 1 in 91 of 100 intervals of a model against itself, with it in 96."""


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
    variance = images * _null_variance(lost / images, gained / images, difference)
    excess = lost - gained - images * difference
    if variance <= 0:
        return math.copysign(math.inf, excess) if excess else 0.0
    return excess / math.sqrt(variance)


def _null_variance(p_lost: float, p_gained: float, difference: float) -> float:
    """Give the variance of one image's lost − gained where p(lost) − p(gained) = `difference` fits the rates best."""
    b = (2 - p_lost + p_gained) * difference - p_lost - p_gained
    c = -p_gained * difference * (1 - difference)
    likeliest = (math.sqrt(max(b * b - 8 * c, 0.0)) - b) / 4
    return 2 * likeliest + difference * (1 - difference)


def _solve(falling: Callable[[float], float], low: float, high: float) -> float:
    """Find where a falling function crosses zero, by bisection to 1e-12."""
    if falling(high) > 0:
        return high
    while high - low > 1e-12:
        middle = (low + high) / 2
        low, high = (middle, high) if falling(middle) > 0 else (low, middle)
    return (low + high) / 2


def images_to_decide(
    lost: int,
    gained: int,
    images: int,
    allowed: float,
    confidence: float,
    *,
    power: float = 0.8,
    most: int = 100_000_000,
) -> int | None:
    """Give how many further images let Tango's interval decide about `allowed`, a fraction, if these rates are true.

    N = ((z·σ₀ + z_power·σ₁) / gap)²: the sample size of a score test, σ₀² the variance at `allowed` and σ₁² that of
    the observed rates. At least 1; None when the whole N is above `most`.
    """
    p_lost, p_gained = lost / images, gained / images
    drop = p_lost - p_gained
    normal = NormalDist()
    null = normal.inv_cdf(confidence) * math.sqrt(max(_null_variance(p_lost, p_gained, allowed), 0.0))
    own = normal.inv_cdf(power) * math.sqrt(p_lost + p_gained - drop**2)
    gap = abs(allowed - drop)
    if null + own >= gap * math.sqrt(most):
        return None
    return max(math.ceil(((null + own) / gap) ** 2) - images, 1)


def mcnemar_mid_p(lost: int, gained: int) -> float:
    """Give the two-sided mid-p value of McNemar's test that lost and gained are equally likely.

    Exact binomial, half the observed count's probability (Fagerland, Lydersen & Laake, BMC Med. Res. Methodol. 2013).
    """
    flips, fewer = lost + gained, min(lost, gained)
    if lost == gained:
        return 1.0
    count = np.arange(1, fewer + 1)
    logs = np.cumsum(np.log((flips - count + 1) / count)) - flips * math.log(2)
    chances = np.exp(np.concatenate([[-flips * math.log(2)], logs]))
    return float(2 * chances.sum() - chances[-1])


def newcombe_interval(right: tuple[int, int], images: tuple[int, int], confidence: float) -> tuple[float, float]:
    """Bound the first minus the second share of right answers, of different images, each side at `confidence`.

    Newcombe's hybrid of two Wilson intervals (R. Newcombe, *Statistics in Medicine* 17, 1998, method 10).
    """
    z = NormalDist().inv_cdf(confidence)
    (first, low, high), (second, lower, upper) = (_wilson(k, n, z) for k, n in zip(right, images, strict=True))
    difference = first - second
    return difference - math.hypot(first - low, upper - second), difference + math.hypot(high - first, second - lower)


def _wilson(right: int, images: int, z: float) -> tuple[float, float, float]:
    """Give a share and its Wilson score interval at `z` standard errors."""
    share, room = right / images, z * z / images
    centre = (share + room / 2) / (1 + room)
    reach = math.sqrt(room * share * (1 - share) + room * room / 4) / (1 + room)
    return share, centre - reach, centre + reach


def paired_bootstrap(
    metric: Callable[[Indices], tuple[float, float]],
    images: int,
    confidence: float,
    *,
    draws: int | None = None,
    seed: int = 0,
) -> tuple[float, float]:
    """Bound the first minus the second value of a metric from both sides, each side at `confidence`.

    The percentile bootstrap over images (Efron & Tibshirani 1993): `metric` gets the positions of the images drawn.
    Unless `draws` is given, so often that `BEYOND` draws lie beyond each bound. A draw on which the metric is NaN
    counts as the worst one for both bounds, so they are infinite when many are. Raises InputError for a confidence
    that asks for too many.
    """
    draws = draws or bootstrap_draws(confidence)
    rng = np.random.default_rng(seed)
    pairs = np.array([metric(rng.integers(images, size=images)) for _ in range(draws)])
    differences = pairs[:, 0] - pairs[:, 1]
    undefined = np.isnan(differences)
    lower = np.quantile(np.where(undefined, -np.inf, differences), 1 - confidence, method="lower")
    upper = np.quantile(np.where(undefined, np.inf, differences), confidence, method="higher")
    return float(lower), float(upper)


def bootstrap_draws(confidence: float) -> int:
    """Say how many draws a bound at this one-sided confidence takes; raise InputError where too many."""
    draws = max(LEAST_DRAWS, math.ceil(BEYOND / (1 - confidence) - 1e-6))
    if draws > MOST_DRAWS:
        raise InputError(
            f"a bootstrap bound at {confidence:.8g} confidence takes {draws:,} resamples, at most {MOST_DRAWS:,} are "
            "drawn; lower budget.confidence, or name the precision in place of a search, each look of which asks more"
        )
    return draws


def sqnr_db(reference: Outputs, found: Outputs) -> float:
    """Give the signal-to-quantization-noise ratio in decibels: 10·log10(Σ reference² / Σ (reference − found)²)."""
    noise = float(np.sum((reference.astype(np.float64) - found) ** 2))
    signal = float(np.sum(reference.astype(np.float64) ** 2))
    return math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal > 0 else -math.inf


def noise_share(reference: Outputs, found: Outputs) -> float:
    """Give noise power over signal power, Σ (reference − found)² / Σ reference²: what SQNR is the logarithm of."""
    noise = float(np.sum((reference.astype(np.float64) - found) ** 2))
    return noise / max(float(np.sum(reference.astype(np.float64) ** 2)), 1e-30)


def is_less(noise: NDArray[np.float64], than: NDArray[np.float64], *, errors: float = 2.0) -> bool:
    """Say whether paired noise powers, one of each image, are less than others beyond chance.

    They are where the sum is less by more than `errors` standard errors of the logarithm of the sums' ratio (by the
    jackknife: Efron & Tibshirani 1993, chapter 11); or where it is less at all and the mean of the images' log ratios
    is, by as many of its own. In the second every image has the same weight, so that one with a hundred times the
    noise of the others neither decides for a choice nor, by its uncertainty alone, against it.
    """
    count = len(noise)
    total, other = float(noise.sum()), float(than.sum())
    if count < 2 or total >= other:
        return False
    least = 1e-12 * other
    without = np.log((total - noise + least) / (other - than + least))
    spread = math.sqrt((count - 1) / count * float(np.sum((without - without.mean()) ** 2)))
    if math.log((total + least) / (other + least)) + errors * spread < 0:
        return True
    ratios = np.log((noise + least / count) / (than + least / count))
    return float(ratios.mean()) + errors * float(ratios.std(ddof=1)) / math.sqrt(count) < 0


def decibels(signal: float, noise: float) -> float | None:
    """Give a power ratio in decibels, None when there is no noise, and -999 where there is no signal or no number."""
    if noise == 0:
        return None
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(signal) and math.isfinite(noise) else -999.0


def binomial_tail(successes: int, trials: int, chance: float) -> float:
    """Give the probability of that many successes or more."""
    if successes == 0 or chance >= 1:
        return 1.0
    return min(1.0, math.fsum(math.exp(_log_binomial(trials, k, chance)) for k in range(successes, trials + 1)))


def ratio_interval(
    numerator: NDArray[np.float64],
    denominator: NDArray[np.float64],
    *,
    confidence: float = 0.95,
    draws: int = 2000,
) -> tuple[float, float, float]:
    """Estimate the ratio of two interleaved candidates from their medians per block; (value, lower, upper).

    A bootstrap over blocks, because calls next to each other share the machine's state (Kalibera & Jones 2013); the
    pair of one block is kept together, because it shares the neighbours' load. The centre is the 10 %-trimmed mean of
    the log ratios, the interval a symmetric bootstrap-t (Hall 1988), widened by `RELOAD` on either side.
    """
    rng = np.random.default_rng(0)
    logs = np.log(numerator) - np.log(denominator)
    drawn = logs[rng.integers(len(logs), size=(draws, len(logs)))]
    (centre,), (error,) = _trimmed(logs[None])
    centres, errors = _trimmed(drawn)
    deviations = np.abs(centres - centre) / np.maximum(errors, 1e-12)
    reach = float(np.quantile(deviations, confidence)) * error + RELOAD
    return math.exp(centre), math.exp(centre - reach), math.exp(centre + reach)


def _trimmed(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Give each row's 10 %-trimmed mean and its standard error, from the winsorized variance (Tukey & McLaughlin)."""
    count = rows.shape[1]
    cut = count // 10
    ordered = np.sort(rows, axis=1)
    kept = ordered[:, cut : count - cut]
    winsorized = np.clip(ordered, kept[:, :1], kept[:, -1:])
    error = winsorized.std(axis=1, ddof=1) * math.sqrt(count) / kept.shape[1]
    return kept.mean(axis=1), error


def order_statistic_bound(samples: int, quantile: float, *, confidence: float = 0.99) -> int | None:
    """Say which of the largest samples bounds the quantile from above: the k-th largest; None when none does.

    MLPerf's early stopping: with k − 1 samples above the bound allowed, the chance that the true quantile lies
    beyond it is at most 1 − `confidence`. At least one sample must lie above it, hence 64 samples for a 90th
    percentile and 662 for a 99th.
    """
    total, k = 0.0, 0
    while k < samples:
        total += math.exp(_log_binomial(samples, k, 1 - quantile))
        if total > 1 - confidence:
            break
        k += 1
    return k if k >= 2 else None


def _log_binomial(trials: int, successes: int, chance: float) -> float:
    """Give the logarithm of the binomial probability of exactly `successes`."""
    ways = math.lgamma(trials + 1) - math.lgamma(successes + 1) - math.lgamma(trials - successes + 1)
    return ways + successes * math.log(chance) + (trials - successes) * math.log1p(-chance)
