"""The two readings of SAMKD's scales: coarser maps, or windows of one map."""

import math
from typing import Dict, List, NamedTuple, Optional, Type

import torch
from torch import Tensor
from torch.nn import functional as F

from ..layers import AttentionGuide, MaskRule


class Scale(NamedTuple):
    """
    One view of a level.

    Attributes:
        size: by which the map is pooled, or windows along a side of the map
        x: adapted student's features, (N, Ct, H, W)
        target: teacher's features, (N, Ct, H, W)
        inside: (N, 1, H, W), cells that hold a part of their image; None: all do
        area: k^2 where the map is pooled by k, 1 for windows
    """

    size: int
    x: Tensor
    target: Tensor
    inside: Optional[Tensor]
    area: float


class PooledMaps:
    """Version 1: maps that are max-pooled by each size."""

    @staticmethod
    def scale(size: int, x: Tensor, target: Tensor, inside: Optional[Tensor]) -> Scale:
        """Of the whole map, see the fields of :class:`Scale`."""
        blocks = pool_inside(inside, size)
        maps = (max_pool(y, size, inside, blocks) for y in (x, target))
        return Scale(size, *maps, blocks, float(size * size))

    @staticmethod
    def visible(
        scale: Scale, magnitudes: List[Tensor], guide: AttentionGuide, mask: MaskRule
    ) -> Tensor:
        """Cells that the generator sees, (N, 1, H, W), ranked over the whole map."""
        return mask(guide.cells(magnitudes, scale.inside), scale.inside)

    @staticmethod
    def judged(scale: Scale, visible: Tensor) -> Optional[Tensor]:
        """Cells over which the lag of a scale is averaged; None: all."""
        return scale.inside


class Windows(PooledMaps):
    """Version 2, region-wise: whole maps, whose cells are ranked within each of size^2 windows."""

    @staticmethod
    def scale(size: int, x: Tensor, target: Tensor, inside: Optional[Tensor]) -> Scale:
        return Scale(size, x, target, inside, 1.0)

    @staticmethod
    def visible(
        scale: Scale, magnitudes: List[Tensor], guide: AttentionGuide, mask: MaskRule
    ) -> Tensor:
        if scale.size == 1:
            return PooledMaps.visible(scale, magnitudes, guide, mask)
        magnitudes = [y.mean(dim=1, keepdim=True) for y in magnitudes]
        inside = torch.ones_like(magnitudes[0]).bool() if scale.inside is None else scale.inside
        windows = cut_windows(inside, scale.size)  # (N, windows, H, W)
        # Each window as an image of its own, of which nothing else is inside.
        magnitudes = [y.expand_as(windows).flatten(0, 1)[:, None] for y in magnitudes]
        inside = windows.flatten(0, 1)[:, None]
        visible = mask(guide.cells(magnitudes, inside), inside)
        return visible.view_as(windows).any(dim=1, keepdim=True)

    @staticmethod
    def judged(scale: Scale, visible: Tensor) -> Optional[Tensor]:
        # All scales see the same maps, but hide other cells.
        return ~visible if scale.inside is None else scale.inside & ~visible


HIERARCHIES: Dict[str, Type[PooledMaps]] = {"pool": PooledMaps, "window": Windows}


def max_pool(x: Tensor, size: int, inside: Optional[Tensor], blocks: Optional[Tensor]) -> Tensor:
    """
    The largest value of every size x size block; blocks at the border may be smaller.

    Args:
        x: (N, C, H, W)
        inside: (N, 1, H, W), cells that hold a part of their image, which alone count; None: all
        blocks: pool_inside(inside, size), which all maps of a level share

    Returns:
        (N, C, ceil(H / size), ceil(W / size)), 0 where a block has no cell inside
    """
    if size == 1:
        return x
    if inside is None:
        return F.max_pool2d(x, size, ceil_mode=True)
    pooled = F.max_pool2d(x.masked_fill(~inside, -math.inf), size, ceil_mode=True)
    return pooled.masked_fill(~blocks, 0.0)


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
