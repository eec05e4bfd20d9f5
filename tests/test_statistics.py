"""Each bound against a slow plain computation of what it claims."""

import math

import numpy as np
import pytest

from pipeline.statistics import ratio_interval, sqnr_db, tango_interval, tango_statistic


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


def test_the_bound_covers_the_true_drop_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    images, p_lost, p_gained = 1000, 0.03, 0.02
    counts = rng.multinomial(images, [p_lost, p_gained, 1 - p_lost - p_gained], size=2000)
    covered = np.mean([tango_interval(int(b), int(c), images, 0.95)[1] >= p_lost - p_gained for b, c, _ in counts])
    assert 0.935 <= covered <= 0.965  # three standard errors of 2000 draws


def test_sqnr_of_known_noise() -> None:
    reference = np.full((1, 4), 10.0, dtype=np.float32)
    assert sqnr_db(reference, reference) == math.inf
    assert sqnr_db(reference, reference + 1) == pytest.approx(20.0)


def test_ratio_interval_covers_one_for_equal_series_and_not_for_a_true_difference() -> None:
    rng = np.random.default_rng(3)
    a, b = rng.gamma(50, 1 / 50, (24, 20)), rng.gamma(50, 1 / 50, (24, 20))
    low, high = ratio_interval(a, b)
    assert low < 1 < high
    low, high = ratio_interval(a * 1.2, b)
    assert 1 < low < 1.2 < high
