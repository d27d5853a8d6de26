"""RetinaNet and FCOS: detectors that predict at every cell of the pyramid."""

from typing import Any, FrozenSet, List, Sequence

from torch import nn

from .base import DETECTOR_VIEW_REGISTRY, DetectorView
from .parts import DensePredictions, unaliased


class DenseView(DetectorView):
    """A view of RetinaNet, FCOS and what derives from them."""

    members = frozenset({"features", "dense", "roi_features"})

    @staticmethod
    def num_classes(detector: nn.Module) -> int:
        return detector.num_classes

    def _add_hooks(self, members: FrozenSet[str]) -> List[Any]:
        handles = super()._add_hooks(members)
        if "dense" in members:
            handles += self._hook_head()
        return handles

    def _hook_head(self) -> List[Any]:
        """Collect the tower's output, once per level, then the head's predictions."""
        tower, head = [], self.detector.head

        def on_tower(module, inputs, output):
            tower.append(output)

        def on_head(module, inputs, output):
            predictions = self._predictions(output, list(tower))
            self._keep("dense", predictions, predictions.logits + predictions.deltas)
            tower.clear()

        return [
            head.cls_subnet.register_forward_hook(on_tower),
            head.register_forward_hook(on_head),
        ]

    def _compute_dense(self) -> DensePredictions:
        features = [self.features[k] for k in self._pooled_levels()]
        handles = self._hook_head()
        try:
            self.detector.head(features)
        finally:
            for handle in handles:
                handle.remove()
        return self._recorded["dense"]

    def _predictions(self, output: Sequence[Any], tower: List[Any]) -> DensePredictions:
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
