"""Record of a training step of the Distiller, for monitoring and drawing."""

from dataclasses import dataclass, field
from typing import Any, Dict

from torch import Tensor

from .views import DetectorView

# Level name to a scalar; the key is "" for a loss that is not split by level
ByLevel = Dict[str, Tensor]


@dataclass
class Step:
    """
    `student`, `teacher`: views of the batch; `terms`: for each active head, its unweighted losses
    by level; `maps`: for each head, its maps to draw (see DISTILL_HEAD_REGISTRY).
    """

    student: DetectorView
    teacher: DetectorView
    terms: Dict[str, Dict[str, ByLevel]] = field(default_factory=dict)
    maps: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def losses(self) -> Dict[str, ByLevel]:
        """The losses of all heads."""
        return {key: levels for terms in self.terms.values() for key, levels in terms.items()}
