"""Each bound against a slow plain computation of what it claims."""

import math
from functools import cache

import numpy as np
import pytest

from bitferry.device.errors import InputError
from bitferry.pipeline.statistics import (
    RELOAD,
    Indices,
    binomial_tail,
    bootstrap_draws,
    images_to_decide,
    mcnemar_mid_p,
    paired_bootstrap,
    ratio_interval,
    sqnr_db,
    tango_interval,
    tango_statistic,
)

interval = cache(tango_interval)
"""Simulated counts repeat."""


def constrained_statistic(lost: int, gained: int, images: int, difference: float) -> float:
    """Tango's statistic, p(gained) found by trying a fine grid of the likelihood instead of solving a quadratic."""
    q = np.linspace(max(0.0, -difference) + 1e-9, (1 - difference) / 2 - 1e-9, 400_001)
    likelihood = (
        lost * np.log(q + difference) + gained * np.log(q) + (images - lost - gained) * np.log1p(-2 * q - difference)
    )
    best = q[np.argmax(likelihood)]
    return float((lost - gained - images * difference) / math.sqrt(images * (2 * best + difference * (1 - difference))))


@pytest.mark.parametrize(("lost", "gained", "images"), [(20, 10, 500), (3, 9, 300), (44, 5, 4000), (1, 1, 60)])
@pytest.mark.parametrize("difference", [0.004, 0.03])
def test_tango_statistic_uses_the_most_likely_probabilities(
    lost: int, gained: int, images: int, difference: float
) -> None:
    expected = constrained_statistic(lost, gained, images, difference)
    assert tango_statistic(lost, gained, images, difference) == pytest.approx(expected, abs=2e-3)


def test_tango_interval_ends_where_the_statistic_meets_the_quantile() -> None:
    lower, upper = tango_interval(30, 20, 2000, 0.95)
    assert tango_statistic(30, 20, 2000, upper) == pytest.approx(-1.644854, abs=1e-5)
    assert tango_statistic(30, 20, 2000, lower) == pytest.approx(1.644854, abs=1e-5)
    assert lower < 10 / 2000 < upper


def test_tango_interval_of_extreme_counts() -> None:
    lower, upper = tango_interval(0, 0, 1000, 0.95)
    z2 = 1.6448536**2  # with no discordant pair the bound is z²/(n + z²)
    assert upper == pytest.approx(z2 / (1000 + z2), rel=1e-4)
    assert lower == pytest.approx(-upper, rel=1e-4)
    assert tango_interval(50, 0, 50, 0.95)[1] == pytest.approx(1.0)
    assert tango_interval(0, 50, 50, 0.95)[0] == pytest.approx(-1.0)


def bounds(
    images: int, p_lost: float, p_gained: float, draws: int
) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """Simulate data sets; give the lower and upper 95 % bound of each."""
    rng = np.random.default_rng(1)
    counts = rng.multinomial(images, [p_lost, p_gained, 1 - p_lost - p_gained], size=draws)
    return np.array([interval(int(b), int(c), images, 0.95) for b, c, _ in counts])


@pytest.mark.parametrize("images", [500, 4000])
@pytest.mark.parametrize(
    ("p_lost", "p_gained"), [(0.03, 0.02), (0.02, 0.02), (0.012, 0.008), (0.025, 0.01), (0.05, 0.03)]
)
def test_the_bounds_cover_the_true_drop_as_often_as_they_say(images: int, p_lost: float, p_gained: float) -> None:
    lower, upper = bounds(images, p_lost, p_gained, 20_000).T
    assert 0.94 <= np.mean(upper >= p_lost - p_gained) <= 0.96
    assert 0.94 <= np.mean(lower <= p_lost - p_gained) <= 0.96


@pytest.mark.parametrize(
    ("p_lost", "p_gained", "allowed"),
    [
        (0.01, 0.01, 0.01), (0.025, 0.025, 0.01), (0.012, 0.008, 0.01), (0.02, 0.018, 0.005), (0.001, 0.003, 0.0),
        (0.0005, 0.0005, 0.01), (0.002, 0.0, 0.01), (0.0, 0.0, 0.01),  # few flips or none
        (0.03, 0.01, 0.01), (0.02, 0.0, 0.01), (0.05, 0.02, 0.01), (0.03, 0.02, 0.0),  # these fail
    ],
)  # fmt: skip
def test_as_many_images_as_told_decide_with_the_power_told(p_lost: float, p_gained: float, allowed: float) -> None:
    trial = 2000
    further = images_to_decide(round(p_lost * trial), round(p_gained * trial), trial, allowed, 0.95)
    assert further is not None
    total = trial + further if further > 1 else total_images(p_lost, p_gained, allowed)  # 1: `trial` was enough
    lower, upper = bounds(total, p_lost, p_gained, 4000).T
    right = upper <= allowed if p_lost - p_gained < allowed else lower > allowed
    assert np.mean(right) >= 0.78


def total_images(p_lost: float, p_gained: float, allowed: float) -> int:
    """Ask as if one image with these rates had been seen, which leaves nearly the whole number to come."""
    further = images_to_decide(p_lost, p_gained, 1, allowed, 0.95)  # type: ignore[arg-type]
    assert further is not None
    return further + 1


def test_images_to_decide_is_near_the_simple_formula_and_that_of_no_flip() -> None:
    for flipped, simple in ((0.02, 1237), (0.05, 3092)):  # (z + z_power)²·flipped / allowed²
        assert total_images(flipped / 2, flipped / 2, 0.01) == pytest.approx(simple, rel=0.15)
    z2 = 1.6448536**2
    assert total_images(0.0, 0.0, 0.01) == math.ceil(z2 * 0.99 / 0.01)  # z²/(N + z²) = 1 %


