"""RoIAlign of boxes, each on the level of its size or on every level."""

from functools import lru_cache
from typing import Dict, List, Mapping, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler, assign_boxes_to_levels
from detectron2.structures import Boxes

from .regions import Regions
from .roi_align_cpu import roi_align_levels_cpu

# Cells along a side of RoI features, for detectors without a box head.
ROI_SIZE = 7


# RoIAlign has no parameters, so poolers are shared by all views.
@lru_cache(maxsize=None)
def multi_level_pooler(strides: Tuple[int, ...], size: int = ROI_SIZE) -> ROIPooler:
    """Of levels with these strides; a box of 224 pixels belongs to stride 16."""
    scales = tuple(1.0 / s for s in strides)
    return ROIPooler(size, scales, sampling_ratio=0, pooler_type="ROIAlignV2")


def roi_align_levels(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    rois: Tensor,
    size: Tuple[int, int],
    sampling_ratio: int = 0,
) -> Tensor:
    """
    RoIAlign of every box on every level.

    Args:
        maps: of L levels, (N, C, Hi, Wi)
        strides: input pixels per cell, of each
        rois: (R, 5), index of the image, then XYXY in input pixels
        size: cells of the result, height and width
        sampling_ratio: points per cell and direction; 0: as many as the box has map cells

    Returns:
        (R, L, C, *size)
    """
    if rois.device.type == "cpu":
        return roi_align_levels_cpu(maps, strides, rois, size, sampling_ratio)
    pooled = [
        ROIAlign(size, 1.0 / stride, sampling_ratio, aligned=True)(x, rois)
        for x, stride in zip(maps, strides)
    ]
    return torch.stack(pooled, dim=1)


def pool_assigned(pooler: ROIPooler, maps: List[Tensor], boxes: List[Boxes]) -> Tensor:
    """
    As pooler(maps, boxes), which waits for a GPU at each level until it knows the boxes that belong
    there. Here a level pools all boxes, those of other levels without extent, at which there is
    next to nothing to compute.

    Args:
        maps: of the pooler's levels, (N, C, Hi, Wi)
        boxes: one Boxes per image, XYXY in input pixels, R in all

    Returns:
        (R, C, S, S), float32 of bfloat16 maps
    """
    maps = float_for_boxes(maps)
    if boxes[0].device.type == "cpu" or type(pooler) is not ROIPooler:
        return pooler(maps, boxes)
    level = assign_boxes_to_levels(
        boxes,
        pooler.min_level,
        pooler.max_level,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )[:, None]
    rois, pooled = Regions(boxes).rois, None
    for i, (x, pool) in enumerate(zip(maps, pooler.level_poolers)):
        own = pool(x, torch.where(level == i, rois, 0.0))
        pooled = own if pooled is None else torch.where(level[..., None, None] == i, own, pooled)
    return pooled


def float_for_boxes(maps: Sequence[Tensor]) -> List[Tensor]:
    """
    Maps as they are, but bfloat16 ones in float32: Detectron2's RoIAlign gives boxes the format of
    its map, and bfloat16 would round 1010 pixels to 1008.
    """
    return [x.float() if x.dtype == torch.bfloat16 else x for x in maps]


def mean_in_boxes(
    maps: Mapping[str, Tensor],
    boxes: List[Boxes],
    pooled_levels: Sequence[str],
    strides: Mapping[str, int],
) -> Tensor:
    """
    Args:
        pooled_levels, strides: of the detector; the others as of DetectorView.mean_in_boxes

    Returns:
        (R, C)
    """
    names = [k for k in pooled_levels if k in maps]
    found: Dict[str, int] = {k: strides[k] for k in names}
    if not names or found[names[-1]] != found[names[0]] * 2 ** (len(names) - 1):
        raise ValueError(
            f"Boxes need maps of neighbouring levels out of {', '.join(pooled_levels)},"
            f" got {', '.join(maps)}. Choose others in DISTILL.LEVELS."
        )
    pooler = multi_level_pooler(tuple(found.values()), size=1)
    return pool_assigned(pooler, [maps[k] for k in names], boxes).flatten(1)
