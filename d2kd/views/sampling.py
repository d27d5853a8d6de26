"""A dense student has no proposals: its regions are a sample of the boxes that it predicts."""

from typing import List, NamedTuple

import torch
from torch import Tensor

from detectron2.layers import batched_nms, nms
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, pairwise_iou

from .base import DetectorView
from .layout import rows_of_map
from .region_sampler import RegionSampler
from .regions import Regions, Source

# Boxes at once in NMS on a GPU, which compares each two of them; torchvision's goes as far.
_MAX_BOXES = 25_000


@torch.no_grad()
def sample_regions(view: DetectorView, sampler: RegionSampler) -> Regions:
    """
    The best predictions of each level by their largest class score (FCOS's centerness is not used),
    decoded, clipped to the image, thinned out level by level, and sampled.

    Ground truth is not among them: it comes from no cell. Nor are the cells of padding.

    The host waits for a GPU twice: until it knows how many boxes are left, and until it has them.
    It draws the sample itself.
    """
    found = _best_predictions(view, sampler.pre_nms_topk)
    side = 1 + max(max(size) for size in view.image_sizes)
    left = _on_host(found, _thin_out(found, side, sampler.nms_thresh))
    image = left.group // len(view.dense().levels)
    chosen: List[Tensor] = []  # rows of the regions, image by image
    for i, inputs in enumerate(view.batched_inputs):
        rows = (image == i).nonzero()[: sampler.post_nms_topk, 0]  # by falling score
        gt_boxes = inputs["instances"].gt_boxes.to(rows.device)
        chosen.append(rows[_subsample(Boxes(left.boxes[rows]), gt_boxes, sampler)])
    rows = torch.cat(chosen)
    boxes = left.boxes[rows].to(found.boxes.device, non_blocking=True)
    boxes = boxes.split([len(x) for x in chosen])
    return Regions([Boxes(x) for x in boxes], _source(view, left.index[rows]))


def _subsample(boxes: Boxes, gt_boxes: Boxes, sampler: RegionSampler) -> Tensor:
    """Indices of a random sample, with a bounded share of positives."""
    labels = torch.zeros(len(boxes), dtype=torch.int64)
    if len(gt_boxes) and len(boxes):
        iou = pairwise_iou(gt_boxes, boxes).amax(dim=0)
        labels = (iou >= sampler.iou_threshold).long()
    return torch.cat(subsample_labels(labels, sampler.per_image, sampler.positive_fraction, 0))


class _Predictions(NamedTuple):
    """
    M predictions of each of N images. `boxes`: (N, M, 4); `scores`: (N, M), -inf where there is no
    box, but padding or something without extent; `group`: (N, M), of each image and level, by
    number; `index`: (N, M), among all anchors of the image in Detectron2's order.
    """

    boxes: Tensor
    scores: Tensor
    group: Tensor
    index: Tensor


def _best_predictions(view: DetectorView, topk: int) -> _Predictions:
    """The best `topk` predictions of every image and level."""
    dense, levels, first = view.dense(), [], 0
    for i, logits in enumerate(dense.logits):
        of_anchors = _scores(view, dense.levels[i], logits)
        scores, index = of_anchors.topk(min(topk, of_anchors.shape[1]), dim=1)
        levels.append((scores, index + first, torch.full_like(index, i)))
        first += of_anchors.shape[1]
    scores, index, level = (torch.cat(x, dim=1) for x in zip(*levels))
    deltas = torch.cat([rows_of_map(x, 4) for x in dense.deltas], dim=1)
    deltas = deltas.gather(1, index[..., None].expand(-1, -1, 4)).flatten(0, 1)
    anchors = view.detector.anchor_generator([view.features[k] for k in dense.levels])
    anchors = torch.cat([x.tensor for x in anchors])[index.flatten()]
    boxes = view.detector.box2box_transform.apply_deltas(deltas.float(), anchors)
    sizes = torch.tensor(view.image_sizes).flip(1).repeat(1, 2)  # width, height, width, height
    limits = sizes.to(boxes, non_blocking=True)[:, None]
    boxes = torch.minimum(boxes.view(*index.shape, 4).clamp(min=0), limits)
    is_box = Boxes(boxes.flatten(0, 1)).nonempty().view_as(scores) & scores.isfinite()
    image = torch.arange(len(index), device=index.device)[:, None]
    return _Predictions(
        boxes, scores.masked_fill(~is_box, -torch.inf), image * len(levels) + level, index
    )


def _scores(view: DetectorView, level: str, logits: Tensor) -> Tensor:
    """(N, A*K, Hi, Wi) -> (N, Hi*Wi*A), the largest of each anchor; -inf for padding"""
    scores = logits.unflatten(1, (view.num_anchors, -1)).amax(dim=2)
    inside = view.inside_image(level, like=logits)
    if inside is not None:
        scores = scores.masked_fill(~inside, -torch.inf)
    return rows_of_map(scores, 1)[..., 0].float()


def _thin_out(found: _Predictions, side: int, threshold: float) -> Tensor:
    """
    Non-maximum suppression within each group.

    Args:
        side: more than any box's

    Returns:
        rows of what is left among the N * M, by falling score within an image
    """
    if found.boxes.device.type == "cpu":
        boxes, scores, group, _ = (x.flatten(0, 1) for x in found)
        rows = (scores > -torch.inf).nonzero()[:, 0]
        return rows[batched_nms(boxes[rows], scores[rows], group[rows], threshold)]
    # batched_nms asks a GPU for its groups, one by one. Far apart, two groups are as good as alone.
    images = max(_MAX_BOXES // found.scores.shape[1], 1)
    rows, first = [], 0
    for boxes, scores, group, _ in zip(*(x.split(images) for x in found)):
        apart = boxes + (side * (group - group[0, 0]))[..., None]
        rows.append(nms(apart.flatten(0, 1), scores.flatten(), threshold) + first)
        first += scores.numel()
    return torch.cat(rows)


def _on_host(found: _Predictions, rows: Tensor) -> _Predictions:
    """These rows of N * M, without dimension N, in one transfer."""
    # Numbers of anchors, below 2^24, are exact in float32.
    columns = [x[..., None] for x in (found.scores, found.group, found.index)]
    table = torch.cat([found.boxes, *columns], dim=2).flatten(0, 1)[rows].cpu()
    table = table[table[:, 4] > -torch.inf]
    scores, group, index = table[:, 4:].unbind(1)
    return _Predictions(table[:, :4], scores, group.long(), index.long())


def _source(view: DetectorView, index: Tensor) -> Source:
    """Where the anchors with these numbers are."""
    dense, anchors = view.dense(), view.num_anchors
    # Of each level: its first anchor, width and stride.
    facts, first = [], 0
    for level, x in zip(dense.levels, dense.logits):
        facts.append((first, x.shape[-1], view.strides[level]))
        first += x.shape[-2] * x.shape[-1] * anchors
    first, width, stride = map(torch.tensor, zip(*facts))
    level = torch.bucketize(index, first, right=True) - 1
    cell, width = (index - first[level]) // anchors, width[level]
    return Source(stride[level], cell // width, cell % width, index % anchors)
