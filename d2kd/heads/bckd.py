from typing import Dict, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import difference_weighted, giou_distance
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DENSE, DistillPair
from ..utils.checks import check_weight
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class BCKDHead(nn.Module):
    """
    Difference-weighted logits and boxes, the loss of https://arxiv.org/abs/2308.14286 (exact, after
    the authors' released code): every class of every anchor is a question of yes and no, and counts
    as much as student and teacher disagree on it; so does the box.

    Shapes: N images; A anchors, K classes; Hi, Wi height and width of level i.
    """

    pairs = DENSE
    requires = frozenset({"dense", "anchor_labels"})
    requires_logits = True
    zero_at_equal = True

    @configurable
    def __init__(self, *, levels: Sequence[LevelPair], num_anchors: int, box_weight: float = 4.0):
        """
        Args:
            levels: the pairs of levels on which both predict
            num_anchors: per cell
            box_weight: of the boxes, beside the classes
        """
        super().__init__()
        self.levels = levels
        self.num_anchors = num_anchors
        self.box_weight = box_weight

    @staticmethod
    def add_config(node: CfgNode) -> None:
        node.LOSS_WEIGHT = 1.0
        # Of the boxes, beside the classes; published: 4
        node.BOX_WEIGHT = 4.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        check_weight("DISTILL.BCKD.BOX_WEIGHT", cfg.DISTILL.BCKD.BOX_WEIGHT)
        return {
            "levels": pair.dense_levels,
            "num_anchors": pair.student.num_anchors,
            "box_weight": cfg.DISTILL.BCKD.BOX_WEIGHT,
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with logits (N, A*K, Hi, Wi) and deltas (N, A*4, Hi, Wi)

        Returns:
            {"loss_bckd_cls", "loss_bckd_box": {level: scalar}}, summed over the anchors inside the
            images (and classes) and divided by the number of the student's positive anchors, a mean
            over processes. cls: |p_t - p_s| BCE(p_s, p_t); box: box_weight times max_c |p_t - p_s|,
            without gradient, times 1 - GIoU of the decoded boxes. A level on which no anchor of the
            batch is positive, in any process, has a loss of 0, as in the released code (which asks
            each process by itself).
        """
        ours, theirs = student.dense(), teacher.dense()
        boxes = ours.by_level(student.boxes(ours.deltas))
        targets = theirs.by_level(teacher.boxes(theirs.deltas))
        logits, target_logits = ours.by_level(ours.logits), theirs.by_level(theirs.logits)
        matched = zip(
            match_levels(self.levels, logits, target_logits),
            match_levels(self.levels, boxes, targets),
        )
        labels = student.anchor_labels()
        counts = dict(zip(ours.levels, labels.level_positives > 0))
        losses: Dict[str, Dict[str, Tensor]] = {"loss_bckd_cls": {}, "loss_bckd_box": {}}
        for (level, x, target), (_, box, target_box) in matched:
            inside = student.inside_image(level, like=x)
            inside = 1.0 if inside is None else inside
            classes, differ = difference_weighted(x, target)
            differ = differ.unflatten(1, (self.num_anchors, -1)).amax(dim=2)
            distance = giou_distance(box, target_box, self.num_anchors)
            scale = counts[level] / labels.mean_positives
            losses["loss_bckd_cls"][level] = scale * (classes * inside).sum()
            losses["loss_bckd_box"][level] = (
                self.box_weight * scale * (differ * distance * inside).sum()
            )
        return losses
