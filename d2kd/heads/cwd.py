from typing import Dict, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable

from ..layers import build_adapters
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import check_temperature
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class CWDHead(nn.Module):
    """
    Channel-Wise Distillation, https://arxiv.org/abs/2011.13256 (exact, as released in MMRazor):
    every channel is a distribution over the cells; follow where the teacher's puts its mass.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    zero_at_equal = True

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair], temperature: float = 1.0):
        """
        Args:
            levels: the pairs of levels to distil
            temperature: divides the features, > 0
        """
        super().__init__()
        self.levels = levels
        self.temperature = temperature
        self.adapter = build_adapters(levels)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # Published, per level, for the pyramids of Faster R-CNN and RetinaNet
        node.LOSS_WEIGHT = 10.0
        # tau
        node.TEMPERATURE = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        check_temperature("DISTILL.CWD.TEMPERATURE", cfg.DISTILL.CWD.TEMPERATURE)
        return {"levels": pair.levels, "temperature": cfg.DISTILL.CWD.TEMPERATURE}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_cwd": {level: scalar}}: temperature^2 KL(teacher || student) between the softmax
            over cells of every channel, averaged over images and channels
        """
        losses = {}
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x, target = self._log_softmax(self.adapter[level](x)), self._log_softmax(target)
            divergence = F.kl_div(x, target.detach(), reduction="sum", log_target=True)
            losses[level] = self.temperature**2 * divergence / (x.shape[0] * x.shape[1])
        return {"loss_cwd": losses}

    def _log_softmax(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, H*W)"""
        return (x.float().flatten(2) / self.temperature).log_softmax(dim=2)
