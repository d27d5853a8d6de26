"""Losses of RepPoints against the sums that they are."""

import math

import torch

from d2kd.modeling.reppoints.losses import box_loss, class_loss, positives
from tests.helpers.toys import noise


def test_each_image_counts_one_positive_at_least() -> None:
    assert positives(torch.tensor([[True, True, False], [False] * 3])) == 3


def test_class_loss_is_the_focal_loss_of_what_is_not_ignored() -> None:
    logits = 3 * noise(2, 4, 3)
    labels = torch.tensor([[0, 3, -1, 2], [3, 3, -1, 3]])  # 3: background
    total = 0.0
    for image in range(2):
        for cell in range(4):
            for k in range(3):
                label = int(labels[image, cell])
                if label < 0:
                    continue
                p = 1 / (1 + math.exp(-float(logits[image, cell, k])))
                if label == k:
                    total -= 0.25 * (1 - p) ** 2 * math.log(p)
                else:
                    total -= 0.75 * p**2 * math.log(1 - p)
    # Two on objects in the first image, and one for the second.
    assert math.isclose(class_loss(logits, labels, 0.25, 2.0), total / 3, rel_tol=1e-6)


def test_box_loss_is_smooth_l1_in_units_of_the_level() -> None:
    boxes, gt, unit = (
        40 * noise(2, 3, 4),
        40 * noise(2, 3, 4, seed=1),
        torch.tensor([32.0, 64, 512]),
    )
    gt[0, 0] = boxes[0, 0] + 1.0  # within beta
    on_objects = torch.tensor([[True, False, True], [False, True, False]])
    total = 0.0
    for image, row in on_objects.nonzero().tolist():
        for a, b in zip(boxes[image, row].tolist(), gt[image, row].tolist()):
            d = abs(a - b) / float(unit[row])
            total += d**2 / 2 / 0.11 if d < 0.11 else d - 0.11 / 2
    assert math.isclose(box_loss(boxes, gt, on_objects, unit, 0.11), total / 3, rel_tol=1e-6)


def test_without_objects_the_box_loss_is_0_and_has_gradients() -> None:
    boxes = noise(2, 3, 4).requires_grad_()
    loss = box_loss(boxes, boxes.detach(), torch.zeros(2, 3) > 0, torch.ones(3), 0.11)
    loss.backward()
    assert loss == 0 and torch.equal(boxes.grad, torch.zeros_like(boxes))
