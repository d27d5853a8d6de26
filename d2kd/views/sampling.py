"""A dense student has no proposals: its regions are a sample of the boxes that it predicts."""

from typing import List, NamedTuple

import torch
from torch import Tensor

from detectron2.layers import batched_nms
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances, pairwise_iou

from .base import DetectorView
from .region_sampler import RegionSampler
from .regions import Regions, Source


@torch.no_grad()
def sample_regions(view: DetectorView, sampler: RegionSampler) -> Regions:
    """
    The best predictions of each level by their largest class score (FCOS's centerness is not used),
    decoded, clipped to the image, thinned out level by level, and sampled.

    Ground truth is not among them: it comes from no cell. Nor are the cells of padding.
    """
    found = _best_predictions(view, sampler.pre_nms_topk)
    level = found.source[:, 0].unique(return_inverse=True)[1]
    group = found.image * len(view.dense().levels) + level
    keep = batched_nms(found.boxes, found.scores, group, sampler.nms_thresh)
    chosen: List[Tensor] = []  # rows of the regions, image by image
    for i, gt in enumerate(view.gt_instances):
        rows = keep[found.image[keep] == i][: sampler.post_nms_topk]  # by falling score
        chosen.append(rows[_subsample(found.boxes[rows], gt, sampler)])
    source = found.source[torch.cat(chosen)]
    return Regions([Boxes(found.boxes[rows]) for rows in chosen], Source(*source.unbind(1)))


def _subsample(boxes: Tensor, gt: Instances, sampler: RegionSampler) -> Tensor:
    """Indices of a random sample, with a bounded share of positives."""
    labels = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
    if len(gt) and len(boxes):
        iou = pairwise_iou(gt.gt_boxes, Boxes(boxes)).amax(dim=0)
        labels = (iou >= sampler.iou_threshold).long()
    return torch.cat(subsample_labels(labels, sampler.per_image, sampler.positive_fraction, 0))


class _Predictions(NamedTuple):
    """M boxes (M, 4), scores (M,), index of the image (M,), and (M, 4) in the order of Source."""

    boxes: Tensor
    scores: Tensor
    image: Tensor
    source: Tensor


def _best_predictions(view: DetectorView, topk: int) -> _Predictions:
    """The best `topk` predictions of every image and level, without empty boxes."""
    dense = view.dense()
    anchors = view.detector.anchor_generator([view.features[k] for k in dense.levels])
    levels = [
        _best_of_level(view, name, logits, deltas, anchors[i].tensor, topk)
        for i, (name, logits, deltas) in enumerate(zip(dense.levels, dense.logits, dense.deltas))
    ]
    found = _Predictions(*(torch.cat(x) for x in zip(*levels)))
    sizes = torch.tensor(view.image_sizes).flip(1).repeat(1, 2)  # width, height, width, height
    limits = sizes.to(found.boxes, non_blocking=True)[found.image]
    boxes = torch.minimum(found.boxes.clamp(min=0), limits)
    keep = (Boxes(boxes).nonempty() & found.scores.isfinite()).nonzero()[:, 0]
    return _Predictions(*(x[keep] for x in found._replace(boxes=boxes)))


def _best_of_level(
    view: DetectorView, level: str, logits: Tensor, deltas: Tensor, anchors: Tensor, topk: int
) -> _Predictions:
    """
    Args:
        logits, deltas: (N, A*K, Hi, Wi) and (N, A*4, Hi, Wi)
        anchors: (Hi*Wi*A, 4)

    Returns:
        N * min(topk, Hi*Wi*A) predictions; those of padding have the score -inf
    """
    images, _, height, width = logits.shape
    num_anchors = view.num_anchors
    scores = logits.view(images, num_anchors, -1, height, width).amax(dim=2)
    inside = view.inside_image(level, like=logits)
    if inside is not None:
        scores = scores.masked_fill(~inside, -torch.inf)
    # In Detectron2's order of anchors: row, column, prediction of the cell.
    scores = scores.permute(0, 2, 3, 1).flatten(1).float()
    scores, index = scores.topk(min(topk, scores.shape[1]), dim=1)
    deltas = deltas.view(images, num_anchors, 4, height, width).permute(0, 3, 4, 1, 2)
    deltas = deltas.flatten(1, 3).gather(1, index[..., None].expand(-1, -1, 4)).flatten(0, 1)
    image = torch.arange(images, device=index.device).repeat_interleave(index.shape[1])
    index = index.flatten()
    boxes = view.detector.box2box_transform.apply_deltas(deltas.float(), anchors[index])
    cell, anchor = index // num_anchors, index % num_anchors
    stride = torch.full_like(index, view.strides[level])
    source = torch.stack([stride, cell // width, cell % width, anchor], dim=1)
    return _Predictions(boxes, scores.flatten(), image, source)
