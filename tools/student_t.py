"""Student's t distribution, for intervals over a few seeds."""

import math
from functools import lru_cache
from typing import Sequence, Tuple

import numpy as np


@lru_cache(maxsize=None)
def t_quantile(degrees: int, level: float = 0.95) -> float:
    """
    Args:
        degrees: of freedom, 1 or more
        level: probability in (0, 1)

    Returns:
        what |t| stays below with this probability
    """
    low, high = 0.0, 1.0
    while _probability(high, degrees) < level:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _probability(middle, degrees) < level else (low, middle)
    return high


def t_interval(values: Sequence[float]) -> Tuple[float, float]:
    """
    Returns:
        mean, and half of the width of its 95 % interval: infinite for a single value
    """
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return mean, math.inf
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return mean, t_quantile(count - 1) * error


def _probability(t: float, degrees: int) -> float:
    """That |t| is smaller, by the finite series for whole degrees of freedom."""
    angle = math.atan(t / math.sqrt(degrees))
    odd = degrees % 2
    term, total = (math.cos(angle) if odd else 1.0), 0.0
    for k in range(1 + odd, degrees, 2):
        total += term
        term *= math.cos(angle) ** 2 * k / (k + 1)
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * total)
    return math.sin(angle) * total
