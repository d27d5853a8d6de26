"""RepPoints: one prediction per cell, with a box that stands for nine points."""

from typing import Any, List, Sequence, Tuple

from torch import Tensor, nn

from .build import DETECTOR_VIEW_REGISTRY
from .dense import DenseView
from .predictions import DensePredictions
from .towers import Towers, rest_of_tower


class RepPointsView(DenseView):
    """
    As of other dense detectors, with the boxes of the refined points. The feature that its
    classifier reads of a cell, `tower`, is the one that is collected at the cell's points.
    """

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        """The classes are read at the points that the given tower for boxes predicts."""
        self._check(f"tower_{depth}")
        head = self.detector.head
        with self._autocast():
            classes = rest_of_tower(head.cls_subnet, depth, towers.classes)
            points = rest_of_tower(head.bbox_subnet, depth, towers.boxes)
            levels = [head.predict(*level) for level in zip(classes, points)]
        logits, boxes, _ = (list(maps) for maps in zip(*levels))
        return DensePredictions(self.pooled_levels, logits, boxes, [])

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        head = self.detector.head
        return head.cls_conv, head, self.pooled_levels

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        logits, boxes, _ = output
        return DensePredictions(self.pooled_levels, list(logits), list(boxes), tower)


DETECTOR_VIEW_REGISTRY._do_register("RepPoints", RepPointsView)
