from typing import Any, Dict, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode

from ..layers import (
    difference_weighted,
    each_level,
    giou_distance,
    inside_side_by_side,
    match_side_by_side,
    zero_outside,
)
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DENSE, DistillPair
from ..utils.checks import check_weight
from ..views import DetectorView
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class BCKDHead(nn.Module):
    """
    Difference-weighted logits and boxes, the loss of https://arxiv.org/abs/2308.14286 (exact, after
    the authors' released code): every class of every anchor is a question of yes and no, and counts
    as much as student and teacher disagree on it; so does the box.

    Shapes: N images; A anchors, K classes; Hi, Wi height and width of level i.
    """

    loss_weight = 1.0
    pairs = DENSE
    requires = frozenset({"dense", "anchor_labels"})
    requires_logits = True
    zero_at_equal = True

    def __init__(self, *, levels: Sequence[LevelPair], num_anchors: int, box_weight: float = 4.0):
        """
        Args:
            levels: the pairs of levels on which both predict
            num_anchors: per cell
            box_weight: of the boxes, beside the classes; published: 4
        """
        super().__init__()
        check_weight("box_weight", box_weight)
        self.levels = levels
        self.num_anchors = num_anchors
        self.box_weight = box_weight

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        num_anchors = pair.student.num_anchors
        return head_arguments(cls, cfg, pair, levels=pair.dense_levels, num_anchors=num_anchors)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            d = |p_t - p_s|
            cls = 1/P sum over anchors, k of d BCE(p_s, p_t)
            box = box_weight/P sum over anchors of max_k d (1 - GIoU(B_s, B_t))

        Args:
            student, teacher: views with logits (N, A*K, Hi, Wi), of sigmoid p, and deltas
                (N, A*4, Hi, Wi), which decode to the boxes B

        Returns:
            {"loss_bckd_cls", "loss_bckd_box": {level: scalar}}, summed over the anchors inside the
            images and divided by P, the number of the student's positive anchors, a mean over
            processes; max_k d has no gradient. A level on which no anchor of the batch is positive,
            in any process, has a loss of 0, as in the released code (which asks each process by
            itself).
        """
        ours, theirs, labels = student.dense(), teacher.dense(), student.anchor_labels()
        logits, target_logits = ours.by_level(ours.logits), theirs.by_level(theirs.logits)
        boxes = ours.by_level(student.boxes(ours.deltas))
        target_boxes = theirs.by_level(teacher.boxes(theirs.deltas))
        matched = {k: x for k, x, _ in match_levels(self.levels, logits, target_logits)}
        inside = inside_side_by_side(student, matched)
        classes, differ = difference_weighted(
            *match_side_by_side(self.levels, logits, target_logits)
        )
        differ = differ.unflatten(1, (self.num_anchors, -1)).amax(dim=2)
        distance = giou_distance(
            *match_side_by_side(self.levels, boxes, target_boxes), self.num_anchors
        )
        classes = zero_outside(classes, inside).sum(dim=(0, 1, 2))
        of_boxes = self.box_weight * zero_outside(differ * distance, inside).sum(dim=(0, 1, 2))
        has_positives = (labels.level_positives > 0) / labels.mean_positives
        scale = ours.by_level(has_positives.unbind())
        cls, box = (
            {k: scale[k] * x.sum() for k, x in each_level(cells, matched)}
            for cells in (classes, of_boxes)
        )
        return {"loss_bckd_cls": cls, "loss_bckd_box": box}
