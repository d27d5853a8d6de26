from math import ceil
from typing import Any, Dict, Iterator, Sequence, Tuple

from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode

from ..layers import build_adapters, standardise
from ..pairing.levels import LevelPair, make_pair, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice, check_range
from ..views import DetectorView
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class PKDHead(nn.Module):
    """
    Distillation by Pearson correlation, https://arxiv.org/abs/2207.02039 (exact, after the
    authors' released code): bring every channel of both pyramids to zero mean and unit variance,
    then compare. That is invariant to a channel's scale, so unlike detectors can be paired.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: published, per level: 6 for a two-stage student, 10 for a dense one of the same
            kind as its teacher, 6 for Mask R-CNN -> RetinaNet
    """

    loss_weight = 6.0
    zero_at_equal = True

    def __init__(self, *, levels: Sequence[LevelPair], match: str = "stride", num_levels: int = 4):
        """
        Args:
            levels: the pairs of levels to distil, finest first
            match: "stride": pair levels of equal stride (equal strides see equal objects);
                "index": the first with the first, and so on, the student's maps resized to the
                teacher's; what the published configs do
            num_levels: how many of the pairs to use; 0: all. The published configs use 4
        """
        super().__init__()
        check_choice("match", match, ("stride", "index"))
        check_range("num_levels", num_levels, 0, float("inf"), "0 is all")
        self.levels = levels[: num_levels or None]
        self.resize = match == "index"
        # Not in the published method, which needs equal channels; identity where they are equal.
        self.adapter = build_adapters(self.levels)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        levels = pair.levels
        if cfg.DISTILL.PKD.MATCH == "index":
            if cfg.DISTILL.LEVELS:
                raise ValueError(
                    f"DISTILL.PKD.MATCH is 'index', but DISTILL.LEVELS names pairs: "
                    f"{list(cfg.DISTILL.LEVELS)}. Leave one of the two out."
                )
            levels = _pair_by_index(pair, cfg.DISTILL.ADAPT_EQUAL_CHANNELS)
        return head_arguments(cls, cfg, pair, levels=levels)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            loss = 1/2 mean over n, c, cells of (standardise(T) - standardise(adapter(S)))^2
                 = mean over c of (1 - Pearson's r) (m - 1)/m,  m = N*Hi*Wi

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_pkd": {level: scalar}}: a mean over all elements, summed over levels
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
            (p.student, *_same_part(p, student.features[p.student], teacher.features[p.teacher]))
            for p in self.levels
        )


def _same_part(pair: LevelPair, x: Tensor, target: Tensor) -> Tuple[Tensor, Tensor]:
    """Crop the maps of a pair of whatever strides to the pixels that both cover."""
    shorter = [
        min(a * pair.student_stride, b * pair.teacher_stride)
        for a, b in zip(x.shape[-2:], target.shape[-2:])
    ]
    (a, b), (c, d) = (
        [ceil(size / stride) for size in shorter]
        for stride in (pair.student_stride, pair.teacher_stride)
    )
    return x[..., :a, :b], target[..., :c, :d]


def _pair_by_index(pair: DistillPair, adapt_equal: bool) -> Tuple[LevelPair, ...]:
    student, teacher = pair.student.shapes, pair.teacher.shapes
    finest_first = (sorted(x, key=lambda k, x=x: x[k].stride) for x in (student, teacher))
    return tuple(make_pair(s, t, student, teacher, adapt_equal) for s, t in zip(*finest_first))
