"""Confidence intervals, beside scipy's where it is installed and by hand."""

from __future__ import annotations

import math

import pytest

from tune_ego.results.intervals import Interval, mean_interval, paired_difference, t_quantile


def test_quantiles_are_those_of_the_t_distribution() -> None:
    """The density integrated numerically to each quantile is 0.475 from 0 on."""
    for freedom in (1, 2, 3, 4, 9, 19, 20, 21, 22, 30, 60, 200, 5000):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        end, steps = t_quantile(freedom), 20000  # Simpson's rule
        width = end / steps
        values = [scale * (1 + (n * width) ** 2 / freedom) ** (-(freedom + 1) / 2) for n in range(steps + 1)]
        total = width / 3 * (values[0] + values[-1] + 4 * sum(values[1:-1:2]) + 2 * sum(values[2:-1:2]))
        assert total == pytest.approx(0.475, abs=1e-6)


def test_intervals_are_scipy_s() -> None:
    stats = pytest.importorskip("scipy.stats")
    for values in ([0.5, 0.6], [0.1, 0.4, 0.2, 0.9, 0.3], [0.01 * n**1.5 for n in range(40)]):
        interval = mean_interval(values)
        assert interval is not None
        expected = stats.t.interval(0.95, len(values) - 1, loc=interval.mean, scale=stats.sem(values))
        assert (interval.low, interval.high) == pytest.approx(expected, rel=1e-5)
    ours, theirs = [0.5, 0.7, 0.65], [0.4, 0.65, 0.6]
    interval = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    expected = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert interval is not None and (interval.low, interval.high) == pytest.approx((expected.low, expected.high))


def test_the_interval_of_three_values_by_hand() -> None:
    """Mean 2, standard deviation 1: 2 -+ 4.302653 / sqrt(3)."""
    half = 4.302653 / math.sqrt(3)
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx(Interval(2.0, 2 - half, 2 + half, 3))
    assert mean_interval([1.0]) is None and mean_interval([]) is None


def test_differences_are_paired_by_their_seeds() -> None:
    """Seed 7 is on one side only. The differences are 0.1 and 0.3."""
    interval = paired_difference({3: 0.5, 4: 0.9, 7: 0.0}, {4: 0.6, 3: 0.4})
    half = 12.706205 * math.sqrt(0.02) / math.sqrt(2)
    assert interval == pytest.approx(Interval(0.2, 0.2 - half, 0.2 + half, 2))
    assert interval is not None and interval.holds_zero
    assert paired_difference({1: 0.5}, {1: 0.4}) is None
    assert not Interval(0.2, 0.1, 0.3, 5).holds_zero and not Interval(-0.2, -0.3, -0.1, 5).holds_zero
