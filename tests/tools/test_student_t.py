"""Student's t against its tables."""

import math
from typing import Callable

import pytest


@pytest.mark.parametrize(
    "degrees, level, expected",
    [(1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.99, 4.604), (5, 0.9, 2.015)]
    + [(10, 0.95, 2.228), (29, 0.95, 2.045), (1000, 0.95, 1.962)],
)
def test_quantiles_are_those_of_the_tables(
    degrees: int, level: float, expected: float, tool: Callable
) -> None:
    assert tool("student_t").t_quantile(degrees, level) == pytest.approx(expected, abs=6e-4)


def test_interval_of_a_mean(tool: Callable) -> None:
    mean, half = tool("student_t").t_interval([1.0, 2.0, 3.0])
    assert mean == 2.0 and half == pytest.approx(4.3027 / math.sqrt(3), abs=1e-3)
    assert tool("student_t").t_interval([5.0]) == (5.0, math.inf)
