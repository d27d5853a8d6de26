"""Predictions of a detector, per cell of its pyramid and per region."""

from dataclasses import dataclass
from functools import partial
from typing import Callable, Dict, List, Optional, Sequence, Union

from torch import Tensor

from .lazy_levels import Later

PARTS = ("logits", "deltas", "tower", "centerness")
Maps = Sequence[Union[Tensor, Later]]


class DensePredictions:
    """
    What a detector predicts at every cell. A anchors, K classes (1 for an RPN: objectness).

    `logits`: per level (N, A*K, Hi, Wi); `deltas`: per level (N, A*4, Hi, Wi); `tower`: per level
    the last feature of the classification tower, (N, C, Hi, Wi); `centerness`: per level
    (N, 1, Hi, Wi), of FCOS, else None. `levels` names the levels, in the order of all these lists.
    """

    def __init__(
        self,
        levels: Sequence[str],
        logits: Maps,
        deltas: Maps,
        tower: Maps,
        centerness: Optional[Maps] = None,
    ):
        """
        Args:
            logits, deltas, tower, centerness: maps; those that are still to be computed are when
                their list is first read
        """
        self.levels = levels
        self._parts = dict(zip(PARTS, (logits, deltas, tower, centerness)))

    @property
    def logits(self) -> List[Tensor]:
        return self._read("logits")

    @property
    def deltas(self) -> List[Tensor]:
        return self._read("deltas")

    @property
    def tower(self) -> List[Tensor]:
        return self._read("tower")

    @property
    def centerness(self) -> Optional[List[Tensor]]:
        return None if self._parts["centerness"] is None else self._read("centerness")

    def by_level(self, maps: Sequence[Tensor]) -> Dict[str, Tensor]:
        """One of these lists, or one made from it, by the names of the levels."""
        return dict(zip(self.levels, maps))

    def map(
        self, function: Callable[[str, Tensor], Tensor], parts: Sequence[str] = PARTS
    ) -> "DensePredictions":
        """The same with the maps of some lists after a function of level and map."""
        changed = {
            name: [_after(x, partial(function, level)) for level, x in zip(self.levels, maps)]
            for name, maps in self._parts.items()
            if name in parts and maps is not None
        }
        return DensePredictions(self.levels, **{**self._parts, **changed})

    @property
    def computed(self) -> List[str]:
        """The lists that are there, for a head has read them or what is computed from them."""
        return [k for k, x in self._parts.items() if x is not None and all(map(_is_there, x))]

    def _read(self, part: str) -> List[Tensor]:
        return [x() if isinstance(x, Later) else x for x in self._parts[part]]


def _is_there(x: Union[Tensor, Later]) -> bool:
    return not isinstance(x, Later) or x.is_there


def _after(x: Union[Tensor, Later], function: Callable[[Tensor], Tensor]) -> Union[Tensor, Later]:
    return x.then(function) if isinstance(x, Later) else function(x)


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
