"""Predictions of a detector, per cell of its pyramid and per region."""

from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence

from torch import Tensor


@dataclass
class DensePredictions:
    """
    What a detector predicts at every cell. A anchors, K classes (1 for an RPN: objectness).

    `logits`: per level (N, A*K, Hi, Wi); `deltas`: per level (N, A*4, Hi, Wi); `tower`: per level
    the last feature of the classification tower, (N, C, Hi, Wi); `centerness`: per level
    (N, 1, Hi, Wi), FCOS only. `levels` names the levels, in the order of all these lists.
    """

    levels: Sequence[str]
    logits: List[Tensor]
    deltas: List[Tensor]
    tower: List[Tensor]
    centerness: Optional[List[Tensor]] = None

    def by_level(self, maps: Sequence[Tensor]) -> Dict[str, Tensor]:
        """One of these lists, or one made from it, by the names of the levels."""
        return dict(zip(self.levels, maps))


@dataclass
class RoIPredictions:
    """
    Predictions of a two-stage detector's box head for R boxes (a cascade: of its first stage, whose
    gradient Detectron2 divides by the number of stages before it reaches a student's pyramid).

    `feature`: last vector before the predictors, (R, D); `deltas`: (R, 4*K), or (R, 4) when
    class-agnostic; `activation`, `logits`: "softmax", (R, K+1) with background last, or "sigmoid",
    (R, K). (Detectron2's layer has a column for background there too, which such a detector neither
    trains nor reads.)
    """

    feature: Tensor
    logits: Tensor
    deltas: Tensor
    activation: str = "softmax"

    def probabilities(self, temperature: float = 1.0) -> Tensor:
        """Of every class, from the logits divided by `temperature`; as `logits`, in float32."""
        logits = self.logits.float() / temperature
        return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(dim=1)
