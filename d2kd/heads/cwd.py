from typing import Dict, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import build_adapters
from ..pairing.levels import LevelPair, match_levels
from ..utils.checks import check_temperature
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class CWDHead(nn.Module):
    """
    Channel-Wise Distillation, https://arxiv.org/abs/2011.13256 (exact, as released in MMRazor):
    every channel is a distribution over the cells; follow where the teacher's puts its mass.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: published, per level, for the pyramids of Faster R-CNN and RetinaNet: 10
    """

    loss_weight = 10.0
    zero_at_equal = True

    def __init__(self, *, levels: Sequence[LevelPair], temperature: float = 1.0):
        """
        Args:
            levels: the pairs of levels to distil
            temperature: tau: divides the features, > 0
        """
        super().__init__()
        check_temperature("temperature", temperature)
        self.levels = levels
        self.temperature = temperature
        self.adapter = build_adapters(levels)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            p(X) = softmax over cells of X / tau
            loss = tau^2 / (N Ct) sum over n, c of KL(p(T) || p(adapter(S)))

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_cwd": {level: scalar}}, averaged over images and channels
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
