from typing import Dict, FrozenSet, Sequence, Union

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import ObjectMask, add_object_mask_config, average_cells, relation_error
from ..pairing.levels import LevelPair, match_inside, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice, check_weight
from ..utils.processes import mean_over_processes
from ..views import DetectorView, Regions, RegionSampler
from .build import DISTILL_HEAD_REGISTRY

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
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        dense_levels: Sequence[LevelPair] = (),
        sampler: RegionSampler = RegionSampler(),
        mask: ObjectMask = ObjectMask(),
        max_cells: int = 24,
        feature_weight: float = 6.0,
        relation_weight: float = 40.0,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            dense_levels: those on which both predict, whose pixels are related; empty: relate those
                within each region
            sampler: which of a dense student's boxes are its regions
            mask: how much each cell counts
            max_cells: a tower is averaged to this many cells a side before its pixels are related
            feature_weight, relation_weight: of the two terms
        """
        super().__init__()
        self.levels = levels
        self.dense_levels = dense_levels
        self.sampler = sampler
        self.mask = mask
        self.max_cells = max_cells
        self.feature_weight = feature_weight
        self.relation_weight = relation_weight
        convs = {
            p.student: nn.Conv2d(p.student_channels, p.teacher_channels, 3, padding=1)
            for p in levels
        }
        self.adapter = nn.ModuleDict(convs)

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # Of both terms, whose own weights are below. All values here are our choice.
        node.LOSS_WEIGHT = 1.0
        # gamma_f: 6 for dense students, 3 for two-stage ones
        node.FEATURE_WEIGHT = 6.0
        # gamma_r
        node.RELATION_WEIGHT = 40.0
        node.MASK = CfgNode()
        add_object_mask_config(node.MASK)
        # Whose pixels are related. "dense": those of the tower on which classes are predicted (of a
        # two-stage detector the RPN's); "regions": those within each region's RoI feature
        node.RELATION = "dense"
        # Cells a side to which a tower is averaged first: memory grows with the fourth power
        node.MAX_CELLS = 24

    @staticmethod
    def requires(cfg: CfgNode, pair: DistillPair) -> FrozenSet[str]:
        on_regions = cfg.DISTILL.MAR.RELATION == "regions"
        return frozenset({"features"} | ({"regions", "roi_features"} if on_regions else {"dense"}))

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.MAR
        check_choice("DISTILL.MAR.RELATION", node.RELATION, RELATIONS)
        check_weight("DISTILL.MAR.FEATURE_WEIGHT", node.FEATURE_WEIGHT)
        check_weight("DISTILL.MAR.RELATION_WEIGHT", node.RELATION_WEIGHT)
        if node.MAX_CELLS < 1:
            raise ValueError(f"DISTILL.MAR.MAX_CELLS must be at least 1, got {node.MAX_CELLS}.")
        sizes = pair.student.roi_size, pair.teacher.roi_size
        if node.RELATION == "regions" and sizes[0] != sizes[1]:
            raise ValueError(
                "DISTILL.MAR.RELATION is 'regions', but the student's RoI features have "
                f"{sizes[0]} cells a side and the teacher's {sizes[1]} "
                "(MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION). Set it to 'dense'."
            )
        return {
            "levels": pair.levels,
            "dense_levels": pair.dense_levels if node.RELATION == "dense" else (),
            "sampler": RegionSampler.from_config(cfg, pair.student),
            "mask": ObjectMask.from_config("DISTILL.MAR.MASK", node.MASK),
            "max_cells": node.MAX_CELLS,
            "feature_weight": node.FEATURE_WEIGHT,
            "relation_weight": node.RELATION_WEIGHT,
        }

    def forward(
        self, student: DetectorView, teacher: DetectorView
    ) -> Dict[str, Union[Tensor, Dict[str, Tensor]]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi), and with
                towers (N, C, Hi, Wi) or RoI features (R, C, S, S) of any number of channels

        Returns:
            {"loss_mar_feature": {level: scalar}}: half the squared error, a mean over channels and
            the cells inside the images (of all processes) that is weighted by the mask, divided by
            the number of levels; {"loss_mar_relation": scalar, or {level: scalar}}: squared
            difference of the cosines of each two pixels, averaged over these and over images or
            regions. Each is multiplied by its weight.
        """
        relation = self._between_cells if self.dense_levels else self._within_regions
        return {
            "loss_mar_feature": self._features(student, teacher),
            "loss_mar_relation": relation(student, teacher),
        }

    def _features(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Tensor]:
        rois = Regions([x.gt_boxes for x in student.gt_instances]).rois
        strides = sorted(p.student_stride for p in self.levels)
        losses, self.maps = {}, {"mask": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            mask = self.mask(rois, student.strides[level], strides, target.shape)
            mask = mask if inside is None else mask * inside
            # The adapter sees 3x3 cells: what it would see were there no padding.
            x = self.adapter[level](x if inside is None else x * inside)
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
