from typing import Dict, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import ReviewFusion, pyramid_error
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import MAX_CHANNELS, check_range
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class ReviewKDHead(nn.Module):
    """
    Knowledge Review, https://arxiv.org/abs/2104.09044 (exact, after the authors' released detection
    code): walk the student's pyramid from coarse to fine, join each level with what the coarser
    ones gave, and compare what comes out with the teacher's level at several scales.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair], mid_channels: int = 256):
        """
        Args:
            levels: the pairs of levels to distil
            mid_channels: of what is handed on from level to level
        """
        super().__init__()
        # In the released code by position; strides say the same and cannot be out of order.
        self.levels = sorted(levels, key=lambda p: p.student_stride, reverse=True)
        self.fusion = nn.ModuleDict(
            {
                p.student: ReviewFusion(p.student_channels, mid_channels, p.teacher_channels, i > 0)
                for i, p in enumerate(self.levels)
            }
        )

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # Published: RetinaNet R50 1.0; Faster R-CNN R18 1.2, R50 1.0, MobileNetV2 2.0; Mask R-CNN
        # R18 1.5, R50 0.8, MobileNetV2 1.0
        node.LOSS_WEIGHT = 1.0
        node.MID_CHANNELS = 256

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        channels = cfg.DISTILL.ReviewKD.MID_CHANNELS
        check_range("DISTILL.ReviewKD.MID_CHANNELS", channels, 1, MAX_CHANNELS)
        return {"levels": pair.levels, "mid_channels": channels}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_reviewkd": {level: scalar}}: weighted mean of the mean squared errors at four
            scales (pyramid_error), which is summed over levels
        """
        losses, gathered = {}, None
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x, gathered = self.fusion[level](x, gathered)
            losses[level] = pyramid_error(x, target)
        return {"loss_reviewkd": losses}
