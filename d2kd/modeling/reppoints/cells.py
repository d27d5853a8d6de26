"""The cells of all levels, R in all, in Detectron2's order: level, row, column."""

from dataclasses import dataclass
from typing import Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Boxes


@dataclass
class Cells:
    """
    `corners`: (R, 2), x and y in input pixels; `strides`: (R,), pixels per cell; `valid`: boolean
    (N, R), the cells on each image. Its sides count as rounded up to what the backbone can divide,
    so only the padding of a batch of unlike images is not valid.
    """

    corners: Tensor
    strides: Tensor
    valid: Tensor


def cells_of(
    anchors: Sequence[Boxes], image_sizes: Sequence[Tuple[int, int]], divisor: int
) -> Cells:
    """
    Args:
        anchors: of each level, squares of one stride around the corners of the cells, (Hi*Wi,)
        image_sizes: (height, width) of each image in pixels, without padding
        divisor: of the backbone
    """
    squares = torch.cat([x.tensor for x in anchors])
    corners, strides = (squares[:, :2] + squares[:, 2:]) / 2, squares[:, 2] - squares[:, 0]
    sizes = torch.tensor(image_sizes).flip(1).to(corners.device, non_blocking=True)
    sizes = (sizes / divisor).ceil() * divisor  # (N, 2), width and height
    valid = (corners[None] < sizes[:, None]).all(dim=2)
    return Cells(corners, strides, valid)
