"""Means with intervals, and differences of pairs: what a handful of seeded runs can tell."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from repmatch.errors import MissingExtraError, UsageError


@dataclass(frozen=True)
class Interval:
    """A mean and Student's interval around it.

    Attributes:
        mean: of the values.
        low: lower end; None for a single value, which says nothing of its spread.
        high: upper end; likewise.
        count: values.
    """

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


def interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Return the mean and its interval by Student's t (Student 1908), for values that are independent draws.

    Args:
        values: one or more.
        level: confidence, between 0 and 1.

    Returns:
        The interval; values that are all equal give one of no width.

    Raises:
        UsageError: no values, or a level out of range.
    """
    if len(values) == 0:
        raise UsageError("an interval needs at least one value, got none.")
    if not 0 < level < 1:
        raise UsageError(f"the level {level} is out of range; expected a number between 0 and 1, such as 0.95.")
    numbers = np.asarray(values, np.float64)
    mean, count = float(numbers.mean()), len(numbers)
    if count == 1:
        return Interval(mean, None, None, 1)
    reach = _quantile(0.5 + level / 2, count - 1) * float(numbers.std(ddof=1)) / float(np.sqrt(count))
    return Interval(mean, mean - reach, mean + reach, count)


def paired(values: Sequence[float], others: Sequence[float], level: float = 0.95) -> Interval:
    """Return the interval of the differences of pairs, values minus others.

    Args:
        values: one a seed.
        others: the same seeds, in the same order.
        level: confidence, between 0 and 1.

    Returns:
        The interval of the mean difference; where it excludes zero, the paired t test rejects equality at 1 − level.

    Raises:
        UsageError: the two are not equally long.
    """
    if len(values) != len(others):
        raise UsageError(f"pairs need equally many values on both sides, got {len(values)} and {len(others)}.")
    return interval([a - b for a, b in zip(values, others, strict=True)], level)


def _quantile(probability: float, freedom: int) -> float:
    try:
        stats: Any = __import__("scipy.stats", fromlist=["t"])
    except ImportError as error:
        raise MissingExtraError("an interval of confidence", "evaluate") from error
    return float(stats.t.ppf(probability, freedom))
