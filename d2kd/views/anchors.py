"""Anchors of a cell, and a view of a teacher whose anchors are in the student's order."""

from dataclasses import replace
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
        return self._by_level(self._view.boxes(self._by_level(deltas, back)), self._orders)

    def _reordered(self, dense: DensePredictions) -> DensePredictions:
        return replace(
            dense,
            logits=self._by_level(dense.logits, self._orders),
            deltas=self._by_level(dense.deltas, self._orders),
        )

    def _by_level(
        self, maps: Sequence[Tensor], orders: Mapping[str, Sequence[int]]
    ) -> List[Tensor]:
        levels = self._view.pooled_levels
        return [reorder(x, orders[k]) if k in orders else x for k, x in zip(levels, maps)]


def reorder(x: Tensor, order: Sequence[int]) -> Tensor:
    """(N, A*E, H, W) -> the same with anchor order[i] in place i."""
    by_anchor = x.chunk(len(order), dim=1)
    return torch.cat([by_anchor[i] for i in order], dim=1)
