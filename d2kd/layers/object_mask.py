"""How much each cell counts, by how far it is from an object."""

import math
from dataclasses import dataclass
from typing import Sequence

import torch
from torch import Tensor

from detectron2.config import CfgNode

from ..utils.checks import check_choice
from .box_maps import covered, gaussian, paint

KINDS = ("values", "gaussian")


def add_object_mask_config(node: CfgNode) -> None:
    """Write the keys into the node of a head."""
    # "values": three, for cells inside a ground-truth box, near it, and far from all; "gaussian":
    # graded, a bell over each box, nowhere below FAR
    node.KIND = "values"
    node.INSIDE = 1.0
    node.NEAR = 0.5
    node.FAR = 0.1
    # Near: inside the box so many times as wide and high about an object
    node.NEAR_FACTOR = 1.5
    # True: an object marks the level that its size belongs to (224 pixels: stride 16); False: all
    node.BY_SIZE = True


@dataclass(frozen=True)
class ObjectMask:
    """Turns ground-truth boxes into a map; see add_object_mask_config for the fields."""

    kind: str = "values"
    inside: float = 1.0
    near: float = 0.5
    far: float = 0.1
    near_factor: float = 1.5
    by_size: bool = True

    @classmethod
    def from_config(cls, key: str, node: CfgNode) -> "ObjectMask":
        """
        Args:
            key: of `node`, for the errors

        Raises:
            ValueError: a value outside its range
        """
        check_choice(f"{key}.KIND", node.KIND, KINDS)
        if not math.inf > node.INSIDE >= node.NEAR >= node.FAR >= 0 or not node.INSIDE > 0:
            raise ValueError(
                f"{key}: INSIDE >= NEAR >= FAR >= 0 and finite INSIDE > 0 are needed, got "
                f"{node.INSIDE}, {node.NEAR} and {node.FAR}."
            )
        if not 1 <= node.NEAR_FACTOR < math.inf:
            raise ValueError(f"{key}.NEAR_FACTOR must be at least 1, got {node.NEAR_FACTOR}.")
        return cls(**{k.lower(): v for k, v in node.items()})

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
