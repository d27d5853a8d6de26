"""How much each cell counts, by how far it is from an object."""

import math
from dataclasses import dataclass
from typing import List, Sequence, Tuple

import torch
from torch import Tensor

from detectron2.structures import Instances

from ..layers import Axes, paint_maps
from ..utils.checks import check_choice
from ..views import Regions
from .object_cells import OBJECTS, object_cells

KINDS = ("values", "gaussian")


@dataclass(frozen=True)
class ObjectMask:
    """
    Turns ground truth into a map of each level.

    Attributes:
        kind: "values": three, for cells inside a ground-truth box, near it, and far from all;
            "gaussian": graded, a bell over each box, nowhere below FAR
        inside: value inside a box
        near: value near it
        far: value elsewhere
        near_factor: near: inside the box so many times as wide and high about an object
        by_size: True: an object marks the level that its size belongs to (224 pixels: stride 16);
            False: all
        objects: where an object is: in its "boxes", or, ours, where its "masks" are: INSIDE counts
            in the cells in which it has a pixel then, and NEAR in those of its box, enlarged. That
            needs MODEL.MASK_ON True and KIND "values"
    """

    kind: str = "values"
    inside: float = 1.0
    near: float = 0.5
    far: float = 0.1
    near_factor: float = 1.5
    by_size: bool = True
    objects: str = "boxes"

    def __post_init__(self) -> None:
        check_choice("kind", self.kind, KINDS)
        check_choice("objects", self.objects, OBJECTS)
        if self.objects == "masks" and self.kind == "gaussian":
            raise ValueError("objects is 'masks', but KIND 'gaussian' is a bell over each box.")
        falling = math.inf > self.inside >= self.near >= self.far >= 0
        if not falling or not self.inside > 0:
            raise ValueError(
                "inside must be finite and above 0, and INSIDE >= NEAR >= FAR >= 0 are needed, got "
                f"{self.inside}, {self.near} and {self.far}."
            )
        if not 1 <= self.near_factor < math.inf:
            raise ValueError(f"near_factor must be at least 1, got {self.near_factor}.")

    def __call__(
        self,
        instances: Sequence[Instances],
        strides: Sequence[int],
        sizes: Sequence[Tuple[int, int]],
    ) -> List[Tensor]:
        """
        Args:
            instances: ground truth of N images, M objects in all
            strides: of the levels, pixels per cell
            sizes: height and width of their maps

        Returns:
            of each level (N, 1, H, W)
        """
        regions = Regions([x.gt_boxes for x in instances])
        rois, image = regions.rois, regions.image
        rising = sorted(strides)
        facts = torch.tensor([strides, [rising.index(x) for x in strides]])
        cells, place = facts.to(rois.device, non_blocking=True)
        boxes = rois[:, None, 1:] / cells[:, None]  # (M, L, 4)
        marks = torch.ones_like(boxes[..., 0])  # 0 on the levels that an object does not mark
        if self.by_size:
            marks = (_level_of(rois[:, 1:], rising)[:, None] == place).to(boxes)
        maps = self._of_boxes(boxes, marks, Axes(sizes, rois.device), image, len(instances))
        if self.objects == "masks":
            touched = object_cells(instances, strides, sizes)
            values = (self.inside * marks)[..., None, None].unbind(1)
            inside = paint_maps(map(torch.mul, touched, values), image, len(instances))
            maps = list(map(torch.maximum, inside, maps))
        return [x.clamp(min=self.far) for x in maps]

    def _of_boxes(
        self, boxes: Tensor, marks: Tensor, axes: Axes, image: Tensor, num_images: int
    ) -> List[Tensor]:
        if self.kind == "gaussian":
            spans, value = axes.bells(boxes[..., :2], boxes[..., 2:]), self.inside * marks
        else:  # near the objects and, where masks do not say it, inside them
            parts = [(_enlarged(boxes, self.near_factor), self.near * marks)]
            parts += [(boxes, self.inside * marks)] if self.objects == "boxes" else []
            boxes, value = (torch.cat(x) for x in zip(*parts))
            spans, image = self._spans(axes, boxes), image.repeat(len(parts))
        values = spans * axes.spread(torch.stack([torch.ones_like(value), value], dim=2))
        return axes.paint(values, image, num_images)

    @staticmethod
    def _spans(axes: Axes, boxes: Tensor) -> Tensor:
        first = boxes[..., :2].floor()
        last = torch.maximum(boxes[..., 2:].ceil() - 1, first)  # a box has at least one cell
        return axes.covered(first, last)


def _level_of(boxes: Tensor, strides: Sequence[int]) -> Tensor:
    """(M, 4) -> (M,), index of the level: stride s has boxes of 14 s to 28 s pixels a side."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1).sqrt()
    limits = torch.tensor([14.0 * s for s in strides[1:]]).to(size.device, non_blocking=True)
    return torch.bucketize(size.contiguous(), limits, right=True)


def _enlarged(boxes: Tensor, factor: float) -> Tensor:
    """(..., 4) XYXY about the same centres."""
    first, last = boxes.chunk(2, dim=-1)
    centre, half = (first + last) / 2, (last - first) / 2
    return torch.cat([centre - half * factor, centre + half * factor], dim=-1)
