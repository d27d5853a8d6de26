"""RetinaNet and FCOS: detectors that predict at every cell of the pyramid."""

from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, FrozenSet, Iterator, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.structures import Instances

from .anchor_labels import AnchorLabels
from .anchors import cell_anchors
from .base import DetectorView
from .build import DETECTOR_VIEW_REGISTRY, find_view
from .detector_info import DetectorInfo
from .layout import unaliased
from .lazy_levels import can_be_put_off, lazy_head
from .predictions import DensePredictions
from .recording import Listener
from .region_sampler import RegionSampler
from .regions import Regions
from .roi_align import ROI_SIZE
from .sampling import sample_regions
from .towers import Towers, depth_of, hook_towers, predict_from

_PROVIDES = frozenset(
    {"features", "dense", "roi_features", "regions", "region_vectors", "anchor_labels"}
)


class DenseView(DetectorView):
    """A view of RetinaNet, FCOS and what derives from them."""

    @property
    def provides(self) -> FrozenSet[str]:
        """And "tower_1" to "tower_4", or as many convolutions as its towers have."""
        towers = {f"tower_{depth}" for depth in range(1, depth_of(self.detector.head) + 1)}
        return _PROVIDES | towers

    @property
    def num_classes(self) -> int:
        return self.detector.num_classes

    @property
    def num_anchors(self) -> int:
        return self.detector.head.cls_score.out_channels // self.detector.num_classes

    @property
    def info(self) -> DetectorInfo:
        detector = self.detector
        box_weights = getattr(detector.box2box_transform, "weights", None)
        return replace(
            super().info,
            dense_levels=tuple(detector.head_in_features),
            anchors=cell_anchors(detector.anchor_generator, detector.head_in_features),
            box_weights=tuple(box_weights or ()),
            anchor_free=box_weights is None,
            vector_channels=detector.head.cls_score.in_channels,
            roi_size=ROI_SIZE,
        )

    @property
    def pooled_levels(self) -> Sequence[str]:
        return list(self.detector.head_in_features)

    def _detections(self) -> List[Instances]:
        with exact_boxes(self.detector):
            return super()._detections()

    def regions(self, sampler: RegionSampler = RegionSampler()) -> Regions:
        return self._once(sampler, lambda: sample_regions(self, sampler))

    def region_vectors(self, regions: Regions) -> Tensor:
        return self._of_boxes(
            "region_vectors", regions.boxes, lambda: self._region_vectors(regions)
        )

    def _region_vectors(self, regions: Regions) -> Tensor:
        dense, source = self.dense(), regions.source
        cells, first = source.x.clone(), 0  # numbers of cells, one level after the other
        for level, x in zip(dense.levels, dense.tower):
            height, width = x.shape[-2:]
            cells += (source.stride == self.strides[level]) * (first + source.y * width)
            first += height * width
        maps = torch.cat([x.flatten(2) for x in dense.tower], dim=2)
        return maps[regions.image, :, cells.to(maps.device, non_blocking=True)]

    def anchor_labels(self) -> AnchorLabels:
        labels = self._part("anchor_labels")
        maps, num_classes = self.dense().deltas, self.num_classes
        centerness = self._part("centerness") if self._has_centerness else None
        return self._once(
            "anchor_labels", lambda: AnchorLabels.from_lists(labels, maps, num_classes, centerness)
        )

    def towers(self, depth: int) -> Towers:
        name = f"tower_{depth}"
        self._check(name)
        if not self._is_student and name not in self._recorded:
            if name not in self.requires:
                self._recorded.pop("dense", None)
                self.requires = self.requires | {name}
            self.dense()
        return self._part(name)

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        self._check(f"tower_{depth}")
        with self._autocast():
            logits, deltas, centerness = predict_from(self.detector.head, depth, towers)
        return DensePredictions(self.pooled_levels, logits, deltas, [], centerness)

    def _add_hooks(self, requires: FrozenSet[str]) -> List[Any]:
        # Its regions, anchors and towers are those of its dense predictions.
        of_dense = {"regions", "region_vectors", "anchor_labels"}
        if requires & of_dense or _depths(requires):
            requires = requires | {"dense"}
        handles = super()._add_hooks(requires)
        if "anchor_labels" in requires:
            detector = self.detector
            handles.append(Listener(detector, "label_anchors", self._on_labels))
            if self._has_centerness:
                handles.append(Listener(detector, "compute_ctrness_targets", self._on_centerness))
        return handles

    def _on_labels(self, answer: Any) -> None:
        self._keep("anchor_labels", answer[0], answer[0])

    def _on_centerness(self, answer: Tensor) -> None:
        self._keep("centerness", answer, [answer])

    def _hook_dense(self) -> List[Any]:
        handles, head = super()._hook_dense(), self.detector.head
        for depth in _depths(self.requires):
            towers = Towers([], [])
            keep = partial(self._keep_towers, depth, towers)
            handles += hook_towers(head, depth, towers) + [head.register_forward_hook(keep)]
        return handles

    def _compute_dense(self) -> DensePredictions:
        head = self.detector.head
        if _depths(self.requires) or not can_be_put_off(head):
            return super()._compute_dense()  # towers are collected as the head runs, whole
        features = self._part("backbone")[1]
        maps = lazy_head(head, [features[k] for k in self.pooled_levels])
        return DensePredictions(
            self.pooled_levels,
            logits=maps["cls_score"],
            deltas=maps["bbox_pred"],
            tower=maps["cls_subnet"],
            centerness=maps.get("ctrness"),
        )

    def _keep_towers(self, depth: int, towers: Towers, *_: Any) -> None:
        self._keep(f"tower_{depth}", towers, towers.classes + towers.boxes)

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        head = self.detector.head
        return head.cls_subnet, head, self.pooled_levels

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        logits, deltas, *centerness = output
        return DensePredictions(
            levels=self.pooled_levels,
            logits=unaliased(logits, self.num_classes),
            deltas=list(deltas),
            tower=tower,
            centerness=unaliased(centerness[0], 1) if centerness else None,
        )

    def _box_coding(self) -> Tuple[nn.Module, Any]:
        return self.detector.anchor_generator, self.detector.box2box_transform

    @property
    def _has_centerness(self) -> bool:
        return hasattr(self.detector, "compute_ctrness_targets")


@contextmanager
def exact_boxes(detector: nn.Module) -> Iterator[None]:
    """
    Inside, a dense detector decodes boxes in float32; others do so by themselves. Detectron2's FCOS
    decodes in the format of the deltas: bfloat16 would round 1010 pixels to 1008.
    """
    if not issubclass(find_view(detector, "teacher"), DenseView):
        yield
        return
    handle = detector.head.register_forward_hook(_in_float32)
    try:
        yield
    finally:
        handle.remove()


def _in_float32(head: nn.Module, inputs: Any, output: Sequence[List[Tensor]]) -> List[Any]:
    return [[x.float() for x in levels] for levels in output]


def _depths(requires: FrozenSet[str]) -> List[int]:
    """Of the words "tower_<depth>"."""
    return sorted(int(x[len("tower_") :]) for x in requires if x.startswith("tower_"))


for _name in ("RetinaNet", "FCOS"):
    DETECTOR_VIEW_REGISTRY._do_register(_name, DenseView)