def test_no_number_of_images_decides_a_drop_that_is_the_allowed_one() -> None:
    assert images_to_decide(10, 0, 1000, 0.01, 0.95) is None
    assert images_to_decide(0, 0, 1000, 0.0, 0.95) is None
    assert images_to_decide(20_001, 10_000, 1_000_000, 0.01, 0.95) is None
    assert images_to_decide(20_001, 10_000, 1_000_000, 0.01, 0.95, most=10**12) is not None


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (3, 3), (0, 3), (10, 5), (5, 10), (70, 40), (600, 700)])
def test_mcnemar_mid_p_is_the_exact_sum(lost: int, gained: int) -> None:
    flips, fewer = lost + gained, min(lost, gained)
    chances = [math.comb(flips, k) / 2**flips for k in range(fewer + 1)]
    assert mcnemar_mid_p(lost, gained) == pytest.approx(min(2 * sum(chances) - chances[-1], 1.0), rel=1e-9)


def test_mcnemar_mid_p_of_large_counts_is_that_of_the_normal_distribution() -> None:
    z = 400 / math.sqrt(199_600)
    assert mcnemar_mid_p(100_000, 99_600) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)


def test_paired_bootstrap_of_a_mean_is_near_the_normal_bounds() -> None:
    rng = np.random.default_rng(6)
    first = rng.normal(size=500)
    second = first - 0.1 + 0.3 * rng.normal(size=500)
    calls: list[Indices] = []

    def means(drawn: Indices) -> tuple[float, float]:
        calls.append(drawn)
        return float(first[drawn].mean()), float(second[drawn].mean())

    lower, upper = paired_bootstrap(means, 500, 0.95)
    difference = first - second
    error = 1.6449 * difference.std() / math.sqrt(500)
    assert (lower, upper) == pytest.approx((difference.mean() - error, difference.mean() + error), abs=0.15 * error)
    assert len(calls) == 1000
    assert paired_bootstrap(means, 500, 0.95) == (lower, upper)


def test_a_metric_without_value_on_many_draws_has_no_bound() -> None:
    known = iter([0.5] * 97 + [math.nan] * 3 + [0.5] * 90 + [math.nan] * 10)
    few = paired_bootstrap(lambda _: (next(known), 0.4), 50, 0.95, draws=100)
    assert few == pytest.approx((0.1, 0.1))
    assert paired_bootstrap(lambda _: (next(known), 0.4), 50, 0.95, draws=100) == (-math.inf, math.inf)


def test_sqnr_of_known_noise() -> None:
    reference = np.full((1, 4), 10.0, dtype=np.float32)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference, reference + 1) == pytest.approx(20.0)


def test_ratio_interval_covers_one_for_equal_series_and_not_for_a_true_difference() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.gamma(50, 1 / 50, (2, 40))
    value, low, high = ratio_interval(a, b)
    assert low < 1 < high
    assert low < value < high
    quiet = 1 + 0.02 * rng.normal(size=(2, 40))
    value, low, high = ratio_interval(quiet[0] * 1.2, quiet[1])
    assert 1 < low < 1.2 < high
    assert value == pytest.approx(1.2, rel=0.01)


def test_ratio_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Blocks with a common load and a heavy tail of their own; the allowance for reloading is taken off."""
    rng = np.random.default_rng(4)
    covered = []
    for _ in range(400):
        load = np.exp(0.3 * rng.normal(size=40))
        own = np.exp(0.03 * rng.standard_t(3, size=(2, 40)))
        _, low, high = ratio_interval(1.5 * load * own[0], load * own[1], draws=500)
        covered.append(low * math.exp(RELOAD) <= 1.5 <= high * math.exp(-RELOAD))
    assert 0.92 <= np.mean(covered) <= 0.98


@pytest.mark.parametrize("look", [0, 1, 3, 6])
def test_the_bootstrap_of_each_look_is_the_quantile_it_asks_for(look: int) -> None:
    """Of the mean of lost images the bootstrap's distribution is known: binomial. A bound of too few draws is not it."""
    confidence, images, lost = 1 - 0.05 / 2**look, 100, 20
    before, after = np.ones(images), np.arange(images) >= lost
    exact = next(k for k in range(images) if binomial_tail(k + 1, images, lost / images) <= 1 - confidence)

    def means(drawn: Indices) -> tuple[float, float]:
        return float(before[drawn].mean()), float(after[drawn].mean())

    bounds = [round(images * paired_bootstrap(means, images, confidence, seed=seed)[1]) for seed in range(2)]
    assert all(abs(bound - exact) <= 1 for bound in bounds), (bounds, exact)


def test_the_bound_of_the_sixth_look_covers_the_true_difference() -> None:
    """It may miss 1 in 1,280; of 400 data sets hardly ever more than 2 (1 in 250)."""
    rng, confidence, images = np.random.default_rng(5), 1 - 0.05 / 2**6, 400
    draws, missed = bootstrap_draws(confidence), 0
    for _ in range(400):
        lost = rng.random(images) < 0.2
        # Drawing images and counting the lost is drawing their number: what `paired_bootstrap` does, at once.
        found = np.sort(rng.binomial(images, lost.mean(), size=draws))
        missed += found[math.ceil(confidence * (draws - 1))] < 0.2 * images
    assert missed <= 2


def test_a_confidence_that_no_resampling_supports_is_refused() -> None:
    assert bootstrap_draws(0.95) == 1000
    assert bootstrap_draws(1 - 0.05 / 2**6) == 12_800
    with pytest.raises(InputError, match=r"0.999999 confidence takes 10,000,\d\d\d resamples, at most 200,000"):
        bootstrap_draws(0.999999)
