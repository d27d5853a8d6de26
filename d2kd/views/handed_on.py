"""A teacher that runs on another device, or in another format, than the student."""

from functools import partial
from typing import Any, Callable, List, Mapping, Optional, Sequence

import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from .base import DetectorView
from .ground_truth import ground_truth
from .map_tensors import map_tensors
from .predictions import DensePredictions, RoIPredictions
from .regions import Regions
from .towers import Towers
from .wrapped import WrappedView


class HandedOnView(WrappedView):
    """
    A teacher's view whose answers are on the student's device and contiguous, and float32 where the
    teacher has a precision of its own. What it is asked about is handed to the teacher likewise.
    """

    def __init__(self, view: DetectorView, device: torch.device, dtype: Optional[torch.dtype]):
        """
        Args:
            device: the student's
            dtype: of answers and of what is asked about; None: as they are
        """
        super().__init__(view)
        self._device, self._dtype = device, dtype
        self._teacher_device = next(view.detector.parameters()).device

    @property
    def features(self) -> Mapping[str, Tensor]:
        ask = partial(self._ask, getattr, self._view, "features")
        return self._view._once("features handed on", ask)

    @property
    def gt_instances(self) -> List[Instances]:
        ask = partial(ground_truth, self._view.batched_inputs, self._device)
        return self._view._once("gt_instances handed on", ask)

    def detections(self) -> List[Instances]:
        return [x.to(self._device) for x in self._view.detections()]

    def inside_image(self, level: str, like: Optional[Tensor] = None) -> Optional[Tensor]:
        return self._view.inside_image(level, self.features[level] if like is None else like)

    def dense(self) -> DensePredictions:
        return self._view._once("dense handed on", partial(self._ask, self._view.dense))

    def boxes(self, deltas: Sequence[Tensor]) -> List[Tensor]:
        return self._ask(self._view.boxes, self._given(deltas))

    def towers(self, depth: int) -> Towers:
        ask = partial(self._ask, self._view.towers, depth)
        return self._view._once(f"tower_{depth} handed on", ask)

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        given = Towers(self._given(towers.classes), self._given(towers.boxes))
        return self._ask(self._view.predict_from, depth, given)

    def roi_features(self, boxes: List[Boxes]) -> Tensor:
        return self._ask_of_boxes("roi_features", boxes, self._view.roi_features)

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        return self._ask_of_boxes("roi_predictions", boxes, self._view.roi_predictions)

    def mask_logits(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        return self._ask_of_boxes("mask_logits", boxes, self._view.mask_logits)

    def mask_features(self, boxes: Optional[List[Boxes]] = None) -> Tensor:
        return self._ask_of_boxes("mask_features", boxes, self._view.mask_features)

    def region_vectors(self, regions: Regions) -> Tensor:
        def ask(boxes: List[Boxes]) -> Tensor:
            return self._view.region_vectors(Regions(boxes, regions.source))

        return self._ask_of_boxes("region_vectors", regions.boxes, ask)

    def _ask(self, ask: Callable[..., Any], *args: Any) -> Any:
        # A level that nobody reads keeps the function that it waits for. With this view in it that
        # were a circle: all maps of the step would wait for Python's garbage collector.
        device, dtype = self._device, self._dtype
        return map_tensors(lambda x: x.to(device, dtype).contiguous(), ask(*args))

    def _ask_of_boxes(
        self, name: str, boxes: List[Boxes], ask: Callable[[List[Boxes]], Any]
    ) -> Any:
        once = self._view._of_boxes
        own = once("given boxes", boxes, lambda: list(map(Boxes, self._given(_tensors(boxes)))))
        return once(f"{name} handed on", boxes, lambda: self._ask(ask, own))

    def _given(self, tensors: Sequence[Tensor]) -> List[Tensor]:
        """As the teacher takes them, with gradient."""
        return [x.to(self._teacher_device, self._dtype) for x in tensors]


def _tensors(boxes: Sequence[Boxes]) -> List[Tensor]:
    return [x.tensor for x in boxes]
