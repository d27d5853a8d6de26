from typing import Dict

from torch import Tensor, nn

from ..layers import class_divergence
from ..pairing.pair import TWO_STAGE
from ..utils.checks import check_temperature
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class RoIClsHead(nn.Module):
    """
    Classification distillation of G-DetKD, https://arxiv.org/abs/2108.07482 (RECONSTRUCTED: its
    formula is not known, so Hinton's is taken): imitate the teacher's class probabilities of the
    student's own sampled proposals, in the pass of its detection loss.

    Shapes: R proposals; K classes.
    """

    loss_weight = 1.0
    pairs = TWO_STAGE
    requires = frozenset({"regions", "roi_predictions"})
    requires_logits = True
    class_activations = frozenset({"softmax", "sigmoid"})
    zero_at_equal = True

    def __init__(self, *, temperature: float = 1.0):
        """
        Args:
            temperature: tau: divides the logits of both, > 0
        """
        super().__init__()
        check_temperature("temperature", temperature)
        self.temperature = temperature

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            p = softmax(z / tau)
            loss = tau^2 / R sum over r of KL(p_teacher || p_student)

        Args:
            student, teacher: views with logits z (R, K+1), background last, or (R, K) of a sigmoid
                each

        Returns:
            {"loss_roicls": scalar}, summed over classes and averaged over proposals (of all
            processes)
        """
        regions = student.regions()
        ours, theirs = student.roi_predictions(), teacher.roi_predictions(regions.boxes)
        divergence = class_divergence(
            ours.logits.float() / self.temperature,
            theirs.logits.float() / self.temperature,
            theirs.activation,
        )
        return {"loss_roicls": self.temperature**2 * divergence.sum() / regions.mean_count}
