from typing import Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode, configurable

from ..layers import (
    GlobalContext,
    build_adapters,
    channel_attention,
    covered,
    paint,
    spatial_attention,
)
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import check_temperature, check_weight
from ..views import DetectorView, Regions
from .build import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class FGDHead(nn.Module):
    """
    Focal and Global Distillation, https://arxiv.org/abs/2111.11837 (exact, after the authors'
    released code): imitate the teacher's features where it attends, objects and background
    weighted apart (focal); its attention; and its features with their global context (global).

    Shapes: N images; C teacher channels; Hi, Wi height and width of level i; M boxes.
    """

    zero_at_equal = True

    @configurable
    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        temperature: float = 0.5,
        weights: Tuple[float, float, float, float] = (1e-3, 5e-4, 5e-4, 5e-6),
        legacy_scale: bool = False,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            temperature: of both attentions, > 0
            weights: of foreground, background, attention and global context
            legacy_scale: place boxes as the released code does
        """
        super().__init__()
        self.levels = levels
        self.temperature = temperature
        self.weights = weights
        self.legacy_scale = legacy_scale
        self.adapter = build_adapters(levels)
        self.student_context, self.teacher_context = (
            nn.ModuleDict({p.student: GlobalContext(p.teacher_channels) for p in levels})
            for _ in range(2)
        )

    @staticmethod
    def add_config(node: CfgNode) -> None:
        # Of all four terms, whose own weights, as published, are below
        node.LOSS_WEIGHT = 1.0
        # alpha, beta, gamma, lambda: 1e-3, 5e-4, 5e-4, 5e-6 for RetinaNet; 1.6e-3, 8e-4, 8e-4, 8e-6
        # for FCOS; 5e-5, 2.5e-5, 5e-5, 5e-7 for two-stage students
        node.FOREGROUND_WEIGHT = 1e-3
        node.BACKGROUND_WEIGHT = 5e-4
        node.ATTENTION_WEIGHT = 5e-4
        node.GLOBAL_WEIGHT = 5e-6
        # T: 0.5, and 0.8 for FCOS
        node.TEMPERATURE = 0.5
        # The released code stretches boxes to the padded map, as though an image filled it. True:
        # do the same; False: a box lies on the cells of its pixels
        node.LEGACY_SCALE = False

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair):
        node = cfg.DISTILL.FGD
        check_temperature("DISTILL.FGD.TEMPERATURE", node.TEMPERATURE)
        terms = ("FOREGROUND", "BACKGROUND", "ATTENTION", "GLOBAL")
        for term in terms:
            check_weight(f"DISTILL.FGD.{term}_WEIGHT", node[f"{term}_WEIGHT"])
        return {
            "levels": pair.levels,
            "temperature": node.TEMPERATURE,
            "weights": tuple(node[f"{term}_WEIGHT"] for term in terms),
            "legacy_scale": node.LEGACY_SCALE,
        }

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        Args:
            student, teacher: views with features (N, Cs, Hi, Wi) and (N, C, Hi, Wi)

        Returns:
            {"loss_fgd_foreground", "loss_fgd_background", "loss_fgd_attention", "loss_fgd_global":
            {level: scalar}}: each summed over channels and cells, averaged over images and
            multiplied by its weight
        """
        names = [f"loss_fgd_{x}" for x in ("foreground", "background", "attention", "global")]
        losses: Dict[str, Dict[str, Tensor]] = {name: {} for name in names}
        self.maps = {"foreground": {}}
        rois = Regions([x.gt_boxes for x in student.gt_instances]).rois
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x, target = self.adapter[level](x), target.detach()
            extents = self._extents(student, level, target)
            foreground, background = focal_masks(rois, extents, target)
            x, target = x.float(), target.float()
            terms = self._focal(x, target, foreground, background)
            terms.append(self._context(level, x, target))
            for name, weight, term in zip(names, self.weights, terms):
                losses[name][level] = weight * term / len(x)
            self.maps["foreground"][level] = foreground
        return losses

    def _focal(
        self, x: Tensor, target: Tensor, foreground: Tensor, background: Tensor
    ) -> List[Tensor]:
        """The terms of foreground, background and attention, summed over images."""
        cells, our_cells = (spatial_attention(v, self.temperature) for v in (target, x))
        channels, our_channels = (channel_attention(v, self.temperature) for v in (target, x))
        error = ((x - target).square() * channels).sum(dim=1, keepdim=True) * cells
        attention = (channels - our_channels).abs().sum() + (cells - our_cells).abs().sum()
        return [(error * foreground).sum(), (error * background).sum(), attention]

    def _context(self, level: str, x: Tensor, target: Tensor) -> Tensor:
        """Squared error with the global context of each side added, summed over images."""
        ours, theirs = self.student_context[level](x), self.teacher_context[level](target)
        return (x - target + (ours - theirs)).square().sum()

    def _extents(self, view: DetectorView, level: str, like: Tensor) -> Tensor:
        """(N, 2, 2): width and height of what an image's boxes lie on, in pixels and in cells."""
        stride = view.strides[level]
        height, width = like.shape[-2:]
        extents = [
            ((w, h), (width, height)) if self.legacy_scale else ((stride, stride), (1, 1))
            for h, w in view.image_sizes
        ]
        return torch.tensor(extents).to(like.device, non_blocking=True)


def focal_masks(rois: Tensor, extents: Tensor, like: Tensor) -> Tuple[Tensor, Tensor]:
    """
    How much each cell counts as foreground and as background.

    Args:
        rois: (M, 5), index of the image, then the ground-truth box XYXY in input pixels
        extents: (N, 2, 2), pixels, then cells that they are, along x and y
        like: a map of the level, (N, C, Hi, Wi)

    Returns:
        two of (N, 1, Hi, Wi). Foreground: in every cell that a box touches, up to one cell beyond
        its right and lower side, 1 / (cells of the box), the largest of all boxes. Background: the
        same in all other cells, 1 in all.
    """
    images, _, height, width = like.shape
    image = rois[:, 0].long()
    # In this order: a box that ends with the image may not be rounded beyond the map.
    pixels, cells = extents[image].repeat(1, 1, 2).unbind(dim=1)
    boxes = rois[:, 1:].float() / pixels * cells
    first, last = boxes[:, :2].floor(), boxes[:, 2:].ceil()
    value = 1 / (last - first + 1).prod(dim=1, keepdim=True)
    columns = covered(first[:, 0], last[:, 0], width)
    foreground = paint(covered(first[:, 1], last[:, 1], height) * value, columns, image, images)
    background = (foreground == 0).float()
    total = background.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return foreground, background / total
