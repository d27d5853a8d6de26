"""Labels that the student's own loss assigned to its anchors."""

from dataclasses import dataclass
from functools import cached_property
from typing import List, Optional, Sequence

import torch
from torch import Tensor

from ..utils.processes import mean_over_processes


@dataclass
class AnchorLabels:
    """
    The class of every anchor, or of every cell of FCOS, in a batch.

    `maps`: per level integers (N, A, Hi, Wi): 0 to K-1, K for background, -1 for anchors that the
    student's own loss ignores; `num_classes`: K; `centerness`: of FCOS, per level as `maps`, the
    targets of its own loss, defined on objects alone.
    """

    maps: List[Tensor]
    num_classes: int
    centerness: Optional[List[Tensor]] = None

    @classmethod
    def from_lists(
        cls,
        labels: List[Tensor],
        like: Sequence[Tensor],
        num_classes: int,
        centerness: Optional[Tensor] = None,
    ) -> "AnchorLabels":
        """
        Args:
            labels: one per image, (sum of Hi*Wi*A,), in Detectron2's order: level, row, column,
                anchor of the cell
            like: per level a map of the level, (N, channels, Hi, Wi)
            centerness: as the labels, stacked
        """
        maps = _by_level(torch.stack(labels), like)
        return cls(maps, num_classes, None if centerness is None else _by_level(centerness, like))

    @property
    def on_objects(self) -> List[Tensor]:
        """Whether each anchor is on an object; per level boolean (N, A, Hi, Wi)."""
        return [(x >= 0) & (x < self.num_classes) for x in self.maps]

    @cached_property
    def level_positives(self) -> Tensor:
        """(levels,), anchors on objects, averaged over processes: every process must ask."""
        return mean_over_processes(torch.stack([x.sum() for x in self.on_objects]))

    @cached_property
    def mean_positives(self) -> Tensor:
        """
        Anchors on objects, at least 1 in each image as mmdetection counts them, averaged over
        processes: every process must ask.
        """
        of_images = sum(x.flatten(1).sum(dim=1) for x in self.on_objects)
        return mean_over_processes(of_images.clamp(min=1).sum())

    @cached_property
    def mean_centerness(self) -> Tensor:
        """
        Sum of the centerness of the anchors on objects, averaged over processes, at least 1: every
        process must ask.
        """
        maps = zip(self.centerness, self.on_objects)
        return mean_over_processes(sum(x.masked_fill(~on, 0).sum() for x, on in maps)).clamp(min=1)


def _by_level(rows: Tensor, like: Sequence[Tensor]) -> List[Tensor]:
    """(N, sum of Hi*Wi*A) in Detectron2's order -> per level (N, A, Hi, Wi)."""
    sizes = [x.shape[-2:] for x in like]
    anchors = rows.shape[1] // sum(h * w for h, w in sizes)
    levels = rows.split([h * w * anchors for h, w in sizes], dim=1)
    return [x.unflatten(1, (h, w, -1)).permute(0, 3, 1, 2) for x, (h, w) in zip(levels, sizes)]
