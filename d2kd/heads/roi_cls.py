from typing import Dict

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import class_divergence
from ..pairing.pair import TWO_STAGE, DistillPair
from ..utils.checks import check_temperature
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class RoIClsHead(nn.Module):
    """
    Classification distillation of G-DetKD, https://arxiv.org/abs/2108.07482 (RECONSTRUCTED: its
    formula is not known, so Hinton's is taken): imitate the teacher's class probabilities of the
    student's own sampled proposals, in the pass of its detection loss.

    Shapes: R proposals; K classes.
    """

    pairs = TWO_STAGE
    requires = frozenset({"regions", "roi_predictions"})
    requires_logits = True
    class_activations = frozenset({"softmax", "sigmoid"})
    zero_at_equal = True

    @configurable
    def __init__(self, *, temperature: float):
        """
        Args:
            temperature: divides the logits of both, > 0
        """
        super().__init__()
        self.temperature = temperature

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 1.0
        # tau
        node.TEMPERATURE = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        check_temperature("DISTILL.RoICls.TEMPERATURE", cfg.DISTILL.RoICls.TEMPERATURE)
        return {"temperature": cfg.DISTILL.RoICls.TEMPERATURE}

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        Args:
            student, teacher: views with logits (R, K+1), background last, or (R, K) of a sigmoid
                each

        Returns:
            {"loss_roicls": scalar}, temperature^2 KL(teacher || student), summed over classes and
            averaged over proposals
        """
        regions = student.regions()
        ours, theirs = student.roi_predictions(), teacher.roi_predictions(regions.boxes)
        divergence = class_divergence(
            ours.logits.float() / self.temperature,
            theirs.logits.float() / self.temperature,
            theirs.activation,
        )
        return {"loss_roicls": self.temperature**2 * divergence.sum() / regions.mean_count}
