from typing import Dict, Optional, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import (
    AttentionGuide,
    Generator,
    MaskRule,
    add_attention_config,
    add_mask_config,
    add_reference_config,
    build_adapters,
    mean_inside,
    pixel_factor,
    read_reference_pixels,
    squared_error,
)
from ..pairing.levels import LevelPair, match_inside
from ..pairing.pair import DistillPair
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class AMDHead(nn.Module):
    """
    Adaptive Masked Distillation, https://arxiv.org/abs/2301.13538 (RECONSTRUCTED from the abstract;
    no code was released): as MGD, but the cells that it hides are drawn where the teacher attends,
    and a small module weighs the channels of what the generator rebuilds.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        mask: MaskRule = MaskRule(),
        guide: AttentionGuide = AttentionGuide(),
        adapt_channels: bool = True,
        reference_pixels: int = 0,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            mask: which cells are hidden, given the attention
            guide: whose attention
            adapt_channels: weigh the channels of the rebuilt features
            reference_pixels: see add_reference_config; 0: as published
        """
        super().__init__()
        self.levels = levels
        self.mask = mask
        self.guide = guide
        self.reference_pixels = reference_pixels
        self.adapter = build_adapters(levels)
        self.generator = nn.ModuleDict({p.student: Generator(p.teacher_channels) for p in levels})
        gated = levels if adapt_channels else ()
        self.gate = nn.ModuleDict({p.student: ChannelGate(p.teacher_channels) for p in gated})

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # alpha and the mask's ratio: MGD's (5e-7 and 0.45 for a two-stage student), since the
        # abstract reports gains over MGD in MGD's setting
        node.LOSS_WEIGHT = 2e-5
        add_reference_config(node)
        node.MASK = CfgNode()
        add_mask_config(node.MASK, ratio=0.65)
        add_attention_config(node)
        # The "simple and efficient" channel module of the abstract, here squeeze and excitation
        node.ADAPT_CHANNELS = True

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.AMD
        return {
            "levels": pair.levels,
            "mask": MaskRule.from_config("DISTILL.AMD.MASK", node.MASK),
            "guide": AttentionGuide.from_config("DISTILL.AMD", node),
            "adapt_channels": node.ADAPT_CHANNELS,
            "reference_pixels": read_reference_pixels("DISTILL.AMD", node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_amd": {level: scalar}}: squared error summed over channels and the cells inside
            the images, averaged over images, as MGD's
        """
        factor = pixel_factor(self.reference_pixels, student.image_sizes)
        losses, self.maps = {}, {"visible": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x = self.adapter[level](x)
            visible = self.mask(self.guide.cells(x, target, inside), inside)  # (N, 1, Hi, Wi)
            rebuilt = self.generator[level](x * visible, inside)
            if level in self.gate:
                rebuilt = rebuilt * self.gate[level](x, inside)
            losses[level] = factor * squared_error(rebuilt, target, inside)
            self.maps["visible"][level] = visible
        return {"loss_amd": losses}


class ChannelGate(nn.Module):
    """Squeeze and excitation, https://arxiv.org/abs/1709.01507: a weight in (0, 1) per channel."""

    def __init__(self, channels: int, reduction: int = 16):
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.squeeze = nn.Linear(channels, hidden)
        self.excite = nn.Linear(hidden, channels)
        # Starts as plain masked generation: sigmoid(2) = 0.88 for every channel alike.
        nn.init.zeros_(self.excite.weight)
        nn.init.constant_(self.excite.bias, 2.0)

    def forward(self, x: Tensor, inside: Optional[Tensor] = None) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        pooled = mean_inside(x, inside).flatten(1)
        return self.excite(self.squeeze(pooled).relu()).sigmoid()[:, :, None, None]
