from typing import Any, Dict, FrozenSet, Sequence

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode

from ..layers import (
    difference_weighted,
    each_level,
    giou_distance,
    inside_side_by_side,
    largest_probability,
    log_iou_distance,
    match_side_by_side,
    side_by_side,
    standardise,
    std_and_mean,
    zero_outside,
)
from ..pairing.levels import LevelPair, crop_to, match_levels
from ..pairing.pair import DENSE, DistillPair
from ..utils.checks import check_choice, check_weight
from ..views import DetectorView, Towers
from .keys import head_arguments
from .registry import DISTILL_HEAD_REGISTRY

BOX_LOSSES = {"giou": giou_distance, "log_iou": log_iou_distance}


@DISTILL_HEAD_REGISTRY.register()
class CrossKDHead(nn.Module):
    """
    Cross-head distillation, https://arxiv.org/abs/2306.11369 (exact, written from its equations;
    what counts, and what is divided by, after the authors' released code): what the student's head
    has made of its features by half way is handed to the rest of the teacher's head; the
    predictions which come out there imitate the teacher's. The student's own predictions are left
    to the ground truth.

    Shapes: N images; A anchors, K classes; C channels of the towers; Hi, Wi of level i.

    Attributes:
        loss_weight: published for RetinaNet: 1; FCOS: 0.4 for the classes and 0.75 for the boxes,
            which is LOSS_WEIGHT 0.4 and BOX_WEIGHT 1.875
    """

    loss_weight = 1.0
    pairs = DENSE
    requires_logits = True
    zero_at_equal = True

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        num_anchors: int,
        depth: int = 3,
        box_loss: str = "giou",
        box_weight: float = 1.0,
    ):
        """
        Args:
            levels: the pairs of levels on which both predict
            num_anchors: per cell
            depth: i, convolutions of the student's towers before the teacher's take over; RetinaNet
                3 (of 4), FCOS 2
            box_loss: "giou", 1 - GIoU (RetinaNet), or "log_iou", -log(IoU) (FCOS)
            box_weight: of the boxes, beside the classes
        """
        super().__init__()
        check_choice("box_loss", box_loss, sorted(BOX_LOSSES))
        check_weight("box_weight", box_weight)
        self.levels = levels
        self.num_anchors = num_anchors
        self.depth = depth
        self.box_loss = box_loss
        self.box_weight = box_weight

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        return frozenset({"dense", "anchor_labels", f"tower_{cfg.DISTILL.CrossKD.DEPTH}"})

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        student, teacher = pair.student, pair.teacher
        strides = [[x.shapes[k].stride for k in x.dense_levels] for x in (student, teacher)]
        if strides[0] != strides[1]:
            raise ValueError(
                "DISTILL.HEADS: CrossKD hands each level on to the teacher's head, but the student "
                f"predicts at the strides {strides[0]} and the teacher at {strides[1]}."
            )
        if student.vector_channels != teacher.vector_channels:
            raise ValueError(
                "DISTILL.HEADS: CrossKD puts the student's tower into the teacher's head, but the "
                f"student's has {student.vector_channels} channels and the teacher's "
                f"{teacher.vector_channels} (MODEL.FPN.OUT_CHANNELS). BCKD takes such a pair."
            )
        return head_arguments(
            cls, cfg, pair, levels=pair.dense_levels, num_anchors=student.num_anchors
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            q, B_q = teacher's head from layer i on, of the student's towers at layer i
            cls = 1/D sum over anchors, k of |p - q| BCE(q, p)
            box = box_weight/D sum over anchors of max_k p distance(B_q, B)

        Args:
            student, teacher: views with towers (N, C, Hi, Wi), logits (N, A*K, Hi, Wi), of sigmoid
                p, and deltas (N, A*4, Hi, Wi), which decode to the boxes B

        Returns:
            {"loss_crosskd_cls", "loss_crosskd_box": {level: scalar}}. RetinaNet: summed over the
            anchors inside the images that its own loss does not ignore, and divided by the number
            of positive ones. FCOS: summed over all cells, padding too, and divided by the
            centerness of the positive ones, summed (at least 1; the released code explodes without
            any). Divisors are means over processes.
        """
        ours, theirs, labels = student.dense(), teacher.dense(), student.anchor_labels()
        crossed = teacher.predict_from(self.depth, self._aligned(student, teacher))
        logits, target_logits = ours.by_level(crossed.logits), theirs.by_level(theirs.logits)
        boxes = ours.by_level(teacher.boxes(crossed.deltas))
        target_boxes = theirs.by_level(teacher.boxes(theirs.deltas))
        label_maps = ours.by_level(labels.maps)
        of_fcos = labels.centerness is not None
        divisor = labels.mean_centerness if of_fcos else labels.mean_positives
        matched = {k: x for k, x, _ in match_levels(self.levels, logits, target_logits)}
        counted = side_by_side([crop_to(label_maps[k], x) for k, x in matched.items()]) >= 0
        if not of_fcos:
            counted = zero_outside(counted, inside_side_by_side(student, matched))
        x, target = match_side_by_side(self.levels, logits, target_logits)
        classes, _ = difference_weighted(x, target)
        classes = classes.unflatten(1, (self.num_anchors, -1)).sum(dim=2) * counted
        weight = largest_probability(target, self.num_anchors) * counted
        distance = BOX_LOSSES[self.box_loss](
            *match_side_by_side(self.levels, boxes, target_boxes), self.num_anchors
        )
        cells = classes / divisor, self.box_weight / divisor * (distance * weight)
        cls, box = (
            {k: part.sum() for k, part in each_level(x.sum(dim=(0, 1, 2)), matched)} for x in cells
        )
        return {"loss_crosskd_cls": cls, "loss_crosskd_box": box}

    def _aligned(self, student: DetectorView, teacher: DetectorView) -> Towers:
        """The student's towers, with the mean and deviation of the teacher's in every channel."""
        ours, theirs = student.towers(self.depth), teacher.towers(self.depth)
        return Towers(
            [_align(x, y) for x, y in zip(ours.classes, theirs.classes)],
            [_align(x, y) for x, y in zip(ours.boxes, theirs.boxes)],
        )


def _align(x: Tensor, like: Tensor) -> Tensor:
    """(N, C, H, W) each; sizes may differ."""
    std, mean = std_and_mean(like.detach().float())
    return torch.addcmul(mean, standardise(x.float()), std)
