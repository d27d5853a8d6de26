"""Regions: the boxes on which two detectors are compared."""

from dataclasses import dataclass, field
from typing import List, Optional

import torch
from torch import Tensor

from detectron2.structures import Boxes
from detectron2.utils import comm


@dataclass
class Source:
    """
    Where a dense detector predicted each of R boxes, all (R,) integers.

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
    _counts: List[int] = field(default_factory=list)

    def __len__(self) -> int:
        return sum(len(x) for x in self.boxes)

    @property
    def image(self) -> Tensor:
        """(R,), the index of each region's image in the batch."""
        sizes = torch.tensor([len(x) for x in self.boxes])
        return torch.arange(len(sizes)).repeat_interleave(sizes).to(self.boxes[0].device)

    @property
    def rois(self) -> Tensor:
        """(R, 5) as RoIAlign wants them: index of the image, then the box."""
        boxes = torch.cat([x.tensor for x in self.boxes])
        return torch.cat([self.image[:, None].to(boxes.dtype), boxes], dim=1)

    @property
    def counts(self) -> List[int]:
        """The number of regions in each process. Every process must ask, also one without any."""
        if not self._counts:
            self._counts.extend(_gather_count(len(self), self.boxes[0].device))
        return self._counts

    @property
    def mean_count(self) -> float:
        """
        Regions per process, at least 1: what a mean over regions divides by.

        DistributedDataParallel averages gradients over processes. If each divided by its own number
        of regions, a region would count more where there are few.
        """
        return max(sum(self.counts) / len(self.counts), 1.0)


def _gather_count(count: int, device: torch.device) -> List[int]:
    if comm.get_world_size() == 1:
        return [count]
    counts = torch.zeros(comm.get_world_size(), dtype=torch.int64, device=device)
    counts[comm.get_rank()] = count
    torch.distributed.all_reduce(counts)
    return counts.tolist()
