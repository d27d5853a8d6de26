from typing import Dict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import class_divergence
from ..pairing.pair import TWO_STAGE
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class RoIMaskHead(nn.Module):
    """
    Imitate the teacher's masks of objects (OUR OWN: no paper's; Hinton's divergence for each pixel
    of a mask): of the proposals on which the student trains its masks, in the class of their label.
    The gradient at a pixel is the difference between the two probabilities.

    Shapes: R proposals of objects; K classes; M x M cells of the student's masks.
    """

    loss_weight = 1.0
    pairs = TWO_STAGE
    requires = frozenset({"mask_logits"})
    requires_logits = True
    zero_at_equal = True

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        """
        ::

            p = sigmoid(z), z of the class of the label
            loss = 1/R sum over r of mean over cells of KL(Bernoulli(p_t) || Bernoulli(p_s))

        A teacher's mask of another resolution is interpolated: both cover the box.

        Args:
            student, teacher: views with mask logits z (R, K, M, M), or (R, 1, M, M); objects of a
                class that the teacher does not know count as 0

        Returns:
            {"loss_roimask": scalar}, averaged over cells and proposals (of all processes)
        """
        regions = student.mask_regions
        classes = torch.cat([x.gt_classes for x in student.mask_proposals])
        ours, theirs = student.mask_logits(), teacher.mask_logits(regions.boxes).detach()
        if theirs.shape[2:] != ours.shape[2:]:
            theirs = F.interpolate(
                theirs.float(), size=ours.shape[2:], mode="bilinear", align_corners=False
            )
        known = classes < student.num_classes
        x, target = (_of_classes(z, classes * known) for z in (ours, theirs))
        divergence = class_divergence(x, target, "sigmoid").flatten(1).mean(dim=1)
        return {"loss_roimask": (divergence * known).sum() / regions.mean_count}


def _of_classes(logits: Tensor, classes: Tensor) -> Tensor:
    """(R, K, M, M), or (R, 1, M, M), and (R,) -> (R, M, M)"""
    if logits.shape[1] == 1:
        return logits[:, 0]
    index = classes[:, None, None, None].expand(-1, 1, *logits.shape[2:])
    return logits.gather(1, index)[:, 0]
