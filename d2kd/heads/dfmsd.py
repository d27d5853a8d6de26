import math
from typing import Dict, Optional, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import (
    AttentionGuide,
    DualGenerator,
    MaskRule,
    build_adapters,
    standardise,
)
from ..pairing.levels import LevelPair, match_inside
from ..utils.checks import check_weight
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class DFMSDHead(nn.Module):
    """
    Dual Feature Masking Stage-wise Distillation, https://arxiv.org/abs/2407.13147 (RECONSTRUCTED
    from abstract and figures; no code was released), for pairs of unlike detectors: DMKD's dual
    masking, with the masks drawn to regions of high frequency on the levels of small objects, and
    every level aligned with the teacher's up to scale and shift. Its stages are DISTILL.STAGES.

    Both terms see standardised features, since magnitudes of unlike detectors differ.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: of the reconstruction: PKD's published weight for unlike pairs, as both compare
            standardised features
    """

    loss_weight = 6.0

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        reconstruct: bool = True,
        semantic_ratio: float = 0.5,
        cell_mask: MaskRule = MaskRule(),
        channel_mask: MaskRule = MaskRule(ratio=0.5),
        temperature: float = 0.5,
        attention_from: str = "teacher",
        enhancement: float = 1.0,
        enhanced_max_stride: int = 16,
        high_pass_cutoff: float = 0.1,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            reconstruct: False: semantic alignment alone, the first stage where there is one teacher
                only
            semantic_ratio: beta: weight of the semantic alignment / LOSS_WEIGHT, 0 or above; 1.0
                where it is alone
            cell_mask: which cells are hidden, given the attention
            channel_mask: which channels; half of them leaves enough to mix the others from
            temperature: tau of FGD's attention: 0.5, and 0.8 for FCOS; larger: flatter
            attention_from: "teacher", which knows objects from the first iteration on, "student",
                or the mean of "both"
            enhancement: gamma: how much high-frequency attention is added to the mask's; the paper
                strengthens it with the stages: 0.0 in the first, 1.0 in the second
            enhanced_max_stride: levels up to this stride get it: small objects live on the fine
                levels
            high_pass_cutoff: r, frequency of half power, in (0, 0.15] cycles per cell: slower
                changes than one in ten cells are not an object's detail
        """
        super().__init__()
        check_weight("semantic_ratio", semantic_ratio)
        check_weight("enhancement", enhancement)
        check_weight("enhanced_max_stride", enhanced_max_stride)
        if not 0 < high_pass_cutoff <= 0.15:
            raise ValueError(
                f"high_pass_cutoff must be in (0, 0.15] cycles per cell, got {high_pass_cutoff}: "
                "above, the filter is narrower than a cell."
            )
        if not reconstruct and not semantic_ratio:
            raise ValueError("reconstruct is False and SEMANTIC_RATIO is 0, so nothing is left.")
        self.levels = levels
        self.semantic_ratio = semantic_ratio
        self.cell_mask = cell_mask
        self.channel_mask = channel_mask
        self.guide = AttentionGuide(temperature, attention_from)
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

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            X = adapter(S),  Z(T) = T with mean 0 and variance 1 per channel
            rebuild = mean over n, c, cells inside of (generator(X, masks) - Z(T))^2
            semantic = beta / 2 mean over n, c, cells inside of (Z(X) - Z(T))^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, Ct, Hi, Wi)

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
                error = _mean_square(standardise(x.float(), inside), normal, inside)
                semantic[level] = self.semantic_ratio / 2 * error
            if level in self.generator:
                magnitudes = self.guide.magnitudes(x, target)
                attention = self.guide.cells(magnitudes, inside)
                if self.enhancement[level]:
                    attention = self._enhanced(attention, level, x, target, inside)
                cells = self.cell_mask(attention, inside)  # (N, 1, Hi, Wi)
                channels = self.channel_mask(self.guide.channels(magnitudes, inside))
                rebuilt = self.generator[level](x, cells, channels, inside)
                rebuild[level] = _mean_square(rebuilt.float(), normal, inside)
                self.maps["visible"][level] = cells
        terms = {"loss_dfmsd_rebuild": rebuild, "loss_dfmsd_semantic": semantic}
        return {k: v for k, v in terms.items() if v}

    def _enhanced(
        self, attention: Tensor, level: str, x: Tensor, target: Tensor, inside: Optional[Tensor]
    ) -> Tensor:
        enhancement = self.enhancement[level]
        details = [
            high_pass(y.float(), self.high_pass_cutoff, inside).abs()
            for y in self.guide.features(x, target)
        ]
        enhanced = attention + enhancement * self.guide.cells(details, inside)
        # A mean of 1 again, so that a threshold keeps its meaning; the order is that of the sum.
        return enhanced / (1 + enhancement)


def _mean_square(x: Tensor, target: Tensor, inside: Optional[Tensor]) -> Tensor:
    """Mean of the squared difference over images, channels and the cells inside."""
    if inside is None:
        return F.mse_loss(x, target)
    return ((x - target).square() * inside).sum() / (inside.sum() * x.shape[1])


def high_pass(x: Tensor, cutoff: float, inside: Optional[Tensor] = None) -> Tensor:
    """
    What is left of each channel without its low frequencies.

    The filter's response is 1 - exp(-f^2 ln 2 / (2 cutoff^2)): x minus a Gaussian blur. Blurring
    in space is that product in the frequency domain, and unlike a Fourier transform of the map it
    neither joins its left border to its right one nor mixes padding in: cells outside the image
    have no part in the average.

    Args:
        x: (N, C, H, W)
        cutoff: frequency at which the blur passes half of the power, cycles per cell; a Gaussian
            sampled once per cell has this response up to 0.15
        inside: (N, 1, H, W), cells that hold a part of their image; None: all do

    Returns:
        (N, C, H, W), 0 outside
    """
    sigma = math.sqrt(math.log(2)) / (2 * math.pi * cutoff)  # cells
    radius = math.ceil(3 * sigma)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    weight = torch.ones_like(x[:, :1]) if inside is None else inside.to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):  # a difference of nearly equal numbers
        total = _blur(weight, kernel).clamp(min=torch.finfo(x.dtype).tiny)
        return (x - _blur(x * weight, kernel) / total) * weight


def _blur(x: Tensor, kernel: Tensor) -> Tensor:
    """Weighted sum over columns, then rows, of every channel by itself; zeros beyond the border."""
    images, channels, height, width = x.shape
    x = x.reshape(images * channels, 1, height, width)
    x = F.conv2d(x, kernel.view(1, 1, 1, -1), padding=(0, len(kernel) // 2))
    x = F.conv2d(x, kernel.view(1, 1, -1, 1), padding=(len(kernel) // 2, 0))
    return x.view(images, channels, height, width)
