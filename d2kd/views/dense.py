"""RetinaNet and FCOS: detectors that predict at every cell of the pyramid."""

from typing import Any, List, Sequence, Tuple

from torch import Tensor, nn

from .base import DETECTOR_VIEW_REGISTRY, DetectorView
from .parts import DensePredictions, unaliased


class DenseView(DetectorView):
    """A view of RetinaNet, FCOS and what derives from them."""

    members = frozenset({"features", "dense", "roi_features"})

    @staticmethod
    def num_classes(detector: nn.Module) -> int:
        return detector.num_classes

    @staticmethod
    def num_anchors(detector: nn.Module) -> int:
        return detector.head.cls_score.out_channels // detector.num_classes

    def _dense_head(self) -> Tuple[nn.Module, nn.Module, Sequence[str]]:
        head = self.detector.head
        return head.cls_subnet, head, self._pooled_levels()

    def _dense_predictions(self, output: Sequence[Any], tower: List[Tensor]) -> DensePredictions:
        logits, deltas, *centerness = output
        return DensePredictions(
            levels=self._pooled_levels(),
            logits=unaliased(logits, self.num_classes(self.detector)),
            deltas=list(deltas),
            tower=tower,
            centerness=unaliased(centerness[0], 1) if centerness else None,
        )

    def _pooled_levels(self) -> Sequence[str]:
        return list(self.detector.head_in_features)


for _name in ("RetinaNet", "FCOS"):
    DETECTOR_VIEW_REGISTRY._do_register(_name, DenseView)
