from typing import Dict, Optional, Sequence

from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import (
    AttentionGuide,
    DualGenerator,
    MaskRule,
    add_dual_mask_config,
    build_adapters,
    high_pass,
    mean_one_softmax,
    read_dual_mask,
    standardise,
)
from ..pairing.levels import LevelPair, match_inside
from ..pairing.pair import DistillPair
from ..utils.checks import check_weight
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DFMSDHead(nn.Module):
    """
    Dual Feature Masking Stage-wise Distillation, https://arxiv.org/abs/2407.13147 (RECONSTRUCTED
    from abstract and figures; no code was released), for pairs of unlike detectors: DMKD's dual
    masking, with the masks drawn to regions of high frequency on the levels of small objects, and
    every level aligned with the teacher's up to scale and shift. Its stages are DISTILL.STAGES.

    Both terms see standardised features, since magnitudes of unlike detectors differ.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        reconstruct: bool = True,
        semantic_ratio: float = 0.5,
        cell_mask: MaskRule = MaskRule(),
        channel_mask: MaskRule = MaskRule(ratio=0.5),
        guide: AttentionGuide = AttentionGuide(),
        enhancement: float = 1.0,
        enhanced_max_stride: int = 16,
        high_pass_cutoff: float = 0.1,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            reconstruct: False leaves the semantic alignment alone, for a first stage
            semantic_ratio: weight of the semantic alignment beside the reconstruction, >= 0
            cell_mask, channel_mask: what is hidden, given the attention
            guide: whose attention
            enhancement: how much attention of high frequencies is added, >= 0
            enhanced_max_stride: levels up to this stride get it, in pixels
            high_pass_cutoff: frequency of half power, in cycles per cell, in (0, 0.15]
        """
        super().__init__()
        self.levels = levels
        self.semantic_ratio = semantic_ratio
        self.cell_mask = cell_mask
        self.channel_mask = channel_mask
        self.guide = guide
        self.high_pass_cutoff = high_pass_cutoff
        self.enhancement = {
            p.student: enhancement * (p.student_stride <= enhanced_max_stride) for p in levels
        }
        # Also between equal channels, so that the student may keep a basis of its own.
        self.adapter = build_adapters(levels, always=True)
        rebuilt = levels if reconstruct else ()
        self.generator = nn.ModuleDict(
            {p.student: DualGenerator(p.teacher_channels) for p in rebuilt}
        )

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # Of the reconstruction: PKD's published weight for unlike pairs, as both compare
        # standardised features
        node.LOSS_WEIGHT = 6.0
        # False: semantic alignment alone, the first stage where there is one teacher only
        node.RECONSTRUCT = True
        # beta: weight of the semantic alignment / LOSS_WEIGHT; 1.0 where it is alone
        node.SEMANTIC_RATIO = 0.5
        add_dual_mask_config(node)
        # gamma: how much high-frequency attention is added to the mask's; the paper strengthens it
        # with the stages: 0.0 in the first, 1.0 in the second
        node.ENHANCEMENT = 1.0
        # Small objects live on the fine levels.
        node.ENHANCED_MAX_STRIDE = 16
        # r, in cycles per cell: slower changes than one in ten cells are not an object's detail
        node.HIGH_PASS_CUTOFF = 0.1

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.DFMSD
        for name in ("SEMANTIC_RATIO", "ENHANCEMENT", "ENHANCED_MAX_STRIDE"):
            check_weight(f"DISTILL.DFMSD.{name}", node[name])
        if not 0 < node.HIGH_PASS_CUTOFF <= 0.15:
            raise ValueError(
                "DISTILL.DFMSD.HIGH_PASS_CUTOFF must be in (0, 0.15] cycles per cell, got "
                f"{node.HIGH_PASS_CUTOFF}: above, the filter is narrower than a cell."
            )
        if not node.RECONSTRUCT and not node.SEMANTIC_RATIO:
            raise ValueError(
                "DISTILL.DFMSD: RECONSTRUCT is False and SEMANTIC_RATIO is 0, so nothing is left."
            )
        return {
            "levels": pair.levels,
            "reconstruct": node.RECONSTRUCT,
            "semantic_ratio": node.SEMANTIC_RATIO,
            **read_dual_mask("DISTILL.DFMSD", node),
            "enhancement": node.ENHANCEMENT,
            "enhanced_max_stride": node.ENHANCED_MAX_STRIDE,
            "high_pass_cutoff": node.HIGH_PASS_CUTOFF,
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_dfmsd_rebuild": {level: scalar}}: squared error of the rebuilt features against
            the standardised teacher's, mean over channels and the cells inside the images;
            {"loss_dfmsd_semantic": {level: scalar}}: semantic_ratio times PKD's loss. A term that
            is switched off is missing.
        """
        rebuild, semantic, self.maps = {}, {}, {"visible": {}}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            x = self.adapter[level](x)
            normal = standardise(target.float(), inside)
            if self.semantic_ratio:
                error = _mean_square(standardise(x.float(), inside) - normal, inside) / 2
                semantic[level] = self.semantic_ratio * error
            if level in self.generator:
                attention = self._enhanced_attention(level, x, target, inside)
                cells = self.cell_mask(attention, inside)  # (N, 1, Hi, Wi)
                channels = self.channel_mask(self.guide.channels(x, target, inside))
                rebuilt = self.generator[level](x, cells, channels, inside)
                rebuild[level] = _mean_square(rebuilt.float() - normal, inside)
                self.maps["visible"][level] = cells
        terms = {"loss_dfmsd_rebuild": rebuild, "loss_dfmsd_semantic": semantic}
        return {k: v for k, v in terms.items() if v}

    def _enhanced_attention(
        self, level: str, x: Tensor, target: Tensor, inside: Optional[Tensor]
    ) -> Tensor:
        attention = self.guide.cells(x, target, inside)
        enhancement = self.enhancement[level]
        if not enhancement:
            return attention
        detail = high_pass(self.guide.of(x, target).float(), self.high_pass_cutoff, inside)
        detail = detail.abs().mean(dim=1, keepdim=True)
        detail = mean_one_softmax(detail, self.guide.temperature, inside)
        # A mean of 1 again, so that a threshold keeps its meaning; the order is that of the sum.
        return (attention + enhancement * detail) / (1 + enhancement)


def _mean_square(x: Tensor, inside: Optional[Tensor]) -> Tensor:
    """Mean over images, channels and the cells inside."""
    if inside is None:
        return x.square().mean()
    return (x.square() * inside).sum() / (inside.sum() * x.shape[1])
