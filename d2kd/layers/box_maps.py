"""Draw boxes as weight maps over cells."""

import torch
from torch import Tensor

# Boxes painted at once: 10,000 boxes on a map of 100x168 cells would take 670 MB.
_CHUNK = 256


def paint(rows: Tensor, columns: Tensor, image: Tensor, num_images: int) -> Tensor:
    """
    The largest value in each cell over all boxes of an image, where a box's value in a cell is the
    product of its values for the cell's row and column.

    Args:
        rows, columns: (M, H) and (M, W), values of M boxes, >= 0
        image: (M,), index of each box's image

    Returns:
        (num_images, 1, H, W), 0 where there is no box
    """
    canvas = rows.new_zeros(num_images, rows.shape[1], columns.shape[1])
    for part in zip(rows.split(_CHUNK), columns.split(_CHUNK), image.split(_CHUNK)):
        values = part[0][:, :, None] * part[1][:, None, :]
        canvas.index_reduce_(0, part[2], values, "amax")
    return canvas[:, None]


def covered(first: Tensor, last: Tensor, size: int) -> Tensor:
    """
    Args:
        first, last: (M,) in cells, both included; they may lie outside the map

    Returns:
        (M, size): 1 in the cells from first to last, else 0
    """
    cells = torch.arange(size, device=first.device)
    return ((cells >= first[:, None]) & (cells <= last[:, None])).to(first.dtype)


def gaussian(first: Tensor, last: Tensor, size: int) -> Tensor:
    """
    Args:
        first, last: (M,), the two sides of boxes, in cells

    Returns:
        (M, size): a Gaussian over each box, 1 at its centre, exp(-1/2) at its sides
    """
    centres = torch.arange(size, device=first.device) + 0.5
    middle, half = (first + last) / 2, (last - first).clamp(min=1e-3) / 2
    return torch.exp(-0.5 * ((centres - middle[:, None]) / half[:, None]).square())
