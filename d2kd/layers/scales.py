"""Coarser versions of a map, and the windows it is cut into."""

import math
from typing import Optional, Tuple

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


def to_windows(x: Tensor, count: int) -> Tuple[Tensor, Tensor]:
    """
    Cut a map into count x count windows of equal size, the last ones padded with zeros.

    Args:
        x: (N, C, H, W)

    Returns:
        the windows, (N * count * count, C, h, w); where they hold a part of the map, a boolean
        (N * count * count, 1, h, w)
    """
    images, channels, height, width = x.shape
    h, w = math.ceil(height / count), math.ceil(width / count)
    pad = (0, w * count - width, 0, h * count - height)

    def cut(maps: Tensor) -> Tensor:
        maps = F.pad(maps, pad).view(images, -1, count, h, count, w)
        return maps.permute(0, 2, 4, 1, 3, 5).reshape(images * count * count, -1, h, w)

    return cut(x), cut(x.new_ones(images, 1, height, width)) > 0


def from_windows(windows: Tensor, count: int, size: Tuple[int, int]) -> Tensor:
    """
    Put windows of to_windows together again.

    Args:
        windows: (N * count * count, C, h, w)
        size: (H, W) of the map

    Returns:
        (N, C, H, W)
    """
    total, channels, h, w = windows.shape
    x = windows.view(total // count**2, count, count, channels, h, w).permute(0, 3, 1, 4, 2, 5)
    x = x.reshape(-1, channels, count * h, count * w)
    return x[..., : size[0], : size[1]]
