"""Pieces that views of all families are made of: what a head is given, and how it is cut out."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Dict, List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler

# Cells along a side of RoI features, for detectors that have no box head to say it.
ROI_SIZE = 7


@dataclass
class DensePredictions:
    """
    What a detector predicts at every cell. A anchors, K classes (1 for an RPN: objectness).

    `logits`: per level (N, A*K, Hi, Wi); `deltas`: per level (N, A*4, Hi, Wi); `tower`: per level
    the last feature of the classification tower, (N, C, Hi, Wi); `centerness`: per level
    (N, 1, Hi, Wi), FCOS only. `levels` names the levels, in the order of all these lists.
    """

    levels: Sequence[str]
    logits: List[Tensor]
    deltas: List[Tensor]
    tower: List[Tensor]
    centerness: Optional[List[Tensor]] = None

    def by_level(self, maps: Sequence[Tensor]) -> Dict[str, Tensor]:
        """One of these lists, or one made from it, by the names of the levels."""
        return dict(zip(self.levels, maps))


@dataclass
class RoIPredictions:
    """
    What a two-stage detector's box head says of R boxes (a cascade: its first stage, whose gradient
    Detectron2 divides by the number of stages before it reaches a student's pyramid).

    `feature`: last vector before the predictors, (R, D); `deltas`: (R, 4*K), or (R, 4) when
    class-agnostic; `activation`, `logits`: "softmax", (R, K+1) with background last, or "sigmoid",
    (R, K). (Detectron2's layer has a column for background there too, which such a detector neither
    trains nor reads.)
    """

    feature: Tensor
    logits: Tensor
    deltas: Tensor
    activation: str = "softmax"

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """Of every class, from the logits divided by `temperature`; as `logits`, in float32."""
        logits = self.logits.float() / temperature
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(dim=1)


def unaliased(logits: Sequence[Tensor], num_classes: int) -> List[Tensor]:
    """
    Clone the maps that Detectron2's inference would turn into probabilities behind our back.

    It calls sigmoid_() on (N, Hi*Wi*A, K) views of (N, A*K, Hi, Wi) logits. Reordering copies the
    data, except where strides alone can express it: one anchor per cell, or a level of one cell.
    """
    return [
        x.clone() if x.shape[1] == num_classes or x.shape[2] * x.shape[3] == 1 else x
        for x in logits
    ]


def rows_of_map(x: Tensor, entries: int) -> Tensor:
    """(N, A*entries, Hi, Wi) -> (N, Hi*Wi*A, entries), Detectron2's order of anchors."""
    return x.unflatten(1, (-1, entries)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def map_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(N, Hi*Wi*A, entries) -> (N, A*entries, Hi, Wi), the inverse of rows_of_map."""
    maps = rows.unflatten(1, (*like.shape[-2:], -1)).permute(0, 3, 4, 1, 2)
    return maps.flatten(1, 2)


def cells_inside(
    image_sizes: Sequence[Tuple[int, int]], stride: int, like: Tensor
) -> Optional[Tensor]:
    """
    The cells that hold at least one pixel of their image.

    Args:
        image_sizes: (height, width) of each image in pixels, without padding
        stride: pixels per cell
        like: a map of the level, (N, C, H, W)

    Returns:
        boolean (N, 1, H, W); None: all cells do, found without asking the GPU
    """
    height, width = like.shape[-2:]
    rows = [min(math.ceil(h / stride), height) for h, _ in image_sizes]
    columns = [min(math.ceil(w / stride), width) for _, w in image_sizes]
    if min(rows) == height and min(columns) == width:
        return None
    # Not torch.tensor(..., device=...), which waits until the GPU has done all its queued work.
    limits = torch.tensor([rows, columns]).to(like.device, non_blocking=True)
    below, right = limits[:, :, None]
    in_rows = torch.arange(height, device=like.device) < below
    in_columns = torch.arange(width, device=like.device) < right
    return (in_rows[:, :, None] & in_columns[:, None, :])[:, None]


def roi_align_levels(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    rois: Tensor,
    size: Tuple[int, int],
    sampling_ratio: int = 0,
) -> Tensor:
    """
    RoIAlign of every box on every level, one call for each level.

    Args:
        maps: of L levels, (N, C, Hi, Wi)
        strides: input pixels per cell, of each
        rois: (R, 5), index of the image, then XYXY in input pixels
        size: cells of the result, height and width
        sampling_ratio: points per cell and direction; 0: as many as the box has map cells

    Returns:
        (R, L, C, *size)
    """
    pooled = [
        ROIAlign(size, 1.0 / stride, sampling_ratio, aligned=True)(x, rois)
        for x, stride in zip(maps, strides)
    ]
    return torch.stack(pooled, dim=1)


# RoIAlign has no parameters, so poolers are shared by all views.
@lru_cache(maxsize=None)
def multi_level_pooler(strides: Tuple[int, ...], size: int = ROI_SIZE) -> ROIPooler:
    scales = tuple(1.0 / s for s in strides)
    return ROIPooler(size, scales, sampling_ratio=0, pooler_type="ROIAlignV2")
