"""Losses of RepPoints."""

from fvcore.nn import sigmoid_focal_loss_jit, smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F


def positives(on_objects: Tensor) -> Tensor:
    """(N, R), whether a cell learns a box -> their number, at least 1 in each image."""
    return on_objects.sum(dim=1).clamp(min=1).sum()


def class_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """
    Focal loss, divided by the positives.

    Args:
        logits: (N, R, K)
        labels: (N, R): 0 to K-1, K for background, -1 for cells that are left out
    """
    num_classes, counted = logits.shape[2], labels >= 0
    target = F.one_hot(labels[counted], num_classes + 1)[:, :-1]  # background: all zeros
    loss = sigmoid_focal_loss_jit(
        logits[counted], target.to(logits.dtype), alpha=alpha, gamma=gamma, reduction="sum"
    )
    return loss / positives(counted & (labels < num_classes))


def box_loss(
    boxes: Tensor, gt_boxes: Tensor, on_objects: Tensor, unit: Tensor, beta: float
) -> Tensor:
    """
    Smooth L1 loss of the four coordinates, divided by the positives.

    Args:
        boxes: (N, R, 4), XYXY in input pixels
        gt_boxes: the same, of which those on objects count
        on_objects: boolean (N, R)
        unit: (R,), in which the distances of each level's boxes are measured, input pixels
        beta: below this distance the loss is quadratic
    """
    units = unit.expand_as(on_objects)[on_objects][:, None]
    found, wanted = boxes[on_objects] / units, gt_boxes[on_objects] / units
    return smooth_l1_loss(found, wanted, beta, reduction="sum") / positives(on_objects)
