from typing import Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pairing.pair import TWO_STAGE
from ..utils.checks import check_temperature, check_weight
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DKDHead(nn.Module):
    """
    Decoupled Knowledge Distillation, https://arxiv.org/abs/2203.08679 (exact, after the authors'
    released detection code, but finite at any logits): of the class probabilities of the student's
    own sampled proposals, imitate apart how sure the teacher is of the true class, and how it
    shares out the rest among the others.

    Shapes: R proposals; K classes, to which background is added.
    """

    loss_weight = 1.0
    pairs = TWO_STAGE
    requires = frozenset({"regions", "roi_predictions"})
    requires_logits = True
    zero_at_equal = True

    def __init__(
        self,
        *,
        target_weight: float = 1.0,
        non_target_weight: float = 0.25,
        temperature: float = 1.0,
    ):
        """
        Args:
            target_weight: alpha, of the true class (TCKD)
            non_target_weight: beta, of the others (NCKD)
            temperature: tau: divides the logits of both, > 0
        """
        super().__init__()
        check_weight("target_weight", target_weight)
        check_weight("non_target_weight", non_target_weight)
        check_temperature("temperature", temperature)
        self.target_weight = target_weight
        self.non_target_weight = non_target_weight
        self.temperature = temperature

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            p = softmax(z / tau)
            b = (p of the true class, the rest),  q = p of the others / the rest
            target = alpha tau^2 / R sum over r of KL(b_teacher || b_student)
            non_target = beta tau^2 / R sum over r of KL(q_teacher || q_student)

        Args:
            student, teacher: views with logits z (R, K+1), background last

        Returns:
            {"loss_dkd_target", "loss_dkd_non_target": scalar}, averaged over proposals (of all
            processes)
        """
        regions = student.regions()
        labels = torch.cat([x.gt_classes for x in student.sampled_proposals])
        ours = decouple(student.roi_predictions().logits, labels, self.temperature)
        theirs = decouple(teacher.roi_predictions(regions.boxes).logits, labels, self.temperature)
        scale = self.temperature**2 / regions.mean_count
        target, non_target = (
            scale * F.kl_div(x, y.detach(), reduction="sum", log_target=True)
            for x, y in zip(ours, theirs)
        )
        return {
            "loss_dkd_target": self.target_weight * target,
            "loss_dkd_non_target": self.non_target_weight * non_target,
        }


def decouple(logits: Tensor, labels: Tensor, temperature: float) -> Tuple[Tensor, Tensor]:
    """
    Args:
        logits: (R, K+1)
        labels: (R,), the true class of each proposal, K for background

    Returns:
        log-probabilities (R, 2) of the true class and of all others together, and (R, K) of the
        others among themselves. Sums of exponentials are kept as logarithms all the way: as a
        probability, 1 - p of a class at +120 is 0, and its logarithm infinite.
    """
    logits = logits.float() / temperature
    own = labels[:, None]
    rest = torch.arange(logits.shape[1] - 1, device=logits.device).expand(len(logits), -1)
    others = logits.gather(1, rest + (rest >= own))  # all columns but the true class's
    both = torch.cat([logits.gather(1, own), others.logsumexp(dim=1, keepdim=True)], dim=1)
    return both.log_softmax(dim=1), others.log_softmax(dim=1)
