from typing import Dict, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import (
    AttentionGuide,
    DualGenerator,
    MaskRule,
    add_dual_mask_config,
    add_reference_config,
    build_adapters,
    pixel_factor,
    read_dual_mask,
    read_reference_pixels,
    squared_error,
)
from ..pairing.levels import LevelPair, match_inside
from ..pairing.pair import DistillPair
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DMKDHead(nn.Module):
    """
    Dual Masked Knowledge Distillation, https://arxiv.org/abs/2309.02719 (RECONSTRUCTED from the
    abstract; no code was released): hide cells from one generator and channels from another, both
    drawn by the teacher's attention, and fuse what the two rebuild by learned weights.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        cell_mask: MaskRule = MaskRule(),
        channel_mask: MaskRule = MaskRule(ratio=0.5),
        guide: AttentionGuide = AttentionGuide(),
        reference_pixels: int = 0,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            cell_mask, channel_mask: what is hidden, given the attention
            guide: whose attention
            reference_pixels: see add_reference_config; 0: as published
        """
        super().__init__()
        self.levels = levels
        self.cell_mask = cell_mask
        self.channel_mask = channel_mask
        self.guide = guide
        self.reference_pixels = reference_pixels
        self.adapter = build_adapters(levels)
        self.generator = nn.ModuleDict(
            {p.student: DualGenerator(p.teacher_channels) for p in levels}
        )

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # alpha and the ratio of cells: MGD's (5e-7 and 0.45 for a two-stage student)
        node.LOSS_WEIGHT = 2e-5
        add_reference_config(node)
        add_dual_mask_config(node)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.DMKD
        return {
            "levels": pair.levels,
            **read_dual_mask("DISTILL.DMKD", node),
            "reference_pixels": read_reference_pixels("DISTILL.DMKD", node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_dmkd": {level: scalar}}: squared error summed over channels and the cells inside
            the images, averaged over images, as MGD's
        """
        factor = pixel_factor(self.reference_pixels, student.image_sizes)
        losses, self.maps = {}, {"visible": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x = self.adapter[level](x)
            cells = self.cell_mask(self.guide.cells(x, target, inside), inside)  # (N, 1, Hi, Wi)
            channels = self.channel_mask(self.guide.channels(x, target, inside))  # (N, Ct, 1, 1)
            rebuilt = self.generator[level](x, cells, channels, inside)
            losses[level] = factor * squared_error(rebuilt, target, inside)
            self.maps["visible"][level] = cells
        return {"loss_dmkd": losses}
