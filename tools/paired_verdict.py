"""
Whether a teacher is worth it, by a rule that is fixed before the runs.

The gain that counts is one above a threshold. Its estimate is the mean over seeds of the paired
differences; its error has two parts that are independent: other seeds (Student's t over the
differences) and other images (the bootstrap's standard deviation, which more seeds do not shrink).
Their variances add up, and each has its quantile's share of the interval, as Cochran has it: with
Welch's degrees of freedom two or three seeds gave more than 5 % false gains. The 95 % interval
decides: above the threshold GAIN, below it NO GAIN, and INCONCLUSIVE where the threshold is in it.
"""

import math
from typing import NamedTuple, Optional, Sequence

import numpy as np

from student_t import t_quantile

GAIN, NO_GAIN, INCONCLUSIVE = "GAIN", "NO GAIN", "INCONCLUSIVE"
MOST_SEEDS = 200  # beyond what anybody would run
NORMAL = 1.96


class Verdict(NamedTuple):
    """
    `gain`, `low`, `high`: AP; `more_seeds`: how many would decide if gain and spread stayed as they
    are, None where no number would or none can be told.
    """

    decision: str
    gain: float
    low: float
    high: float
    threshold: float
    more_seeds: Optional[int]

    def __str__(self) -> str:
        numbers = (
            f"{self.gain:+.1f} AP, 95 % interval over seeds and images {self.low:+.1f} to "
            f"{self.high:+.1f}, threshold {self.threshold:+.1f}"
        )
        if self.decision == GAIN:
            return f"GAIN: {numbers}."
        if self.decision == NO_GAIN:
            return f"NO GAIN: {numbers}." + (" It does harm." if self.high < 0 else "")
        if math.isinf(self.high):
            return f"INCONCLUSIVE: {self.gain:+.1f} AP of one seed. Run at least two more."
        if self.more_seeds is None:
            return f"INCONCLUSIVE: {numbers}. More seeds would not decide, more test images might."
        more = "1 more seed" if self.more_seeds == 1 else f"{self.more_seeds} more seeds"
        return f"INCONCLUSIVE: {numbers}. About {more} would decide."


def decide(gains: Sequence[float], image_error: float, threshold: float = 0.5) -> Verdict:
    """
    Args:
        gains: AP of the distilled student minus that of the student alone, of each seed
        image_error: standard deviation of their mean over bootstrap samples of the images
        threshold: AP; what is not more than this is no gain
    """
    gain, count = float(np.mean(gains)), len(gains)
    if count < 2:
        return Verdict(INCONCLUSIVE, gain, -math.inf, math.inf, threshold, None)
    spread = float(np.std(gains, ddof=1))
    half = half_width(spread, count, image_error)
    low, high = gain - half, gain + half
    if low > threshold:
        return Verdict(GAIN, gain, low, high, threshold, 0)
    if high < threshold:
        return Verdict(NO_GAIN, gain, low, high, threshold, 0)
    distance = abs(gain - threshold)
    enough = (n for n in range(count + 1, MOST_SEEDS) if _decides(spread, n, image_error, distance))
    needed = next(enough, None)
    more = None if needed is None else needed - count
    return Verdict(INCONCLUSIVE, gain, low, high, threshold, more)


def half_width(spread: float, count: int, image_error: float) -> float:
    """
    Half of the width of the 95 % interval.

    Args:
        spread: standard deviation over seeds
        count: of seeds, 2 or more
        image_error: as in :func:`decide`
    """
    of_seeds, of_images = spread**2 / count, image_error**2
    variance = of_seeds + of_images
    if not variance:
        return 0.0
    return (of_seeds * t_quantile(count - 1) + of_images * NORMAL) / math.sqrt(variance)


def _decides(spread: float, count: int, image_error: float, distance: float) -> bool:
    return half_width(spread, count, image_error) < distance
