"""Anchors of a cell, and a view of a teacher whose anchors are in the student's order."""

from functools import partial
from typing import Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .base import DetectorView
from .predictions import DensePredictions
from .towers import Towers
from .wrapped import WrappedView

# XYXY in input pixels
Anchor = Tuple[float, ...]


def cell_anchors(generator: nn.Module, levels: Sequence[str]) -> Dict[str, Tuple[Anchor, ...]]:
    """
    Args:
        generator: an anchor generator of Detectron2
        levels: the levels that it serves, in its order

    Returns:
        level name to the A anchors of its first cell, the generator's offset included, in the
        order of the predictions
    """
    maps = [torch.zeros(1, 1, 1, 1) for _ in levels]
    rounded = [[tuple(round(v, 3) for v in x) for x in a.tensor.tolist()] for a in generator(maps)]
    return {level: tuple(anchors) for level, anchors in zip(levels, rounded)}


def anchor_order(ours: Sequence[Anchor], theirs: Sequence[Anchor]) -> Optional[Tuple[int, ...]]:
    """
    The place of each of our anchors among theirs.

    Returns:
        the index in `theirs` of each of `ours`; None where the anchors differ
    """
    if sorted(ours) != sorted(theirs):
        return None
    left = list(enumerate(theirs))
    order: List[int] = []
    for anchor in ours:
        found = next(x for x in left if x[1] == anchor)
        left.remove(found)  # one that is there twice is taken once
        order.append(found[0])
    return tuple(order)


class ReorderedAnchorsView(WrappedView):
    """
    A dense teacher's view with the predictions of each cell in the student's order of anchors.
    Everything else is the view's own.
    """

    def __init__(self, view: DetectorView, orders: Mapping[str, Sequence[int]]):
        """
        Args:
            orders: level of the teacher to the index of each of the student's anchors there; other
                levels stay as they are
        """
        super().__init__(view)
        self._orders = orders

    def dense(self) -> DensePredictions:
        return self._view._once("reordered dense", lambda: self._reordered(self._view.dense()))

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        return self._reordered(self._view.predict_from(depth, towers))

    def boxes(self, deltas: Sequence[Tensor]) -> List[Tensor]:
        """As DetectorView.boxes, of deltas and boxes in the student's order."""
        back = {k: [order.index(i) for i in range(len(order))] for k, order in self._orders.items()}
        levels = self._view.pooled_levels
        boxes = self._view.boxes([_reorder_level(back, k, x) for k, x in zip(levels, deltas)])
        return [_reorder_level(self._orders, k, x) for k, x in zip(levels, boxes)]

    def _reordered(self, dense: DensePredictions) -> DensePredictions:
        return dense.map(partial(_reorder_level, self._orders), ("logits", "deltas"))


def _reorder_level(orders: Mapping[str, Sequence[int]], level: str, x: Tensor) -> Tensor:
    return reorder(x, orders[level]) if level in orders else x


def reorder(x: Tensor, order: Sequence[int]) -> Tensor:
    """(N, A*E, H, W) -> the same with anchor order[i] in place i."""
    by_anchor = x.chunk(len(order), dim=1)
    return torch.cat([by_anchor[i] for i in order], dim=1)
