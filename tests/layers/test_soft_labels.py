"""What a teacher says of each anchor, beside the equations one anchor at a time."""

import itertools
import math
from typing import Any, Callable, List

import pytest
import torch
from torch import Tensor

from d2kd.layers import (
    difference_weighted,
    giou_distance,
    largest_probability,
    log_iou_distance,
)
from tests.helpers.logit_references import (
    binary_cross_entropy,
    class_term,
    entries,
    giou_loss,
    log_iou_loss,
    sigmoid,
)
from tests.helpers.toys import noise

DISTANCES = [(giou_distance, giou_loss), (log_iou_distance, log_iou_loss)]


def as_map(*boxes: List[float]) -> Tensor:
    """Boxes of the anchors of a single cell, (1, A*4, 1, 1)."""
    return torch.tensor(boxes).view(1, -1, 1, 1)


# Classes -----------------------------------------------------------------------------------------


def test_a_class_counts_as_much_as_the_two_disagree_on_it() -> None:
    # sigmoid(0) = 1/2, target 1/4: |1/4| * -(1/4 log 1/2 + 3/4 log 1/2) = log(2) / 4.
    found, weight = difference_weighted(torch.tensor([0.0]), torch.tensor([0.25]).logit())
    assert weight.item() == pytest.approx(0.25) and not weight.requires_grad
    assert found.item() == pytest.approx(math.log(2) / 4, rel=1e-6)


@pytest.mark.parametrize("z, t", itertools.product([-120.0, -3.0, 0.0, 2.0, 120.0], repeat=2))
def test_loss_and_gradient_are_those_of_float64_at_any_logits(z: float, t: float) -> None:
    x, target = torch.tensor([z], requires_grad=True), torch.tensor([t], requires_grad=True)
    found, _ = difference_weighted(x, target)
    found.backward()
    assert found.item() == pytest.approx(class_term([z], [t]), rel=1e-5, abs=1e-30)
    p, q = sigmoid(z), sigmoid(t)
    # d|p - q| = sign(p - q) p (1 - p), dBCE = p - q: the weight has a gradient too.
    sign = (p > q) - (p < q)
    slope = sign * p * (1 - p) * binary_cross_entropy(z, q) + abs(p - q) * (p - q)
    assert x.grad.item() == pytest.approx(slope, rel=1e-4, abs=1e-6)
    assert target.grad is None


def test_equal_logits_give_zero_and_half_precision_is_compared_in_float32() -> None:
    x = noise(2, 6, 3, 4) * 5
    assert difference_weighted(x, x)[0].abs().sum() == 0
    large = torch.tensor([6e4, -6e4], dtype=torch.float16)
    found, _ = difference_weighted(large, -large)
    assert found.dtype == torch.float32 and found.tolist() == pytest.approx([large[0].item()] * 2)


def test_largest_probability_is_that_of_any_class_of_an_anchor() -> None:
    x = (noise(2, 6, 3, 4) * 3).requires_grad_()
    for num_anchors in (1, 2, 3, 6):
        found = largest_probability(x, num_anchors)
        assert found.shape == (2, num_anchors, 3, 4) and not found.requires_grad
        for index in itertools.product(*map(range, found.shape)):
            expected = max(map(sigmoid, entries(x, num_anchors, index)))
            assert found[index].item() == pytest.approx(expected, rel=1e-5)


# Boxes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance, reference", DISTANCES)
def test_distance_is_that_of_the_equation_for_each_anchor(
    distance: Callable[..., Tensor], reference: Callable[..., float]
) -> None:
    corners = [noise(2, 3, 2, 3, 4, seed=s) * 8 for s in (1, 2)]
    sizes = [noise(2, 3, 2, 3, 4, seed=s).abs() * 9 + 1 for s in (3, 4)]
    boxes, target = (
        torch.cat([c[:, :, :2], c[:, :, :2] + s[:, :, :2]], dim=2).flatten(1, 2)
        for c, s in zip(corners, sizes)
    )
    found = distance(boxes.float(), target.float(), 3)
    assert found.shape == (2, 3, 3, 4)
    for index in itertools.product(*map(range, found.shape)):
        expected = reference(entries(boxes, 3, index), entries(target, 3, index))
        assert found[index].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert found.min() < found.max()


def test_known_distances() -> None:
    # The left half of a square: IoU 1/2, and the smallest box around both is the square.
    square, half = as_map([0.0, 0.0, 8.0, 8.0]), as_map([0.0, 0.0, 4.0, 8.0])
    assert giou_distance(half, square, 1).item() == pytest.approx(0.5)
    assert log_iou_distance(half, square, 1).item() == pytest.approx(math.log(2))
    # Two unit squares at the ends of a 4 x 1 box: 1 - (0 - 2/4); IoU counts as 1e-6 at least.
    first, last = as_map([0.0, 0.0, 1.0, 1.0]), as_map([3.0, 0.0, 4.0, 1.0])
    assert giou_distance(first, last, 1).item() == pytest.approx(1.5)
    assert log_iou_distance(first, last, 1).item() == pytest.approx(6 * math.log(10))


@pytest.mark.parametrize("distance, _", DISTANCES)
def test_equal_boxes_are_at_no_distance_and_empty_targets_at_none(
    distance: Callable[..., Tensor], _: Any
) -> None:
    boxes = as_map([3.0, 5.0, 40.0, 33.0], [-4.0, -9.0, 900.0, 7.0])
    assert distance(boxes, boxes, 2).abs().max() < 1e-6
    for empty in ([3.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 9.0], [3.0, 3.0, 9.0, 3.0]):
        for box in ([3.0, 3.0, 3.0, 3.0], [0.0, 0.0, 5.0, 5.0]):
            x = as_map(box).requires_grad_()
            loss = distance(x, as_map(empty), 1)
            loss.sum().backward()
            assert loss.item() == 0 and x.grad.abs().sum() == 0


@pytest.mark.parametrize("distance, _", DISTANCES)
def test_an_empty_prediction_is_far_and_has_a_finite_gradient(
    distance: Callable[..., Tensor], _: Any
) -> None:
    x = as_map([3.0, 3.0, 3.0, 3.0]).requires_grad_()
    loss = distance(x, as_map([0.0, 0.0, 8.0, 8.0]), 1)
    loss.sum().backward()
    assert loss.item() >= 1 - 1e-6 and x.grad.isfinite().all()


@pytest.mark.parametrize("distance, _", DISTANCES)
def test_only_the_boxes_of_the_student_get_a_gradient(
    distance: Callable[..., Tensor], _: Any
) -> None:
    x = as_map([0.0, 0.0, 4.0, 8.0]).requires_grad_()
    target = as_map([1.0, 1.0, 8.0, 8.0]).requires_grad_()
    distance(x, target, 1).sum().backward()
    assert target.grad is None and x.grad.abs().sum() > 0
