"""Losses on the teacher's predictions per anchor or region: class probabilities and boxes."""

from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


def difference_weighted(logits: Tensor, target_logits: Tensor) -> Tuple[Tensor, Tensor]:
    """
    Binary cross entropy with the teacher's probabilities, weighted by their distance to the
    student's: |sigmoid(x) - sigmoid(t)| BCE(x, sigmoid(t)). The weight has a gradient, too.

    This is Quality Focal Loss (https://arxiv.org/abs/2006.04388) with exponent 1. It is 0 at equal
    logits and finite for all finite logits.

    Args:
        logits, target_logits: same shape; the target gets no gradient

    Returns:
        the loss and the weight, the latter without gradient; both of the same shape, float32
    """
    logits, target = logits.float(), target_logits.detach().float().sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = (logits.sigmoid() - target).abs()
    return weight * cross_entropy, weight.detach()


def class_divergence(logits: Tensor, target_logits: Tensor, activation: str) -> Tensor:
    """
    Per-class summands of KL(target || student) between class probabilities.

    Args:
        logits, target_logits: (R, K+1), or of sigmoids any shape; the target gets no gradient
        activation: "softmax": one distribution over all classes; "sigmoid": a Bernoulli per class

    Returns:
        shaped as the logits, float32, 0 at equal logits, finite for all finite logits; the sum over
        classes is the divergence, or with sigmoids the sum of the divergences
    """
    x, target = logits.float(), target_logits.detach().float()
    if activation == "softmax":
        x, target = x.log_softmax(dim=1), target.log_softmax(dim=1)
        return F.kl_div(x, target, reduction="none", log_target=True)
    probability = target.sigmoid()
    cross_entropy, entropy = (
        F.binary_cross_entropy_with_logits(v, probability, reduction="none") for v in (x, target)
    )
    return cross_entropy - entropy


def largest_probability(logits: Tensor, num_anchors: int) -> Tensor:
    """(N, A*K, H, W) logits -> (N, A, H, W), the largest class probability of each anchor."""
    return logits.detach().float().unflatten(1, (num_anchors, -1)).amax(dim=2).sigmoid()


def giou_distance(boxes: Tensor, target: Tensor, num_anchors: int) -> Tensor:
    """
    1 - GIoU of each anchor's boxes; 0 where the target box is empty, which FCOS can predict: no box
    overlaps with it, not even an identical one.

    Args:
        boxes, target: (N, A*4, H, W) XYXY; the target gets no gradient

    Returns:
        (N, A, H, W) in [0, 2]
    """
    boxes, target = _per_anchor(boxes, num_anchors), _per_anchor(target.detach(), num_anchors)
    overlap, union = _overlap_and_union(boxes, target)
    low = torch.minimum(boxes[..., :2], target[..., :2])
    high = torch.maximum(boxes[..., 2:], target[..., 2:])
    around = _product(high - low)
    giou = overlap / (union + 1e-7) - (around - union) / (around + 1e-7)
    return (1 - giou) * _has_area(target)


def log_iou_distance(boxes: Tensor, target: Tensor, num_anchors: int) -> Tensor:
    """As giou_distance, with -log(IoU), in [0, 13.8]; no gradient where boxes do not overlap."""
    boxes, target = _per_anchor(boxes, num_anchors), _per_anchor(target.detach(), num_anchors)
    overlap, union = _overlap_and_union(boxes, target)
    iou = overlap / union.clamp(min=1e-7)
    return -iou.clamp(min=1e-6).log() * _has_area(target)


def _per_anchor(boxes: Tensor, num_anchors: int) -> Tensor:
    """(N, A*4, H, W) -> (N, A, H, W, 4)"""
    return boxes.unflatten(1, (num_anchors, 4)).movedim(2, -1)


def _overlap_and_union(boxes: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """Areas of (..., 4) boxes. torchvision's have masks as indices, which wait for the GPU."""
    low = torch.maximum(boxes[..., :2], target[..., :2])
    high = torch.minimum(boxes[..., 2:], target[..., 2:])
    overlap = _product((high - low).relu())  # no gradient where boxes only touch
    areas = [_product(x[..., 2:] - x[..., :2]) for x in (boxes, target)]
    return overlap, areas[0] + areas[1] - overlap


def _product(sides: Tensor) -> Tensor:
    """(..., 2) -> (...); prod() would look for zeros in its backward."""
    return sides[..., 0] * sides[..., 1]


def _has_area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2:] > boxes[..., :2]).all(dim=-1)
