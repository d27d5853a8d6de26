"""From predictions to detections."""

from typing import List, Tuple

import torch
from torch import Tensor

from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances


def detect(
    scores: List[Tensor],
    boxes: List[Tensor],
    image_size: Tuple[int, int],
    score_thresh: float,
    topk: int,
    nms_thresh: float,
    max_detections: int,
) -> Instances:
    """
    Detections of one image: the best of each level, clipped, without duplicates of their class.

    Args:
        scores: per level (Hi*Wi, K), 0 to 1
        boxes: per level (Hi*Wi, 4), XYXY in input pixels
        image_size: (height, width)
        score_thresh: detections have more
        topk: predictions, of a box and a class, that are kept on each level before NMS
        nms_thresh: IoU
        max_detections: kept after NMS

    Returns:
        with pred_boxes, scores and pred_classes, by falling score
    """
    best = [_best(x, y, score_thresh, topk) for x, y in zip(scores, boxes)]
    found, score, classes = (torch.cat(x) for x in zip(*best))
    clipped = Boxes(found)
    clipped.clip(image_size)
    keep = batched_nms(clipped.tensor, score, classes, nms_thresh)[:max_detections]
    return Instances(
        image_size, pred_boxes=clipped[keep], scores=score[keep], pred_classes=classes[keep]
    )


def _best(
    scores: Tensor, boxes: Tensor, score_thresh: float, topk: int
) -> Tuple[Tensor, Tensor, Tensor]:
    cell, classes = (scores > score_thresh).nonzero().unbind(dim=1)
    score, order = scores[cell, classes].sort(descending=True)
    order = order[:topk]
    return boxes[cell[order]], score[:topk], classes[order]
