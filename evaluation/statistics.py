"""How sure a measured share is, and whether two runs over the same questions differ.

Questions are the unit: several samples of one question are averaged first, so that its samples, which are alike, never
count as independent ones (Miller 2024, Adding Error Bars to Evals, https://arxiv.org/abs/2411.00640, sections 2 and 4).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Z = 1.959963984540054  # of the standard normal distribution, two-sided 95 %
RESAMPLES, SEED = 10_000, 0


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    value: float
    low: float
    high: float


def interval(scores: Sequence[float]) -> Interval:
    """The mean of one score a question. Wilson's interval (1927) for shares of 0 and 1, which holds also near 0 and 1
    and for few questions; else the normal one from the questions' spread, within 0 to 1."""
    n = len(scores)
    if n == 0:
        raise ValueError("no questions to average")
    mean = math.fsum(scores) / n
    if all(score in (0, 1) for score in scores):
        centre = (mean + Z * Z / (2 * n)) / (1 + Z * Z / n)
        half = Z / (1 + Z * Z / n) * math.sqrt(mean * (1 - mean) / n + Z * Z / (4 * n * n))
    else:
        variance = math.fsum((score - mean) ** 2 for score in scores) / (n - 1) if n > 1 else 0.25
        centre, half = mean, Z * math.sqrt(variance / n)
    return Interval(mean, max(0.0, centre - half), min(1.0, centre + half))


def pass_at(k: int, samples: int, right: int) -> float:
    """The chance that one of k samples is right, unbiased (Chen et al. 2021, https://arxiv.org/abs/2107.03374, eq. 1).

    `right` of `samples` were. ValueError where k is more than were drawn.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples: give a k from 1 to {samples}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p-value that both runs are equally often right (McNemar 1947).

    `only_a` and `only_b`: the questions that run A, or run B, alone has right. It is the binomial test at 1/2.
    """
    n, least = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(n, i) for i in range(least + 1))
    return min(1.0, float(2 * tail / (1 << n))) if n < 1000 else _large(n, least)


def _large(n: int, least: int) -> float:
    """The same sum through logarithms: 2^n is beyond a float."""
    terms = (math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(least + 1))
    return min(1.0, 2 * math.fsum(math.exp(term - n * math.log(2)) for term in terms))


def paired_interval(a: Sequence[float], b: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """The mean of b - a over the questions, and its percentile bootstrap (Efron 1979) with a fixed seed."""
    if len(a) != len(b) or not a:
        raise ValueError(f"{len(a)} and {len(b)} scores: a paired comparison needs the same questions, at least one")
    differences = np.asarray(b, dtype=np.float64) - np.asarray(a, dtype=np.float64)
    random = np.random.Generator(np.random.PCG64(SEED))
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # memory stays small for any number of questions
        count = min(1000, resamples - start)
        means[start : start + count] = _resampled(random, differences, count)
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(differences.mean()), float(low), float(high))


def _resampled(random: np.random.Generator, values: np.ndarray, count: int) -> np.ndarray:
    return np.array([values[random.integers(0, len(values), len(values))].mean() for _ in range(count)])
