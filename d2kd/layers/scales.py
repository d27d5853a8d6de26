"""Coarser versions of a map, and the windows it is cut into."""

import math
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F


def max_pool(x: Tensor, size: int, inside: Optional[Tensor] = None) -> Tensor:
    """
    The largest value of every size x size block; blocks at the border may be smaller.

    Args:
        x: (N, C, H, W)
        inside: (N, 1, H, W), cells that hold a part of their image, which alone count; None: all

    Returns:
        (N, C, ceil(H / size), ceil(W / size)), 0 where a block has no cell inside
    """
    if size == 1:
        return x
    if inside is None:
        return F.max_pool2d(x, size, ceil_mode=True)
    pooled = F.max_pool2d(x.masked_fill(~inside, -math.inf), size, ceil_mode=True)
    return pooled.masked_fill(~pool_inside(inside, size), 0.0)


def pool_inside(inside: Optional[Tensor], size: int) -> Optional[Tensor]:
    """As max_pool, for the cells themselves: a block is inside if one of its cells is."""
    if inside is None or size == 1:
        return inside
    return F.max_pool2d(inside.float(), size, ceil_mode=True) > 0


def cut_windows(inside: Tensor, count: int) -> Tensor:
    """
    Cut what each image covers of a map into count x count windows of equal size; those at its lower
    and right border may be smaller, or empty.

    Args:
        inside: boolean (N, 1, H, W), cells that hold a part of their image

    Returns:
        boolean (N, count * count, H, W), the cells of each window, row by row
    """
    # Of each image and not of the map: padding would move the windows.
    rows = inside.any(dim=3, keepdim=True).sum(dim=2, keepdim=True)  # (N, 1, 1, 1)
    columns = inside.any(dim=2, keepdim=True).sum(dim=3, keepdim=True)
    row, column = (
        torch.arange(size, device=inside.device) // ((cells + count - 1) // count).clamp(min=1)
        for size, cells in zip(inside.shape[-2:], (rows, columns))
    )
    window = row.transpose(2, 3) * count + column  # (N, 1, H, W)
    every = torch.arange(count * count, device=inside.device).view(1, -1, 1, 1)
    return (window == every) & inside
