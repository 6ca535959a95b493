"""How far a figure may be from what more test data would show: 95 % intervals.

Of shares they are Wilson's, of everything else the bootstrap's: the questions are drawn anew, with repetition, and the
figure is computed from each of the draws (Efron, 1979). They tell of the choice of the questions alone, not of what
another training run would bring.
"""

from __future__ import annotations

import math

import numpy as np

Interval = tuple[float, float]

RESAMPLES = 1000
Z = 1.959964  # of the normal distribution, 95 % lie within ± this


def wilson(hits: float, count: int) -> Interval:
    """The interval of a share `hits` / `count` (Wilson, 1927). Unlike ± 1.96 √(p(1 − p)/n) it stays within 0 … 1, and
    does not shrink to nothing where all or none are right."""
    if count == 0:
        return 0.0, 1.0
    share, shift = hits / count, Z**2 / count
    centre = (share + shift / 2) / (1 + shift)
    half = Z / (1 + shift) * math.sqrt(share * (1 - share) / count + shift / (4 * count))
    # Exactly 0 and 1 at the ends, where rounding would leave 1e−17
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)


def resampled_sums(statistics: np.ndarray, seed: int = 0, resamples: int = RESAMPLES) -> np.ndarray:
    """Sums of statistics (N, k) over N rows drawn with repetition, (resamples, k); repeatable by the seed."""
    generator, count = np.random.default_rng(seed), len(statistics)
    draws = (np.bincount(generator.integers(count, size=count), minlength=count) for _ in range(resamples))
    return np.stack([times @ statistics for times in draws])


def middle(values: np.ndarray) -> Interval:
    """Where the middle 95 % of a figure's values (resamples,) lie."""
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def bootstrap_mean(values: np.ndarray, seed: int = 0) -> Interval:
    """The interval of the mean of values (N,)."""
    return middle(resampled_sums(np.asarray(values, dtype=float)[:, None], seed)[:, 0] / max(1, len(values)))
