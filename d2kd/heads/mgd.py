from typing import Dict, Sequence

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import (
    Generator,
    add_reference_config,
    build_adapters,
    pixel_factor,
    read_reference_pixels,
    squared_error,
)
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DistillPair
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class MGDHead(nn.Module):
    """
    Masked Generative Distillation, https://arxiv.org/abs/2205.01529 (exact, after the authors'
    released code): hide random positions of the student's features and have a small generator
    rebuild the teacher's whole features from the rest.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    @configurable
    def __init__(
        self, *, levels: Sequence[LevelPair], mask_ratio: float, reference_pixels: int = 0
    ):
        """
        Args:
            levels: the pairs of levels to distil
            mask_ratio: probability of hiding a position, in [0, 1)
            reference_pixels: see add_reference_config; 0: as published
        """
        super().__init__()
        if not 0 <= mask_ratio < 1:
            raise ValueError(
                f"DISTILL.MGD.MASK_RATIO must be in [0, 1), got {mask_ratio}: it is the "
                "probability of hiding a position (0.65 for dense detectors, 0.45 for two-stage)."
            )
        self.levels = levels
        self.mask_ratio = mask_ratio
        self.reference_pixels = reference_pixels
        self.adapter = build_adapters(levels)
        self.generator = nn.ModuleDict({p.student: Generator(p.teacher_channels) for p in levels})

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # alpha; published, for 800x1344 inputs: 2e-5 for a dense student, 5e-7 for a two-stage one
        node.LOSS_WEIGHT = 2e-5
        add_reference_config(node)
        # lambda: probability of hiding a position, in [0, 1); published: 0.65 dense, 0.45 two-stage
        node.MASK_RATIO = 0.65

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.MGD
        return {
            "levels": pair.levels,
            "mask_ratio": node.MASK_RATIO,
            "reference_pixels": read_reference_pixels("DISTILL.MGD", node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_mgd": {level: scalar}}: squared error summed over channels and positions,
            averaged over images. The published weights assume this reduction.
        """
        factor = pixel_factor(self.reference_pixels, student.image_sizes)
        losses, self.maps = {}, {"visible": {}}
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x = self.adapter[level](x)
            # One draw per position for all channels: otherwise they would give each other away.
            # Not in float16, which has 2048 numbers to draw.
            dtype = torch.promote_types(x.dtype, torch.float32)
            drawn = torch.rand_like(x[:, :1], dtype=dtype)
            visible = drawn >= self.mask_ratio  # (N, 1, Hi, Wi)
            rebuilt = self.generator[level](x * visible)
            # Padding counts here, as in the released code.
            losses[level] = factor * squared_error(rebuilt, target)
            self.maps["visible"][level] = visible
        return {"loss_mgd": losses}
