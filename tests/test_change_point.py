"""The change point: a slow plain one finds the same, known steps are found in time, wild nights are none."""

import math
from itertools import pairwise

import numpy as np
import pytest

from bitferry.pipeline.nightly import change_point
from bitferry.pipeline.nightly.change_point import BOUND, Figures, follow, measured, saved, scatter

ERROR = 0.01


def history(seed: int, *, nights: int = 30, step: float = 0.0, at: int = 24) -> Figures:
    values = np.random.default_rng(seed).normal(0, ERROR, nights)
    values[at:] += step
    return values


def errors(values: Figures) -> Figures:
    return np.full(len(values), ERROR)


def plain_cost(values: list[float], sizes: list[float]) -> float:
    """Find the least bounded cost exactly: the best level fits some of the nights, and is their mean."""
    ends = sorted(x + side * math.sqrt(BOUND) * e for x, e in zip(values, sizes, strict=True) for side in (-1, 1))
    best = BOUND * len(values)
    for low, high in pairwise(ends):
        middle = (low + high) / 2
        near = [(x, e) for x, e in zip(values, sizes, strict=True) if (x - middle) ** 2 <= BOUND * e * e]
        if near:
            level = sum(x / e**2 for x, e in near) / sum(1 / e**2 for _, e in near)
            cost = sum(min(((x - level) / e) ** 2, BOUND) for x, e in zip(values, sizes, strict=True))
            best = min(best, cost)
    return best


@pytest.mark.parametrize("seed", range(12))
def test_what_a_change_saves_is_what_a_plain_search_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = history(seed, nights=14, step=rng.choice([0, 0.02, 0.1]), at=9)
    values[4] += 0.3 * (seed % 2)
    sizes = ERROR * rng.uniform(0.7, 1.5, 14)
    fast = saved(values, sizes)
    whole, given = plain_cost(values.tolist(), sizes.tolist()), (values.tolist(), sizes.tolist())
    for night in range(14):
        if not 3 <= night <= 12:
            assert fast[night] == -np.inf
            continue
        parts = [plain_cost(*(one[part] for one in given)) for part in (slice(night), slice(night, None))]
        assert fast[night] == pytest.approx(whole - sum(parts), abs=0.15)


def test_a_step_is_found_within_three_nights_and_keeps_its_night() -> None:
    all_found = [follow(one := history(seed, step=0.05), errors(one)) for seed in range(40)]
    assert sum(any(step and step.size > 0 for step in found[24:27]) for found in all_found) >= 39
    last = [found[-1] for found in all_found]
    assert sum(step is not None and step.since in (23, 24, 25) for step in last) >= 38
    for found in all_found:
        named = {step.since for step in found[26:] if step}
        assert len(named) <= 1


def test_a_step_that_is_undone_stands_no_longer() -> None:
    values = np.concatenate([history(1, nights=15), history(2, nights=4) + 0.06, history(3, nights=11)])
    found = follow(values, errors(values))
    assert found[17] is not None
    assert found[17].since == 15
    assert found[-1] is None


def test_nothing_is_found_where_nothing_changed() -> None:
    runs = [follow(one := history(seed), errors(one)) for seed in range(60)]
    begun = sum(now is not None and before is None for run in runs for before, now in pairwise(run))
    assert begun <= 30  # in 1,740 nights, either way; 0.9 in 100 begin on average


@pytest.mark.parametrize("night", range(6, 30))
def test_one_wild_night_is_no_change(night: int) -> None:
    values = history(4)
    assert follow(values, errors(values))[-1] is None
    values[night] += 0.3
    assert [step for step in follow(values, errors(values)) if step] == []


def test_a_change_that_leaves_the_window_stands_while_its_nights_are_given() -> None:
    values = history(5, nights=80, step=0.05, at=20)
    found = follow(values, errors(values))
    assert all(step and step.since == 20 for step in found[22:])


def test_with_few_nights_the_last_two_are_told_from_the_first() -> None:
    assert follow(np.array([0.0, 0.08]), np.full(2, ERROR))[-1] == change_point.against_first(
        np.array([0.0, 0.08]), np.full(2, ERROR)
    )
    found = follow(np.array([0.0, 0.08, 0.085, 0.08, 0.081]), np.full(5, ERROR))
    assert [step is not None for step in found] == [False, True, True, True, True]
    assert found[-1] is not None
    assert found[-1].since is None
    assert follow(np.array([0.0, 0.001, 0.3]), np.full(3, ERROR))[-1] is None
    assert follow(np.array([0.0]), np.full(1, ERROR)) == [None]


def test_a_change_right_after_the_first_night_is_told_for_good() -> None:
    values = history(6, step=0.12, at=1)
    assert all(follow(values, errors(values))[1:])


def test_nights_that_scatter_more_than_they_say_need_a_larger_step() -> None:
    calm, rough = history(7, step=0.04), 5 * history(7)
    assert scatter(calm, errors(calm))[0] < 1.5
    assert scatter(rough, errors(rough))[0] == pytest.approx(5, rel=0.35)
    rough[24:] += 0.04
    assert follow(calm, errors(calm))[-1] is not None
    assert follow(rough, errors(rough))[-1] is None


def test_a_steps_interval_holds_its_true_size_about_as_often_as_said() -> None:
    steps = [measured(one := history(seed, step=0.05), errors(one), 24) for seed in range(200)]
    assert 0.88 <= np.mean([step.lower <= 0.05 <= step.upper for step in steps]) <= 0.99
