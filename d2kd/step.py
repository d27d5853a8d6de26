"""A training step of the Distiller, as others explain, measure and draw it."""

from dataclasses import dataclass, field
from typing import Any, Dict

from torch import Tensor

from .views import DetectorView

# Level name to a scalar; "" of a loss that its head does not tell by level
ByLevel = Dict[str, Tensor]


@dataclass
class Step:
    """
    `student`, `teacher`: views of the batch; `terms`: of each head that was on, its losses without
    weight, by level; `maps`: of each head, what it left to be drawn (see DISTILL_HEAD_REGISTRY).
    """

    student: DetectorView
    teacher: DetectorView
    terms: Dict[str, Dict[str, ByLevel]] = field(default_factory=dict)
    maps: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def losses(self) -> Dict[str, ByLevel]:
        """Those of all heads."""
        return {key: levels for terms in self.terms.values() for key, levels in terms.items()}
