"""What every cell of a batch is to learn, in each of the two stages."""

from typing import List, Tuple

import torch
from torch import Tensor

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Instances

from .cells import Cells
from .matching import match_boxes, match_points


@torch.no_grad()
def init_targets(
    cells: Cells, gt_instances: List[Instances], scale: float
) -> Tuple[Tensor, Tensor]:
    """
    Of the initial points.

    Args:
        scale: the size of box, in strides, at which a level begins

    Returns:
        on objects, boolean (N, R), and the matched ground-truth boxes (N, R, 4)
    """
    index = [
        match_points(x.gt_boxes.tensor, cells.corners, cells.strides, valid, scale)
        for x, valid in zip(gt_instances, cells.valid)
    ]
    boxes = [_chosen(x, i) for x, i in zip(gt_instances, index)]
    return torch.stack(index) >= 0, torch.stack(boxes)


@torch.no_grad()
def refine_targets(
    init_boxes: Tensor,
    cells: Cells,
    gt_instances: List[Instances],
    matcher: Matcher,
    num_classes: int,
) -> Tuple[List[Tensor], Tensor]:
    """
    Of the classes and of the refined points.

    Args:
        init_boxes: (N, R, 4), XYXY in input pixels

    Returns:
        labels of each image, (R,): 0 to K-1, K for background, -1 to ignore; and the matched
        ground-truth boxes (N, R, 4), of which those of objects count
    """
    labels, boxes = [], []
    for found, valid, gt in zip(init_boxes, cells.valid, gt_instances):
        index, label = match_boxes(gt.gt_boxes.tensor, found, valid, matcher)
        classes = torch.full_like(index, num_classes)
        classes[label == 1] = gt.gt_classes[index[label == 1]]
        labels.append(classes.masked_fill(label == -1, -1))
        boxes.append(_chosen(gt, index))
    return labels, torch.stack(boxes)


def _chosen(gt: Instances, index: Tensor) -> Tensor:
    """(R,) -> the boxes of these numbers, (R, 4); any box where there is none."""
    if len(gt):
        return gt.gt_boxes.tensor[index.clamp(min=0)]
    return gt.gt_boxes.tensor.new_zeros(len(index), 4)
