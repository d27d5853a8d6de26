"""RetinaNet and FCOS: detectors that predict at every cell of the pyramid."""

from dataclasses import replace
from functools import partial
from typing import Any, FrozenSet, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from .anchor_labels import AnchorLabels, Listener
from .anchors import cell_anchors
from .base import DETECTOR_VIEW_REGISTRY, DetectorView
from .info import DetectorInfo
from .parts import ROI_SIZE, DensePredictions, map_of_rows, rows_of_map, unaliased
from .region_sampler import RegionSampler
from .regions import Regions
from .towers import Towers, depth_of, hook_towers, predict_from


class DenseView(DetectorView):
    """A view of RetinaNet, FCOS and what derives from them."""

    members = frozenset(
        {"features", "dense", "roi_features", "regions", "region_vectors", "anchor_labels"}
    )

    @classmethod
    def members_of(cls, detector: nn.Module) -> FrozenSet[str]:
        """And "tower_1" to "tower_4", or as many convolutions as its towers have."""
        depths = range(1, depth_of(detector.head) + 1)
        return cls.members | {f"tower_{depth}" for depth in depths}

    @staticmethod
    def num_classes(detector: nn.Module) -> int:
        return detector.num_classes

    @staticmethod
    def num_anchors(detector: nn.Module) -> int:
        return detector.head.cls_score.out_channels // detector.num_classes

    @classmethod
    def info(cls, detector: nn.Module) -> DetectorInfo:
        return replace(
            super().info(detector),
            dense_levels=tuple(detector.head_in_features),
            anchors=cell_anchors(detector.anchor_generator, detector.head_in_features),
            box_weights=tuple(getattr(detector.box2box_transform, "weights", ())),
            vector_channels=detector.head.cls_score.in_channels,
            roi_size=ROI_SIZE,
        )

    def regions(self, sampler: RegionSampler) -> Regions:
        return self._once(sampler, lambda: sampler.sample(self))

    def region_vectors(self, regions: Regions) -> Tensor:
        dense, source, image = self.dense(), regions.source, regions.image
        rows = [(source.stride == self.strides[k]).nonzero()[:, 0] for k in dense.levels]
        vectors = [x[image[i], :, source.y[i], source.x[i]] for x, i in zip(dense.tower, rows)]
        return torch.cat(vectors)[torch.cat(rows).argsort()]  # back in the regions' order

    def anchor_labels(self) -> AnchorLabels:
        """What the student's own loss takes its anchors for; a teacher has none."""
        labels = self._part("anchor_labels")
        num_classes = self.num_classes(self.detector)
        maps = self.dense().deltas
        centerness = self._part("centerness") if _has_centerness(self.detector) else None
        return self._once(
            "anchor_labels", lambda: AnchorLabels.from_lists(labels, maps, num_classes, centerness)
        )

    def towers(self, depth: int) -> Towers:
        """
        The towers of the head after `depth` convolutions, a member called "tower_<depth>".

        Of a teacher whose `reads` do not name it, the head is run once more.
        """
        name = f"tower_{depth}"
        if not self._is_student and name not in self._recorded:
            if name not in self.reads:
                self._recorded.pop("dense", None)
                self.reads = self.reads | {name}
            self.dense()
        return self._part(name)

    def predict_from(self, depth: int, towers: Towers) -> DensePredictions:
        """
        What the rest of this detector's head makes of another's towers after `depth` convolutions,
        with gradient. `tower` of the answer is empty.
        """
        logits, deltas, centerness = predict_from(self.detector.head, depth, towers)
        return DensePredictions(self.pooled_levels(), logits, deltas, [], centerness)

    def boxes(self, deltas: Sequence[Tensor]) -> List[Tensor]:
        """
        Decode box deltas of all levels of `dense`.

        Args:
            deltas: per level (N, A*4, Hi, Wi)

        Returns:
            XYXY in input pixels, of the same shape, float32 also under AMP
        """
        anchors, decoded = self.detector.anchor_generator(list(deltas)), []
        for x, level in zip(deltas, anchors):
            rows = rows_of_map(x.float(), 4)  # (N, Hi*Wi*A, 4)
            repeated = level.tensor.repeat(len(x), 1)
            boxes = self.detector.box2box_transform.apply_deltas(rows.flatten(0, 1), repeated)
            decoded.append(map_of_rows(boxes.view_as(rows), x))
        return decoded

    def _add_hooks(self, members: FrozenSet[str]) -> List[Any]:
        # What it predicts is where its regions come from.
        from_dense = members & {"regions", "region_vectors", "anchor_labels"} or _depths(members)
        handles = super()._add_hooks(members | {"dense"} if from_dense else members)
        if "anchor_labels" in members:
            handles.append(Listener(self.detector, "label_anchors", self._on_labels))
            if _has_centerness(self.detector):
                handles.append(
                    Listener(self.detector, "compute_ctrness_targets", self._on_centerness)
                )
        return handles

    def _on_labels(self, answer: Any) -> None:
        self._keep("anchor_labels", answer[0], answer[0])

    def _on_centerness(self, answer: Tensor) -> None:
        self._keep("centerness", answer, [answer])

    def _hook_dense(self) -> List[Any]:
        handles, head = super()._hook_dense(), self.detector.head
        for depth in _depths(self.reads):
            towers = Towers([], [])
            keep = partial(self._keep_towers, depth, towers)
            handles += hook_towers(head, depth, towers) + [head.register_forward_hook(keep)]
        return handles

    def _keep_towers(self, depth: int, towers: Towers, *_: Any) -> None:
        self._keep(f"tower_{depth}", towers, towers.classes + towers.boxes)

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        head = self.detector.head
        return head.cls_subnet, head, self.pooled_levels()

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        logits, deltas, *centerness = output
        return DensePredictions(
            levels=self.pooled_levels(),
            logits=unaliased(logits, self.num_classes(self.detector)),
            deltas=list(deltas),
            tower=tower,
            centerness=unaliased(centerness[0], 1) if centerness else None,
        )

    def pooled_levels(self) -> Sequence[str]:
        return list(self.detector.head_in_features)


def _has_centerness(detector: nn.Module) -> bool:
    return hasattr(detector, "compute_ctrness_targets")


def _depths(members: FrozenSet[str]) -> List[int]:
    """Of the members called "tower_<depth>"."""
    return sorted(int(x[len("tower_") :]) for x in members if x.startswith("tower_"))


for _name in ("RetinaNet", "FCOS"):
    DETECTOR_VIEW_REGISTRY._do_register(_name, DenseView)
