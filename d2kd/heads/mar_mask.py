"""How much each cell counts, by how far it is from an object."""

import math
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from ..layers import covered, gaussian, paint
from ..utils.checks import check_choice

KINDS = ("values", "gaussian")


@dataclass(frozen=True)
class ObjectMask:
    """
    Turns ground-truth boxes into a map.

    Attributes:
        kind: "values": three, for cells inside a ground-truth box, near it, and far from all;
            "gaussian": graded, a bell over each box, nowhere below FAR
        inside: value inside a box
        near: value near it
        far: value elsewhere
        near_factor: near: inside the box so many times as wide and high about an object
        by_size: True: an object marks the level that its size belongs to (224 pixels: stride 16);
            False: all
    """

    kind: str = "values"
    inside: float = 1.0
    near: float = 0.5
    far: float = 0.1
    near_factor: float = 1.5
    by_size: bool = True

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        falling = math.inf > self.inside >= self.near >= self.far >= 0
        if not falling or not self.inside > 0:
            raise ValueError(
                "inside must be finite and above 0, and INSIDE >= NEAR >= FAR >= 0 are needed, got "
                f"{self.inside}, {self.near} and {self.far}."
            )
        if not 1 <= self.near_factor < math.inf:
            raise ValueError(f"near_factor must be at least 1, got {self.near_factor}.")

    def __call__(
        self, rois: Tensor, stride: int, strides: Sequence[int], shape: Sequence[int]
    ) -> Tensor:
        """
        Args:
            rois: (M, 5) ground truth, index of the image, then the box XYXY in input pixels
            stride: of the level to draw, pixels per cell
            strides: of all levels, rising
            shape: of a map of the level, (N, C, H, W)

        Returns:
            (N, 1, H, W)
        """
        if self.by_size:
            rois = rois[_level_of(rois[:, 1:], strides) == strides.index(stride)]
        image, boxes = rois[:, 0].long(), rois[:, 1:] / stride
        draw = self._bells if self.kind == "gaussian" else self._values
        return paint(*draw(image, boxes, shape), shape[0]).clamp(min=self.far)

    def _bells(self, image: Tensor, boxes: Tensor, shape: Sequence[int]):
        left, top, right, bottom = boxes.unbind(dim=1)
        rows = self.inside * gaussian(top, bottom, shape[2])
        return rows, gaussian(left, right, shape[3]), image

    def _values(self, image: Tensor, boxes: Tensor, shape: Sequence[int]):
        boxes = torch.cat([boxes, _enlarged(boxes, self.near_factor)])
        value = torch.full_like(boxes[:, :1], self.inside)
        value[len(image) :] = self.near
        first = boxes[:, :2].floor()
        last = torch.maximum(boxes[:, 2:].ceil() - 1, first)  # a box has at least one cell
        columns, rows = (covered(first[:, i], last[:, i], shape[3 - i]) for i in range(2))
        return rows * value, columns, image.repeat(2)


def _level_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """(M, 4) -> (M,), index of the level: stride s has boxes of 14 s to 28 s pixels a side."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    limits = torch.tensor([14.0 * s for s in strides[1:]]).to(size.device, non_blocking=True)
    return torch.bucketize(size.contiguous(), limits, right=True)


def _enlarged(boxes: Tensor, factor: float) -> Tensor:
    """(M, 4) XYXY about the same centres."""
    centre, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    return torch.cat([centre - half * factor, centre + half * factor], dim=1)
