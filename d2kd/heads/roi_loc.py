from typing import Any, Dict

from torch import Tensor, nn

from detectron2.config import CfgNode

from ..pairing.pair import TWO_STAGE, DistillPair
from ..views import DetectorView
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class RoILocHead(nn.Module):
    """
    Class-aware localisation distillation of G-DetKD, https://arxiv.org/abs/2108.07482
    (RECONSTRUCTED, see SGFIHead): imitate the box that the teacher expects of each proposal, its
    boxes of all classes weighted by its confidence in them. Background has no box, so proposals
    that the teacher takes for background hardly count.

    Shapes: R proposals; K classes.
    """

    loss_weight = 1.0
    pairs = TWO_STAGE
    requires = frozenset({"regions", "roi_predictions"})
    requires_logits = True
    class_activations = frozenset({"softmax", "sigmoid"})
    zero_at_equal = True

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        student, teacher = pair.student.box_weights, pair.teacher.box_weights
        if student != teacher:
            raise ValueError(
                "DISTILL.HEADS: RoILoc compares box deltas, which student and teacher scale "
                f"differently: MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS {student} and {teacher} (of a "
                "cascade: the first of MODEL.ROI_BOX_CASCADE_HEAD.BBOX_REG_WEIGHTS). Train the "
                "student with the teacher's."
            )
        return head_arguments(cls, cfg, pair)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            loss = 1/R sum over r of |sum over k of p_teacher,k (d_teacher,k - d_student,k)|_1

        Args:
            student, teacher: views with deltas (R, 4*K); those of a class-agnostic detector,
                (R, 4), are taken to be the same for every class

        Returns:
            {"loss_roiloc": scalar}, summed over the four coordinates and averaged over proposals
            (of all processes)
        """
        regions = student.regions()
        target = teacher.roi_predictions(regions.boxes)
        confidence = target.probabilities().detach()
        if target.activation == "softmax":
            confidence = confidence[:, :-1]  # (R, K), without background
        theirs = _expected(target.deltas.detach(), confidence)
        ours = _expected(student.roi_predictions().deltas, confidence)
        return {"loss_roiloc": (theirs - ours).abs().sum() / regions.mean_count}


def _expected(deltas: Tensor, confidence: Tensor) -> Tensor:
    """Sum over classes of confidence x deltas: (R, 4*K or 4) and (R, K) -> (R, 4)."""
    deltas = deltas.float().view(len(deltas), deltas.shape[1] // 4, 4)
    return (confidence[:, :, None] * deltas).sum(dim=1)
