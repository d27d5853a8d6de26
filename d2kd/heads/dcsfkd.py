from typing import Dict, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import build_adapters, standardise
from ..pairing.levels import LevelPair, match_levels
from ..utils.checks import check_range, check_weight
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DCSFKDHead(nn.Module):
    """
    Dynamic channel-wise and spatial feature distillation, AAAI 2025 (exact, after the authors'
    released code, https://github.com/LinY-ct/DCSF-KD): as PKD, with the student's channels weighed
    by what the teacher's hold on average.

    Only the student's side is weighed, so features that are equal have a loss. With 256 channels
    the weights are about 1.035: close to PKD, whose halved loss it does not halve.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: published, per level: 2, and 1 for FCOS -> RetinaNet in 12 epochs
    """

    loss_weight = 2.0

    def __init__(self, *, levels: Sequence[LevelPair], num_levels: int = 4, spread: float = 9.0):
        """
        Args:
            levels: the pairs of levels to distil, finest first
            num_levels: how many of the pairs to use; 0: all. The published configs use 4
            spread: of the weights of an image's channels, which lie between 1 and 1 + spread and
                have the mean 1 + spread / Ct; 0: PKD
        """
        super().__init__()
        check_range("num_levels", num_levels, 0, float("inf"), "0 is all")
        check_weight("spread", spread)
        self.levels = levels[: num_levels or None]
        self.spread = spread
        # Not in the published method, which needs equal channels; identity where they are equal.
        self.adapter = build_adapters(self.levels)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            S', T' = standardise(adapter(S)), standardise(T)
            w = 1 + spread softmax over c of (mean over cells of T')
            loss = mean over n, c, cells of (w S' - T')^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

        Returns:
            {"loss_dcsfkd": {level: scalar}}: a mean over all elements, summed over levels
        """
        losses = {}
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x, target = standardise(self.adapter[level](x).float()), standardise(target.float())
            weights = 1 + self.spread * target.mean(dim=(2, 3), keepdim=True).softmax(dim=1)
            losses[level] = F.mse_loss(weights * x, target)
        return {"loss_dcsfkd": losses}
