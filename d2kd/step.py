"""Record of a training step of the Distiller, for monitoring and drawing."""

from dataclasses import dataclass, field
from typing import Any, Dict, Sequence

from torch import Tensor

from .views import DetectorView

# Level name to a scalar; the key is "" for a loss that is not split by level
ByLevel = Dict[str, Tensor]


@dataclass
class Step:
    """
    `student`, `teachers`: views of the batch, of teachers one for each of `Distiller.lessons`;
    `terms`: for each active head, its unweighted losses by level; `maps`: for each head, its maps
    to draw (see DISTILL_HEAD_REGISTRY).
    """

    student: DetectorView
    teachers: Sequence[DetectorView]
    terms: Dict[str, Dict[str, ByLevel]] = field(default_factory=dict)
    maps: Dict[str, Dict[str, Any]] = field(default_factory=dict)

    @property
    def teacher(self) -> DetectorView:
        """The first teacher's."""
        return self.teachers[0]

    @property
    def losses(self) -> Dict[str, ByLevel]:
        """The losses of all heads."""
        return {key: levels for terms in self.terms.values() for key, levels in terms.items()}
