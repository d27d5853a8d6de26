"""How much each cell or region counts in MLD, by how far the two detectors differ there."""

from typing import Dict, Optional, Sequence, Tuple

from torch import Tensor

from detectron2.utils import comm

from ..layers import mean_one_softmax
from ..pairing.levels import LevelPair, match_level
from ..utils.processes import gather_rows
from ..views import DetectorView, Regions


class FeatureGuide:
    """Version 2: D is how far the pyramids are from each other, a mean over channels."""

    def __init__(
        self, levels: Sequence[LevelPair], mask_temperature: float, class_temperature: float
    ):
        self.levels = levels
        self.temperature = mask_temperature
        self.class_temperature = class_temperature

    def of_cells(self, pair: LevelPair, student: DetectorView, teacher: DetectorView) -> Tensor:
        """Weights of the cells of a level, (N, 1, Hi, Wi), without gradient."""
        difference = _distance(*match_level(pair, student.features, teacher.features))
        inside = student.inside_image(pair.student, like=difference)
        return _above_average(difference, self.temperature, inside)

    def of_regions(
        self, student: DetectorView, teacher: DetectorView, regions: Regions
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        """
        Returns:
            weights of the regions, (R,), and maps of weights by level, if there are any
        """
        maps = {p.student: self.of_cells(p, student, teacher) for p in self.levels}
        return student.mean_in_boxes(maps, regions.boxes)[:, 0], maps


class LogitGuide(FeatureGuide):
    """Version 1: D is how far the class probabilities are from each other, a mean over classes."""

    def of_cells(self, pair: LevelPair, student: DetectorView, teacher: DetectorView) -> Tensor:
        sides = (view.dense() for view in (student, teacher))
        x, target = match_level(pair, *(x.by_level(x.logits) for x in sides))
        difference = _distance(*(v.detach().float().sigmoid() for v in (x, target)))
        inside = student.inside_image(pair.student, like=x)
        return _above_average(difference, self.temperature, inside)

    def of_regions(
        self, student: DetectorView, teacher: DetectorView, regions: Regions
    ) -> Tuple[Tensor, Dict[str, Tensor]]:
        answers = student.roi_predictions(), teacher.roi_predictions(regions.boxes)
        x, target = (p.probabilities(self.class_temperature) for p in answers)
        # A softmax over the regions of all processes.
        everywhere = gather_rows(_distance(x, target), regions.counts)
        weight = _above_average(everywhere.view(1, 1, 1, -1), self.temperature, None).flatten()
        first = int(regions.counts[: comm.get_rank()].sum())
        return weight[first : first + len(regions)], {}


GUIDES = {"features": FeatureGuide, "logits": LogitGuide}


def _distance(x: Tensor, target: Tensor) -> Tensor:
    """(N, C, ...) -> (N, 1, ...): mean absolute difference over channels, without gradient."""
    return (x.detach().float() - target.detach().float()).abs().mean(dim=1, keepdim=True)


def _above_average(difference: Tensor, temperature: float, inside: Optional[Tensor]) -> Tensor:
    """Mean-1 softmax of the differences, 0 where it is below 1."""
    weight = mean_one_softmax(difference, temperature, inside)
    # Where all differences are equal every weight is 1, but for rounding.
    return weight * (weight > 1 - 1e-5)
