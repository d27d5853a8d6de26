from typing import Dict, Iterator, Sequence, Tuple

from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable

from ..layers import build_adapters, standardise
from ..pairing.levels import LevelPair, make_pair, match_levels
from ..pairing.pair import DistillPair
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class PKDHead(nn.Module):
    """
    Distillation by Pearson correlation, https://arxiv.org/abs/2207.02039 (exact, after the
    authors' released code): bring every channel of both pyramids to mean 0 and deviation 1, then
    compare. What a channel's magnitude is does not matter, so unlike detectors can be paired.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    zero_at_equal = True

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair], resize: bool):
        """
        Args:
            levels: the pairs of levels to distil
            resize: bring the student's maps to the teacher's size (for pairs of unequal stride)
        """
        super().__init__()
        self.levels = levels
        self.resize = resize
        # Not in the published method, which needs equal channels; identity where they are equal.
        self.adapter = build_adapters(levels)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # Published, per level: 6 for a two-stage student, 10 for a dense one of the same kind as
        # its teacher, 6 for Mask R-CNN -> RetinaNet.
        node.LOSS_WEIGHT = 6.0
        # "stride": levels of equal stride (d2kd's default: equal strides see equal objects).
        # "index": first with first, and so on, resized; what the published configs do.
        node.MATCH = "stride"
        # How many of the pairs to use, finest first; 0: all. The published configs use 4.
        node.NUM_LEVELS = 4

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        match, num_levels = cfg.DISTILL.PKD.MATCH, cfg.DISTILL.PKD.NUM_LEVELS
        if match not in ("stride", "index"):
            raise ValueError(f"DISTILL.PKD.MATCH must be 'stride' or 'index', got {match!r}.")
        if num_levels < 0:
            raise ValueError(f"DISTILL.PKD.NUM_LEVELS must be 0 (all) or more, got {num_levels}.")
        if match == "index" and cfg.DISTILL.LEVELS:
            raise ValueError(
                f"DISTILL.PKD.MATCH is 'index', but DISTILL.LEVELS names pairs: "
                f"{list(cfg.DISTILL.LEVELS)}. Leave one of the two out."
            )
        levels = pair.levels if match == "stride" else _pair_by_index(pair)
        return {"levels": levels[: num_levels or None], "resize": match == "index"}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_pkd": {level: scalar}}: half the squared difference of the standardised
            features, mean over all elements: (1 - Pearson's r)(m - 1)/m, averaged over channels,
            of m = N*Hi*Wi values each. Sum over levels.
        """
        losses = {}
        for level, x, target in self._matched(student, teacher):
            x = self.adapter[level](x).float()
            if self.resize and x.shape[-2:] != target.shape[-2:]:
                x = F.interpolate(x, target.shape[-2:], mode="bilinear", align_corners=False)
            losses[level] = F.mse_loss(standardise(x), standardise(target.float())) / 2
        return {"loss_pkd": losses}

    def _matched(
        self, student: DetectorView, teacher: DetectorView
    ) -> Iterator[Tuple[str, Tensor, Tensor]]:
        if not self.resize:
            return match_levels(self.levels, student.features, teacher.features)
        return (
            (p.student, student.features[p.student], teacher.features[p.teacher])
            for p in self.levels
        )


def _pair_by_index(pair: DistillPair) -> Tuple[LevelPair, ...]:
    student, teacher = pair.student.shapes, pair.teacher.shapes
    finest_first = (sorted(x, key=lambda k, x=x: x[k].stride) for x in (student, teacher))
    return tuple(make_pair(s, t, student, teacher) for s, t in zip(*finest_first))
