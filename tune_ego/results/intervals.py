"""95 % confidence intervals of means, and of paired differences, by Student's t distribution."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

_QUANTILES = (
    *(12.706205, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004, 2.262157, 2.228139),
    *(2.200985, 2.178813, 2.160369, 2.144787, 2.131450, 2.119905, 2.109816, 2.100922, 2.093024, 2.085963),
)
"""97.5 % quantiles of the t distribution with 1, 2, ..., 20 degrees of freedom."""
_NORMAL = 1.959963985
"""97.5 % quantile of the normal distribution."""


class Interval(NamedTuple):
    """Mean of a sample and the 95 % confidence interval of the mean."""

    mean: float
    low: float
    high: float
    size: int
    """Number of values in the sample."""

    @property
    def holds_zero(self) -> bool:
        """Whether 0 lies within the interval."""
        return self.low <= 0 <= self.high


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return the interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    centre = mean(values)
    return Interval(centre, centre - half, centre + half, len(values))


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Interval | None:
    """Return the interval of the mean difference, ours - theirs, over the seeds that both have; None for under two.

    Runs with the same seed have the same first weights and the same order of samples, so their difference varies less
    than the difference of independent runs.
    """
    return mean_interval([ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())])


def t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of the t distribution, with an error below 1e-5.

    Over 20 degrees of freedom by the expansion of Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = _NORMAL
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
