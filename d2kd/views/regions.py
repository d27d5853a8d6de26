"""Regions: the boxes on which two detectors are compared."""

from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional, Union

import torch
from torch import Tensor

from detectron2.structures import Boxes
from detectron2.utils import comm


@dataclass
class Source:
    """
    Where a dense detector predicted each of R boxes, all (R,) integers. They are on the CPU: heads
    sort regions by them, and need not wait for a GPU.

    `stride`: of the level, pixels per cell; `y`, `x`: the cell; `anchor`: which of the predictions
    of that cell.
    """

    stride: Tensor
    y: Tensor
    x: Tensor
    anchor: Tensor


@dataclass
class Regions:
    """
    The student's regions of a batch, R in all, image by image.

    `boxes`: one Boxes per image, XYXY in input pixels, without gradient; `source`: None for a
    two-stage student.
    """

    boxes: List[Boxes]
    source: Optional[Source] = None

    def __len__(self) -> int:
        return sum(len(x) for x in self.boxes)

    @cached_property
    def image(self) -> Tensor:
        """(R,), the index of each region's image in the batch."""
        sizes = torch.tensor([len(x) for x in self.boxes])
        image = torch.arange(len(sizes)).repeat_interleave(sizes)
        return image.to(self.boxes[0].device, non_blocking=True)

    @cached_property
    def rois(self) -> Tensor:
        """(R, 5) as RoIAlign wants them: index of the image, then the box."""
        boxes = torch.cat([x.tensor for x in self.boxes])
        return torch.cat([self.image[:, None].to(boxes.dtype), boxes], dim=1)

    @cached_property
    def counts(self) -> Tensor:
        """
        The number of regions in each process, integers. Every process must ask, also one without
        any region.
        """
        counts = torch.zeros(comm.get_world_size(), dtype=torch.int64)
        counts[comm.get_rank()] = len(self)
        if len(counts) > 1:
            counts = counts.to(self.boxes[0].device)
            torch.distributed.all_reduce(counts)
        return counts

    @cached_property
    def mean_count(self) -> Union[float, Tensor]:
        """
        Regions per process, at least 1: what a mean over regions divides by.

        DistributedDataParallel averages gradients over processes. If each divided by its own number
        of regions, a region would count more where there are few.
        """
        if len(self.counts) == 1:
            return max(len(self), 1.0)
        return self.counts.float().mean().clamp(min=1)
