"""RetinaNet and FCOS: detectors that predict at every cell of the pyramid."""

from dataclasses import replace
from typing import Any, FrozenSet, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from .base import DETECTOR_VIEW_REGISTRY, DetectorView
from .info import DetectorInfo
from .parts import ROI_SIZE, DensePredictions, unaliased
from .region_sampler import RegionSampler
from .regions import Regions


class DenseView(DetectorView):
    """A view of RetinaNet, FCOS and what derives from them."""

    members = frozenset({"features", "dense", "roi_features", "regions", "region_vectors"})

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

    def _add_hooks(self, members: FrozenSet[str]) -> List[Any]:
        # What it predicts is where its regions come from.
        dense = {"dense"} if members & {"regions", "region_vectors"} else set()
        return super()._add_hooks(members | dense)

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


for _name in ("RetinaNet", "FCOS"):
    DETECTOR_VIEW_REGISTRY._do_register(_name, DenseView)
