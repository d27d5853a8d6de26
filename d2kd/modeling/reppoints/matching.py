"""Which cells learn which ground-truth box: two rules, one for each stage of the points."""

from typing import Tuple

import torch
from torch import Tensor

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes, pairwise_iou


@torch.no_grad()
def match_points(
    gt_boxes: Tensor, corners: Tensor, strides: Tensor, valid: Tensor, scale: float
) -> Tensor:
    """
    For the initial points: of the level that suits a box's size, the cell nearest to its centre.

    Distances are in widths and heights of the box. Of two boxes with the same nearest cell, the
    nearer one has it.

    Args:
        gt_boxes: (G, 4), XYXY in input pixels
        corners: (R, 2), x and y of the cells of all levels, in input pixels
        strides: (R,), of their levels, in input pixels
        valid: boolean (R,), cells that may be chosen
        scale: the size of box, in strides, at which a level begins

    Returns:
        (R,), index of the box; -1: none
    """
    matched = torch.full_like(strides, -1, dtype=torch.int64)
    if not len(gt_boxes):
        return matched
    size = (gt_boxes[:, 2:] - gt_boxes[:, :2]).clamp(min=1e-6)
    shift = (corners[:, None] - (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2) / size
    allowed = valid[:, None] & (strides[:, None] == level_strides(size, strides, scale))
    distance = shift.norm(dim=2).masked_fill(~allowed, torch.inf)  # (R, G)
    nearest, cell = distance.min(dim=0)
    claims = torch.full_like(distance, torch.inf)
    claims[cell, torch.arange(len(cell), device=cell.device)] = nearest
    nearest, box = claims.min(dim=1)
    return torch.where(nearest.isfinite(), box, matched)


def level_strides(size: Tensor, strides: Tensor, scale: float) -> Tensor:
    """
    The stride of the level on which each box is learnt.

    Args:
        size: (G, 2), widths and heights, in input pixels
        strides: of the levels, powers of 2
        scale: as in match_points

    Returns:
        (G,), the largest that is at most sqrt(width * height) / scale, if there is one
    """
    exponent = (size / scale).log2().mean(dim=1).floor()
    # Rounded, as strides are compared by ==, and a GPU's exp2 need not be exact.
    return exponent.exp2().round().clamp(strides.min(), strides.max())


@torch.no_grad()
def match_boxes(
    gt_boxes: Tensor, boxes: Tensor, valid: Tensor, matcher: Matcher
) -> Tuple[Tensor, Tensor]:
    """
    For the classes and the refined points: by the IoU of the initial points' boxes.

    Also the best box of a ground truth whose IoUs are all low is labelled 1; not of one that
    overlaps with no box, of which all would be the best.

    Args:
        gt_boxes: (G, 4), XYXY in input pixels
        boxes: (R, 4), the same
        valid: boolean (R,), boxes that may be chosen

    Returns:
        index of the ground-truth box, (R,), and the label 1, 0, or -1 to ignore, (R,), as of the
        matcher; -1 where not valid
    """
    iou = pairwise_iou(Boxes(gt_boxes), Boxes(boxes[valid]))
    overlapped = (iou > 0).any(dim=1).nonzero()[:, 0]
    index, label = matcher(iou[overlapped])
    index = overlapped[index] if len(overlapped) else index
    indices, labels = (torch.full_like(valid, x, dtype=torch.int64) for x in (0, -1))
    indices[valid], labels[valid] = index, label.long()
    return indices, labels
