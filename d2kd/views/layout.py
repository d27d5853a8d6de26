"""Maps of a level and Detectron2's rows of anchors: reordering, decoding, padding."""

import math
from typing import Any, List, Optional, Sequence, Tuple

import torch
from torch import Tensor


def rows_of_map(x: Tensor, entries: int) -> Tensor:
    """(N, A*entries, Hi, Wi) -> (N, Hi*Wi*A, entries), Detectron2's order of anchors."""
    return x.unflatten(1, (-1, entries)).permute(0, 3, 4, 1, 2).flatten(1, 3)


def map_of_rows(rows: Tensor, like: Tensor) -> Tensor:
    """(N, Hi*Wi*A, entries) -> (N, A*entries, Hi, Wi), the inverse of rows_of_map."""
    maps = rows.unflatten(1, (*like.shape[-2:], -1)).permute(0, 3, 4, 1, 2)
    return maps.flatten(1, 2)


def decode_deltas(
    deltas: Sequence[Tensor], anchors: Sequence[Tensor], box2box_transform: Any
) -> List[Tensor]:
    """
    Args:
        deltas: per level (N, A*4, Hi, Wi)
        anchors: per level (Hi*Wi*A, 4)

    Returns:
        the boxes, XYXY as `anchors`, float32; as `deltas`
    """
    rows = [rows_of_map(x.float(), 4) for x in deltas]  # (N, Hi*Wi*A, 4)
    together = torch.cat(rows, dim=1)  # one decoding for all levels
    repeated = torch.cat(list(anchors)).repeat(len(together), 1)
    boxes = box2box_transform.apply_deltas(together.flatten(0, 1), repeated).view_as(together)
    levels = boxes.split([x.shape[1] for x in rows], dim=1)
    return [map_of_rows(x, like) for x, like in zip(levels, deltas)]


def unaliased(logits: Sequence[Tensor], num_classes: int) -> List[Tensor]:
    """
    Clone the maps that Detectron2's inference would turn into probabilities behind our back.

    It calls sigmoid_() on (N, Hi*Wi*A, K) views of (N, A*K, Hi, Wi) logits. Reordering copies the
    data, except where strides alone can express it: one anchor per cell, a level of one cell, or a
    map with the channels last, as a backbone such as ConvNeXt lets all that come behind it have it.
    """
    copied = [
        x.shape[1] > num_classes and x.shape[2] * x.shape[3] > 1 and x.is_contiguous()
        for x in logits
    ]
    return [x if is_copied else x.clone() for x, is_copied in zip(logits, copied)]


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
