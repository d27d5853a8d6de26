import math
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import (
    AttentionGuide,
    DualGenerator,
    MaskRule,
    add_dual_mask_config,
    add_reference_config,
    build_adapters,
    cut_windows,
    max_pool,
    pixel_factor,
    pool_inside,
    read_dual_mask,
    read_reference_pixels,
    squared_error,
)
from ..pairing.levels import LevelPair, match_inside
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice
from ..views import DetectorView
from .build import DISTILL_HEAD_REGISTRY

HIERARCHIES = ("pool", "window")


class Scale(NamedTuple):
    """One view of a level: pooled by `size` (hierarchy "pool"), or in size x size windows."""

    size: int
    x: Tensor  # adapted student's features, (N, Ct, H, W)
    target: Tensor  # teacher's features, (N, Ct, H, W)
    inside: Optional[Tensor]  # (N, 1, H, W), cells that hold a part of their image; None: all
    area: float  # cells of the level per cell of this scale


@DISTILL_HEAD_REGISTRY.register()
class SAMKDHead(nn.Module):
    """
    Scale-aware masked distillation of features, https://arxiv.org/abs/2501.07101 (RECONSTRUCTED
    from the abstracts of versions 1, "Dual Scale-aware AMKD", and 2, "SAMKD"; no code was
    released): DMKD's dual masking from coarse to fine, with more weight on the scales where the
    student lags. Its logits part is the head MLD.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.
    """

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        hierarchy: str = "pool",
        scales: Sequence[int] = (1, 2, 4),
        min_cells: int = 4,
        cell_mask: MaskRule = MaskRule(),
        channel_mask: MaskRule = MaskRule(ratio=0.5),
        guide: AttentionGuide = AttentionGuide(),
        reference_pixels: int = 0,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            hierarchy: "pool": maps max-pooled by each of `scales`; "window": whole maps whose
                cells compete for attention within each of scale x scale windows
            scales: whole numbers, 1 among them
            min_cells: a scale is left out where it leaves fewer cells along a side (of the map, or
                of a window)
            cell_mask, channel_mask: what is hidden, given the attention
            guide: whose attention
            reference_pixels: see add_reference_config; 0: as published
        """
        super().__init__()
        self.levels = levels
        self.hierarchy = hierarchy
        self.scales = sorted(scales)
        self.min_cells = min_cells
        self.cell_mask = cell_mask
        self.channel_mask = channel_mask
        self.guide = guide
        self.reference_pixels = reference_pixels
        self.adapter = build_adapters(levels)
        # Shared by the scales of a level: the same 3x3 kernels see more of the image on each.
        self.generator = nn.ModuleDict(
            {p.student: DualGenerator(p.teacher_channels) for p in levels}
        )

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # alpha and the ratio of cells: MGD's (5e-7 and 0.45 for a two-stage student)
        node.LOSS_WEIGHT = 2e-5
        add_reference_config(node)
        # "pool": version 1's max-pooling, cheap; "window": the region-wise reading of version 2, at
        # the cost of a generator's pass for each scale
        node.HIERARCHY = "pool"
        # K; each scale halves the map or the window
        node.SCALES = [1, 2, 4]
        # On fewer cells a share of them is hardly a choice.
        node.MIN_CELLS = 4
        add_dual_mask_config(node)

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.SAMKD
        check_choice("DISTILL.SAMKD.HIERARCHY", node.HIERARCHY, HIERARCHIES)
        whole = all(isinstance(k, int) and k > 0 for k in node.SCALES)
        if not whole or 1 not in node.SCALES or len(set(node.SCALES)) < len(node.SCALES):
            raise ValueError(
                "DISTILL.SAMKD.SCALES must be different whole numbers above 0 with 1 among them, "
                f"such as [1, 2, 4], got {list(node.SCALES)}."
            )
        if node.MIN_CELLS < 1:
            raise ValueError(f"DISTILL.SAMKD.MIN_CELLS must be 1 or more, got {node.MIN_CELLS}.")
        return {
            "levels": pair.levels,
            "hierarchy": node.HIERARCHY,
            "scales": list(node.SCALES),
            "min_cells": node.MIN_CELLS,
            **read_dual_mask("DISTILL.SAMKD", node),
            "reference_pixels": read_reference_pixels("DISTILL.SAMKD", node),
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, Ct, Hi, Wi)

        Returns:
            {"loss_samkd": {level: scalar}}: the weighted mean over scales of the squared error,
            itself summed over channels and the cells inside the images, averaged over images, and
            multiplied by the cells of the level per cell of the scale: of MGD's size
        """
        factor = pixel_factor(self.reference_pixels, student.image_sizes)
        losses, self.maps = {}, {f"visible {k}": {} for k in self.scales}
        for level, x, target, inside in match_inside(self.levels, student, teacher):
            sizes, errors, lags = self._sizes(student, level), [], []
            for scale in self._scales(sizes, self.adapter[level](x), target, inside):
                cells = self._visible_cells(scale)
                channels = self.channel_mask(self.guide.channels(*scale[1:4]))
                rebuilt = self.generator[level](scale.x, cells, channels, scale.inside)
                errors.append(scale.area * squared_error(rebuilt, scale.target, scale.inside))
                lags.append(self._lag(scale, cells))
                self.maps[f"visible {scale.size}"][level] = cells
            losses[level] = factor * (lag_weights(lags) * torch.stack(errors)).sum()
        return {"loss_samkd": losses}

    def _sizes(self, student: DetectorView, level: str) -> List[int]:
        """The scales of a level that leave enough cells of the images, fine to coarse."""
        largest = [max(sides) for sides in zip(*student.image_sizes)]
        cells = min(math.ceil(side / student.strides[level]) for side in largest)
        return [k for k in self.scales if k == 1 or cells / k >= self.min_cells]

    def _scales(
        self, sizes: List[int], x: Tensor, target: Tensor, inside: Optional[Tensor]
    ) -> List[Scale]:
        if self.hierarchy == "window":
            return [Scale(k, x, target, inside, 1.0) for k in sizes]
        return [
            Scale(
                k,
                max_pool(x, k, inside),
                max_pool(target, k, inside),
                pool_inside(inside, k),
                float(k * k),
            )
            for k in sizes
        ]

    def _visible_cells(self, scale: Scale) -> Tensor:
        """(N, 1, H, W): ranked over the whole map, or within each window of it."""
        if self.hierarchy == "pool" or scale.size == 1:
            return self.cell_mask(self.guide.cells(*scale[1:4]), scale.inside)
        magnitude = self.guide.of(scale.x, scale.target).float().abs().mean(dim=1, keepdim=True)
        inside = torch.ones_like(magnitude).bool() if scale.inside is None else scale.inside
        windows = cut_windows(inside, scale.size)  # (N, windows, H, W)
        # Each window as an image of its own, of which nothing else is inside.
        magnitude = magnitude.expand_as(windows).flatten(0, 1)[:, None]
        inside = windows.flatten(0, 1)[:, None]
        visible = self.cell_mask(self.guide.cells(magnitude, magnitude, inside), inside)
        return visible.view_as(windows).any(dim=1, keepdim=True)

    def _lag(self, scale: Scale, cells: Tensor) -> Tensor:
        """How far the student is from the teacher: mean over the map, or over its hidden cells."""
        counted = scale.inside
        if self.hierarchy == "window":  # all its scales see the same maps, but hide other cells
            counted = ~cells if scale.inside is None else scale.inside & ~cells
        distance = (scale.x.detach().float() - scale.target.float()).abs().mean(1, keepdim=True)
        if counted is None:
            return distance.mean()
        return (distance * counted).sum() / counted.sum().clamp(min=1)


def lag_weights(lags: Sequence[Tensor]) -> Tensor:
    """Softmax of the lags relative to their mean: sum 1, however many scales a level has."""
    lags = torch.stack(list(lags))
    return (lags / lags.mean().clamp(min=1e-12)).softmax(dim=0)
