from typing import Dict, FrozenSet, Optional, Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode, configurable
from detectron2.utils import comm

from ..layers import class_divergence, gather_rows, mean_one_softmax
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import SAME_KIND, DistillPair
from ..utils.checks import check_choice, check_temperature
from ..utils.processes import mean_over_processes
from ..views import DetectorView, Regions
from .build import DISTILL_HEAD_REGISTRY

GUIDES = ("features", "logits")


@DISTILL_HEAD_REGISTRY.register()
class MLDHead(nn.Module):
    """
    Masked Logits Distillation, the logits part of https://arxiv.org/abs/2501.07101 (RECONSTRUCTED
    from the abstracts of its two versions; no code was released): imitate the teacher's class
    probabilities where the two detectors differ more than on average.

    Dense pairs compare sigmoids at every cell, two-stage pairs the softmax (or the sigmoids, where
    both detectors have those) of the student's own sampled proposals, from the pass of its
    detection loss.

    Shapes: N images; A anchors, K classes; Hi, Wi height and width of level i; R proposals.
    """

    pairs = SAME_KIND
    requires_logits = True
    class_activations = frozenset({"softmax", "sigmoid"})
    zero_at_equal = True

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        two_stage: bool,
        guide: str = "features",
        mask_temperature: float = 0.5,
        temperature: float = 1.0,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            two_stage: compare the heads on regions, not the dense ones
            guide: what differs, "features" or "logits"
            mask_temperature: of the softmax over differences, > 0
            temperature: of the class distribution of a region, > 0
        """
        super().__init__()
        self.levels = levels
        self.two_stage = two_stage
        self.guide = guide
        self.mask_temperature = mask_temperature
        self.temperature = temperature

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        of_regions = {"regions", "roi_predictions"}
        return frozenset({"features"} | (of_regions if pair.student.two_stage else {"dense"}))

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # gamma: 0.1 for dense detectors, 0.5 for two-stage ones; warm it up (SCHEDULE.WARMUP_ITERS)
        # where the student's head starts from nothing
        node.LOSS_WEIGHT = 0.1
        # "features": where the pyramids differ (version 2); "logits": where the answers do (version
        # 1), which also serves pyramids of unequal channels
        node.GUIDE = "features"
        # tau_D: divides the differences; smaller: fewer cells carry the loss
        node.MASK_TEMPERATURE = 0.5
        # tau_l: of the softmax over classes, two-stage pairs only
        node.TEMPERATURE = 1.0

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.MLD
        check_choice("DISTILL.MLD.GUIDE", node.GUIDE, GUIDES)
        unequal = [p.student for p in pair.levels if p.student_channels != p.teacher_channels]
        if node.GUIDE == "features" and unequal:
            raise ValueError(
                f"DISTILL.MLD.GUIDE is 'features', but student and teacher have other channels at "
                f"{', '.join(unequal)}. Set it to 'logits'."
            )
        check_temperature("DISTILL.MLD.MASK_TEMPERATURE", node.MASK_TEMPERATURE)
        check_temperature("DISTILL.MLD.TEMPERATURE", node.TEMPERATURE)
        return {
            "levels": pair.levels if pair.student.two_stage else pair.dense_levels,
            "two_stage": pair.student.two_stage,
            "guide": node.GUIDE,
            "mask_temperature": node.MASK_TEMPERATURE,
            "temperature": node.TEMPERATURE,
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with logits: dense ones, per level (N, A*K, Hi, Wi), or those of
                the student's sampled proposals, (R, K+1) or, of a sigmoid each, (R, K)

        Returns:
            {"loss_mld": ...}, 0 at equal logits. Dense, {level: scalar}: the weighted sum of the
            divergence of every cell, anchor and class, divided by the number of the teacher's
            positives (sum over anchors of its largest probability, at least 1). Two-stage: the
            weighted mean over proposals of temperature^2 times the divergence. Both are divided by
            a mean over processes.
        """
        self.maps = {"weight": {}}
        loss = self._on_regions if self.two_stage else self._on_cells
        return {"loss_mld": loss(student, teacher)}

    def _on_cells(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        ours, theirs = student.dense(), teacher.dense()
        num_anchors = student.num_anchors
        losses, positives = {}, 0.0
        logits, targets = ours.by_level(ours.logits), theirs.by_level(theirs.logits)
        matched = match_levels(self.levels, logits, targets)
        for pair, (level, x, target) in zip(self.levels, matched):
            x, target = x.float(), target.detach().float()
            inside = student.inside_image(level, like=x)
            if self.guide == "features":
                difference = self._feature_difference(pair, student, teacher)
            else:
                difference = (x.detach().sigmoid() - target.sigmoid()).abs().mean(1, keepdim=True)
            weight = self._weight(difference, inside)  # (N, 1, Hi, Wi)
            losses[level] = binary_divergence(x, target, weight)
            positives = positives + _soft_positives(target, num_anchors, inside)
            self.maps["weight"][level] = weight
        positives = mean_over_processes(positives).clamp(min=1)
        return {level: loss / positives for level, loss in losses.items()}

    def _on_regions(self, student: DetectorView, teacher: DetectorView) -> Tensor:
        regions, ours = student.regions(), student.roi_predictions()
        theirs = teacher.roi_predictions(regions.boxes)
        divergence = class_divergence(
            ours.logits.float() / self.temperature,
            theirs.logits.float() / self.temperature,
            theirs.activation,
        ).sum(dim=1)
        if self.guide == "features":
            for pair in self.levels:
                difference = self._feature_difference(pair, student, teacher)
                inside = student.inside_image(pair.student, like=difference)
                self.maps["weight"][pair.student] = self._weight(difference, inside)
            maps = self.maps["weight"]
            weight = student.mean_in_boxes(maps, regions.boxes)[:, 0]
        else:
            x, target = (p.probabilities(self.temperature).detach() for p in (ours, theirs))
            weight = self._region_weight((x - target).abs().mean(dim=1, keepdim=True), regions)
        return self.temperature**2 * (weight * divergence).sum() / regions.mean_count

    def _feature_difference(
        self, pair: LevelPair, student: DetectorView, teacher: DetectorView
    ) -> Tensor:
        """(N, 1, Hi, Wi): mean over channels of the absolute difference, without gradient."""
        ((_, x, target),) = match_levels([pair], student.features, teacher.features)
        return (x.detach().float() - target.detach().float()).abs().mean(dim=1, keepdim=True)

    def _region_weight(self, difference: Tensor, regions: Regions) -> Tensor:
        """(R, 1) -> (R,), of a softmax over the regions of all processes."""
        everywhere = gather_rows(difference, regions.counts)
        weight = self._weight(everywhere.view(1, 1, 1, -1), None).flatten()
        first = int(regions.counts[: comm.get_rank()].sum())
        return weight[first : first + len(regions)]

    def _weight(self, difference: Tensor, inside: Optional[Tensor]) -> Tensor:
        """Mean-1 softmax of the differences, 0 where it is below 1."""
        weight = mean_one_softmax(difference, self.mask_temperature, inside)
        # Where all differences are equal every weight is 1, but for rounding.
        return weight * (weight > 1 - 1e-5)


def binary_divergence(logits: Tensor, target_logits: Tensor, weight: Tensor) -> Tensor:
    """
    Weighted sum of KL(sigmoid(target_logits) || sigmoid(logits)), finite at any finite logits.

    Its gradient is that of the binary cross entropy with soft targets; what is taken off is the
    smallest value of that, the entropy of the targets.
    """
    target = target_logits.sigmoid()
    cross_entropy, entropy = (
        F.binary_cross_entropy_with_logits(x, target, weight, reduction="sum")
        for x in (logits, target_logits)
    )
    return cross_entropy - entropy


def _soft_positives(logits: Tensor, num_anchors: int, inside: Optional[Tensor]) -> Tensor:
    """Sum over the anchors inside the images of the largest class probability."""
    images, _, height, width = logits.shape
    best = logits.view(images, num_anchors, -1, height, width).amax(dim=2).sigmoid()
    return best.sum() if inside is None else (best * inside).sum()
