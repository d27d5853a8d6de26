"""What a dense student's anchors are, as its own loss was told."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Callable, List, Sequence

import torch
from torch import Tensor, nn

from ..processes import mean_over_processes


@dataclass
class AnchorLabels:
    """
    The class of every anchor, or cell of FCOS, of a batch.

    `maps`: per level integers (N, A, Hi, Wi): 0 to K-1, K for background, -1 for anchors that the
    student's own loss leaves out; `num_classes`: K.
    """

    maps: List[Tensor]
    num_classes: int

    @classmethod
    def from_lists(
        cls, labels: List[Tensor], like: Sequence[Tensor], num_classes: int
    ) -> "AnchorLabels":
        """
        Args:
            labels: one per image, (sum of Hi*Wi*A,), in Detectron2's order: level, row, column,
                anchor of the cell
            like: per level a map of the level, (N, channels, Hi, Wi)
        """
        stacked = torch.stack(labels)
        sizes = [x.shape[-2:] for x in like]
        anchors = stacked.shape[1] // sum(h * w for h, w in sizes)
        levels = stacked.split([h * w * anchors for h, w in sizes], dim=1)
        maps = [x.unflatten(1, (h, w, -1)).permute(0, 3, 1, 2) for x, (h, w) in zip(levels, sizes)]
        return cls(maps, num_classes)

    @cached_property
    def mean_positives(self) -> Tensor:
        """Anchors on objects, a mean over processes, at least 1. Every process must ask."""
        positives = [((x >= 0) & (x < self.num_classes)).sum() for x in self.maps]
        return mean_over_processes(sum(positives)).clamp(min=1)


class Listener:
    """Until removed, hands on what a method of a module returns; the module notices nothing."""

    def __init__(self, owner: nn.Module, method: str, listen: Callable[[Any], None]):
        self.owner, self.method = owner, method
        original = getattr(owner, method)

        def heard(*args: Any, **kwargs: Any) -> Any:
            answer = original(*args, **kwargs)
            listen(answer)
            return answer

        setattr(owner, method, heard)

    def remove(self) -> None:
        delattr(self.owner, self.method)
