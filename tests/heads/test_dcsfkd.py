"""DCSFKDHead beside its equations in loops, and its limits."""

import math

import pytest
import torch
from torch import Tensor

from d2kd.heads import DCSFKDHead, PKDHead
from tests.helpers.toys import feature_view, level_pairs, noise

LEVELS = level_pairs(p3=(4, 4))


def loss_of(student: Tensor, teacher: Tensor, **values: float) -> Tensor:
    head = DCSFKDHead(levels=LEVELS, **values)
    return head(feature_view({"p3": student}), feature_view({"p3": teacher}))["loss_dcsfkd"]["p3"]


def dcsfkd_in_loops(student: Tensor, teacher: Tensor, spread: float) -> float:
    x, target = (
        torch.stack([(c - c.mean()) / (c.std() + 1e-6) for c in y.transpose(0, 1)], dim=1)
        for y in (student, teacher)
    )
    total = 0.0
    for one, other in zip(x, target):  # an image
        exponentials = [math.exp(c.mean().item()) for c in other]
        for c in range(len(one)):
            weight = 1 + spread * exponentials[c] / sum(exponentials)
            total += ((weight * one[c] - other[c]) ** 2).sum().item()
    return total / x.numel()


@pytest.mark.parametrize("spread", [9.0, 0.5])
def test_loss_is_that_of_the_equations(spread: float) -> None:
    student, teacher = noise(3, 4, 4, 5, seed=1) * 3 + 2, noise(3, 4, 4, 5, seed=2)
    expected = dcsfkd_in_loops(student, teacher, spread)
    assert loss_of(student, teacher, spread=spread).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_spread_that_is_negative_or_not_finite_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"^spread must be 0 or above, got {value};"):
        DCSFKDHead(levels=LEVELS, spread=value)


def test_without_spread_it_is_twice_pkd() -> None:
    student, teacher = (feature_view({"p3": noise(2, 4, 4, 5, seed=s)}) for s in (1, 2))
    pkd = PKDHead(levels=LEVELS)(student, teacher)["loss_pkd"]["p3"]
    found = DCSFKDHead(levels=LEVELS, spread=0.0)(student, teacher)["loss_dcsfkd"]["p3"]
    torch.testing.assert_close(found, 2 * pkd)


def test_equal_features_of_equal_channels_have_a_loss() -> None:
    # Channels with the same mean in each image share alike: w = 1 + 9/4, and of m standardised
    # values the sum of squares is m - 1: (w - 1)^2 (m - 1) / m.
    x = noise(1, 4, 4, 5)
    assert loss_of(x, x).item() == pytest.approx((9 / 4) ** 2 * 19 / 20, rel=1e-4)
