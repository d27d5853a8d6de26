from typing import Any, Dict, FrozenSet, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode

from ..layers import unit_vectors, zero_outside
from ..pairing.levels import LevelPair, match_inside, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice, check_range, check_weight
from ..utils.processes import mean_over_processes
from ..views import DetectorView, RegionSampler
from .keys import head_arguments
from .mar_mask import ObjectMask
from .object_cells import check_masks_are_read
from .registry import DISTILL_HEAD_REGISTRY

RELATIONS = ("dense", "regions")


@DISTILL_HEAD_REGISTRY.register()
class MARHead(nn.Module):
    """
    Mask-guided and relation distillation (Zeng et al., International Journal of Computational
    Science and Engineering, 2024; RECONSTRUCTED from its abstract, no code was released): imitate
    the teacher's pyramid, near objects more than far from them; and how alike each two pixels are
    on the classification head.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i; R
    regions of S x S cells.

    Attributes:
        loss_weight: of both terms, whose own weights are below. All values here are our choice.
    """

    loss_weight = 1.0

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        dense_levels: Sequence[LevelPair],
        sampler: RegionSampler,
        mask: ObjectMask = ObjectMask(),
        relation: str = "dense",
        max_cells: int = 24,
        feature_weight: float = 6.0,
        relation_weight: float = 40.0,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            dense_levels: those on which both predict; not read where relation is "regions"
            sampler: which of a dense student's boxes are its regions
            mask: how much each cell counts
            relation: whose pixels are related. "dense": those of the tower on which classes are
                predicted (of a two-stage detector the RPN's); "regions": those within each region's
                RoI feature
            max_cells: cells a side to which a tower, padded as the batch is, is averaged first:
                memory grows with the fourth power
            feature_weight: gamma_f: 6 for dense students, 3 for two-stage ones
            relation_weight: gamma_r
        """
        super().__init__()
        check_choice("relation", relation, RELATIONS)
        check_weight("feature_weight", feature_weight)
        check_weight("relation_weight", relation_weight)
        check_range("max_cells", max_cells, 1, float("inf"))
        self.levels = levels
        self.dense_levels = dense_levels
        self.sampler = sampler
        self.mask = mask
        self.relation = relation
        self.max_cells = max_cells
        self.feature_weight = feature_weight
        self.relation_weight = relation_weight
        convs = {
            p.student: nn.Conv2d(p.student_channels, p.teacher_channels, 3, padding=1)
            for p in levels
        }
        self.adapter = nn.ModuleDict(convs)

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        on_regions = cfg.DISTILL.MAR.RELATION == "regions"
        relation = {"regions", "roi_features"} if on_regions else {"dense"}
        return frozenset({"features", "gt_instances"} | relation)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        check_masks_are_read("DISTILL.MAR.MASK.OBJECTS", cfg.DISTILL.MAR.MASK.OBJECTS, cfg)
        sizes = pair.student.roi_size, pair.teacher.roi_size
        on_regions = cfg.DISTILL.MAR.RELATION == "regions"
        if on_regions and sizes[0] != sizes[1]:
            raise ValueError(
                "DISTILL.MAR.RELATION is 'regions', but the student's RoI features have "
                f"{sizes[0]} cells a side and the teacher's {sizes[1]} "
                "(MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION). Set it to 'dense'."
            )
        return head_arguments(cls, cfg, pair, dense_levels=() if on_regions else pair.dense_levels)

    def forward(
        self, student: DetectorView, teacher: DetectorView
    ) -> Dict[str, Union[Tensor, Dict[str, Tensor]]]:
        """
        ::

            feature = gamma_f / (2 levels) sum of M (adapter(S) - T)^2 / (Ct sum of M)
            relation = gamma_r mean over pixels i, j of (cos(s_i, s_j) - cos(t_i, t_j))^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi), and with
                towers (N, C, Hi, Wi) or RoI features (R, C, S, S) of any number of channels, of
                which s and t are pixels

        Returns:
            {"loss_mar_feature": {level: scalar}}, over the cells inside the images (of all
            processes); {"loss_mar_relation": scalar, or {level: scalar}}, averaged over images or
            regions
        """
        relation = self._between_cells if self.relation == "dense" else self._within_regions
        return {
            "loss_mar_feature": self._features(student, teacher),
            "loss_mar_relation": relation(student, teacher),
        }

    def _features(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        levels = list(match_inside(self.levels, student, teacher))
        strides, sizes = [p.student_stride for p in self.levels], [x[1].shape[-2:] for x in levels]
        masks = self.mask(student.gt_instances, strides, sizes)
        losses, self.maps = {}, {"mask": {}}
        for (level, x, target, inside), mask in zip(levels, masks):
            mask = zero_outside(mask, inside)
            # The adapter sees 3x3 cells: what it would see were there no padding.
            x = self.adapter[level](zero_outside(x, inside))
            error = (x.float() - target.float()).square()
            total = mean_over_processes(2 * target.shape[1] * mask.sum()).clamp(min=1)
            losses[level] = self.feature_weight / len(self.levels) * (mask * error).sum() / total
            self.maps["mask"][level] = mask
        return losses

    def _between_cells(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        ours, theirs = student.dense(), teacher.dense()
        towers, targets = ours.by_level(ours.tower), theirs.by_level(theirs.tower)
        losses = {}
        for level, x, target in match_levels(self.dense_levels, towers, targets):
            inside = student.inside_image(level, like=x)
            x, pixels = average_cells(x, self.max_cells, inside)
            target, _ = average_cells(target, self.max_cells, inside)
            pixels = None if pixels is None else pixels.flatten(1)
            errors = relation_error(x.flatten(2), target.flatten(2), pixels)
            losses[level] = self.relation_weight * errors.mean()
        return losses

    def _within_regions(self, student: DetectorView, teacher: DetectorView) -> Tensor:
        regions = student.regions(self.sampler)
        x = student.roi_features(regions.boxes).flatten(2)
        target = teacher.roi_features(regions.boxes).flatten(2)
        return self.relation_weight * relation_error(x, target).sum() / regions.mean_count


def relation_error(x: Tensor, target: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """
    Mean squared difference of the cosines of each two of P pixels.

    Args:
        x, target: (B, C, P) and (B, Ct, P), channels may differ; the target gets no gradient
        inside: boolean (B, P), pixels that count; None: all

    Returns:
        (B,) float32
    """
    with torch.autocast(x.device.type, enabled=False):  # a difference of nearly equal numbers
        difference = _cosines(x, inside) - _cosines(target.detach(), inside)
    pixels = x.shape[2] if inside is None else inside.sum(dim=1).clamp(min=1)
    return difference.square().sum(dim=(1, 2)) / pixels**2


def average_cells(
    x: Tensor, max_cells: int, inside: Optional[Tensor] = None
) -> Tuple[Tensor, Optional[Tensor]]:
    """
    Average a map to at most `max_cells` rows and columns.

    Args:
        x: (N, C, H, W)
        inside: (N, 1, H, W), cells that hold a part of their image, which alone count; None: all

    Returns:
        (N, C, H', W'), and which of its cells hold a part of their image, (N, 1, H', W'), or None
    """
    x = x.float()
    size = [min(cells, max_cells) for cells in x.shape[2:]]
    if inside is None:
        return F.adaptive_avg_pool2d(x, size), None
    share = F.adaptive_avg_pool2d(inside.float(), size)
    pooled = F.adaptive_avg_pool2d(x * inside, size)
    return pooled / share.clamp(min=1e-6), share > 0


def _cosines(x: Tensor, inside: Optional[Tensor]) -> Tensor:
    """(B, C, P) -> (B, P, P)"""
    unit = unit_vectors(x)
    if inside is not None:
        unit = unit * inside[:, None]
    return unit.transpose(1, 2) @ unit
