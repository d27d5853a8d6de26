from typing import Any, Dict, FrozenSet, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode

from ..layers import class_divergence, largest_probability, zero_outside
from ..pairing.levels import LevelPair, match_level
from ..pairing.pair import SAME_KIND, DistillPair
from ..utils.checks import check_choice, check_temperature
from ..utils.processes import mean_over_processes
from ..views import DetectorView
from .keys import head_arguments
from .mld_guides import GUIDES
from .registry import DISTILL_HEAD_REGISTRY


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

    Attributes:
        loss_weight: gamma: 0.1 for dense detectors, 0.5 for two-stage ones; warm it up
            (SCHEDULE.WARMUP_ITERS) where the student's head starts from nothing
    """

    loss_weight = 0.1
    pairs = SAME_KIND
    requires_logits = True
    class_activations = frozenset({"softmax", "sigmoid"})
    zero_at_equal = True

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
            guide: "features": where the pyramids differ (version 2); "logits": where the answers do
                (version 1), which also serves pyramids of unequal channels
            mask_temperature: tau_D: divides the differences, > 0; smaller: fewer cells carry the
                loss
            temperature: tau_l: of the softmax over classes, > 0; two-stage pairs only
        """
        super().__init__()
        check_choice("guide", guide, sorted(GUIDES))
        unequal = [p.student for p in levels if p.student_channels != p.teacher_channels]
        if guide == "features" and unequal:
            raise ValueError(
                "guide is 'features', but student and teacher of MLD have other channels at "
                f"{', '.join(unequal)}. Set it to 'logits'."
            )
        check_temperature("mask_temperature", mask_temperature)
        check_temperature("temperature", temperature)
        self.levels = levels
        self.two_stage = two_stage
        self.guide = GUIDES[guide](levels, mask_temperature, temperature)
        self.temperature = temperature

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        of_regions = {"regions", "roi_predictions"}
        return frozenset({"features"} | (of_regions if pair.student.two_stage else {"dense"}))

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        two_stage = pair.student.two_stage
        levels = pair.levels if two_stage else pair.dense_levels
        return head_arguments(cls, cfg, pair, levels=levels, two_stage=two_stage)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            w = n softmax of D / tau_D over the n cells, 0 where it is below 1;  D: see guide
            dense:     loss = sum over cells of w KL(p_t || p_s) / sum over anchors of max_k p_t
            two-stage: loss = tau_l^2 / R sum over r of w_r KL(p_t || p_s)

        Args:
            student, teacher: views with logits: dense ones, per level (N, A*K, Hi, Wi), or those of
                the student's sampled proposals, (R, K+1) or, of a sigmoid each, (R, K)

        Returns:
            {"loss_mld": {level: scalar}, or of a two-stage pair scalar}, 0 at equal logits. What it
            is divided by is at least 1, and a mean over processes.
        """
        self.maps = {"weight": {}}
        compare = self._on_regions if self.two_stage else self._on_cells
        return {"loss_mld": compare(student, teacher)}

    def _on_cells(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        ours, theirs = student.dense(), teacher.dense()
        logits, targets = ours.by_level(ours.logits), theirs.by_level(theirs.logits)
        losses, positives = {}, 0.0
        for pair in self.levels:
            level = pair.student
            x, target = match_level(pair, logits, targets)
            weight = self.guide.of_cells(pair, student, teacher)  # (N, 1, Hi, Wi)
            losses[level] = (weight * class_divergence(x, target, "sigmoid")).sum()
            confidence = largest_probability(target, student.num_anchors)  # (N, A, Hi, Wi)
            inside = student.inside_image(level, like=x)
            positives = positives + zero_outside(confidence, inside).sum()
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
        weight, self.maps["weight"] = self.guide.of_regions(student, teacher, regions)
        return self.temperature**2 * (weight * divergence).sum() / regions.mean_count
