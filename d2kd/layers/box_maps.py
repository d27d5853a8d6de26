"""Draw boxes, and masks, as weight maps over cells, on all levels by the same operators."""

from typing import Iterable, List, Sequence, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Boxes painted at once: 10,000 boxes on a map of 100x168 cells would take 670 MB.
_CHUNK = 256


class Axes:
    """
    The columns and rows of the maps of L levels, T in all, side by side: the columns of the first
    level, its rows, the columns of the second, and so on.

    Attributes:
        cells: (T,), the number of each column and row in its map
    """

    def __init__(self, sizes: Sequence[Tuple[int, int]], device: torch.device):
        """
        Args:
            sizes: height and width of each level
        """
        self.lengths = [n for height, width in sizes for n in (width, height)]
        cells = torch.cat([torch.arange(n) for n in self.lengths])
        axis = torch.arange(len(self.lengths)).repeat_interleave(torch.tensor(self.lengths))
        self.cells, self._axis = torch.stack([cells, axis]).to(device, non_blocking=True)

    def spread(self, x: Tensor) -> Tensor:
        """(M, L, 2), of each level a number for its columns and one for its rows -> (M, T)"""
        return x.flatten(1).index_select(1, self._axis)

    def covered(self, first: Tensor, last: Tensor) -> Tensor:
        """
        Args:
            first, last: (M, L, 2) in cells, X and Y, both included; they may lie outside the map

        Returns:
            boolean (M, T): the cells from first to last
        """
        return (self.cells >= self.spread(first)) & (self.cells <= self.spread(last))

    def bells(self, first: Tensor, last: Tensor) -> Tensor:
        """
        Args:
            first, last: (M, L, 2), the sides of boxes in cells, X and Y

        Returns:
            (M, T): a Gaussian over each box, 1 at its centre, exp(-1/2) at its sides
        """
        middle, half = (first + last) / 2, (last - first).clamp(min=1e-3) / 2
        distance = (self.cells + 0.5 - self.spread(middle)) / self.spread(half)
        return torch.exp(-0.5 * distance.square())

    def paint(self, values: Tensor, image: Tensor, num_images: int) -> List[Tensor]:
        """
        The largest value in each cell over all boxes of an image, where a box's value in a cell is
        the product of its values for the cell's column and row.

        Args:
            values: (M, T), of M boxes, >= 0
            image: (M,), index of each box's image

        Returns:
            of each level (num_images, 1, H, W), 0 where there is no box
        """
        sizes = list(zip(self.lengths[1::2], self.lengths[::2]))
        canvas = values.new_zeros(num_images, sum(h * w for h, w in sizes))
        levels = canvas.split([h * w for h, w in sizes], dim=1)
        levels = [x.unflatten(1, size) for x, size in zip(levels, sizes)]
        for part, own in zip(values.split(_CHUNK), image.split(_CHUNK)):
            axes = part.split(self.lengths, dim=1)
            for level, columns, rows in zip(levels, axes[::2], axes[1::2]):
                level.index_reduce_(0, own, rows[:, :, None] * columns[:, None, :], "amax")
        return [x[:, None] for x in levels]


def touched_cells(
    masks: Tensor, strides: Sequence[int], sizes: Sequence[Tuple[int, int]]
) -> List[Tensor]:
    """
    The cells of each level in which an object has a pixel.

    Args:
        masks: boolean (M, height, width), of M objects in pixels; beyond them there is none
        strides: of the levels, pixels per cell, in any order
        sizes: height and width of their maps

    Returns:
        of each level boolean (M, H, W)
    """
    found, cells, stride = {}, masks.view(torch.uint8), 1  # whose largest is found much faster
    for i in sorted(range(len(strides)), key=strides.__getitem__):
        if strides[i] % stride:
            cells, stride = masks.view(torch.uint8), 1
        # The coarser a level, the more pixels one cell of the level before stands for.
        step, (height, width) = strides[i] // stride, sizes[i]
        short = height * step - cells.shape[1], width * step - cells.shape[2]
        if any(short):
            cells = F.pad(cells, (0, short[1], 0, short[0]))
        cells = cells.unflatten(1, (height, step)).amax(dim=2)
        cells, stride = cells.unflatten(2, (width, step)).amax(dim=3), strides[i]
        found[i] = cells.view(torch.bool)
    return [found[i] for i in range(len(strides))]


def paint_maps(levels: Iterable[Tensor], image: Tensor, num_images: int) -> List[Tensor]:
    """
    As Axes.paint, of objects of any shape.

    Args:
        levels: of each the value of M objects in its cells, (M, H, W), >= 0

    Returns:
        of each level (num_images, 1, H, W), 0 where there is no object
    """
    return [
        x.new_zeros(num_images, *x.shape[1:]).index_reduce_(0, image, x, "amax")[:, None]
        for x in levels
    ]
