from typing import Any, Dict, List, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.config import CfgNode

from ..layers import Axes, build_adapters, mean_one_softmax, paint_maps
from ..pairing.levels import LevelPair, match_levels
from ..pairing.pair import DistillPair
from ..utils.checks import check_choice, check_temperature, check_weight
from ..views import DetectorView, Regions
from .keys import head_arguments
from .object_cells import OBJECTS, check_masks_are_read, object_cells
from .registry import DISTILL_HEAD_REGISTRY


@DISTILL_HEAD_REGISTRY.register()
class FGDHead(nn.Module):
    """
    Focal and Global Distillation, https://arxiv.org/abs/2111.11837 (exact, after the authors'
    released code): imitate the teacher's features where it attends, objects and background
    weighted apart (focal); its attention; and its features with their global context (global).

    Shapes: N images; C teacher channels; Hi, Wi height and width of level i; M boxes.

    Attributes:
        loss_weight: of all four terms, whose own weights are below
    """

    loss_weight = 1.0
    requires = frozenset({"features", "gt_instances"})
    zero_at_equal = True

    def __init__(
        self,
        *,
        levels: Sequence[LevelPair],
        foreground_weight: float = 1e-3,
        background_weight: float = 5e-4,
        attention_weight: float = 5e-4,
        global_weight: float = 5e-6,
        temperature: float = 0.5,
        objects: str = "boxes",
        legacy_scale: bool = False,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            foreground_weight: alpha; published: 1e-3 for RetinaNet, 1.6e-3 for FCOS and RepPoints,
                5e-5 for two-stage students
            background_weight: beta; 5e-4, 8e-4, 2.5e-5
            attention_weight: gamma; 5e-4, 8e-4, 5e-5
            global_weight: lambda, of the global context; 5e-6, 8e-6, 5e-7
            temperature: T of both attentions, > 0: 0.5, and 0.8 for FCOS
            objects: what marks the foreground: "boxes", as published, or "masks", our variant: the
                cells in which an object has a pixel. That needs MODEL.MASK_ON True
            legacy_scale: the released code stretches boxes to the padded map, as though an image
                filled it. True: do the same; False: a box lies on the cells of its pixels
        """
        super().__init__()
        self.weights = {
            "foreground": foreground_weight,
            "background": background_weight,
            "attention": attention_weight,
            "global": global_weight,
        }
        for term, weight in self.weights.items():
            check_weight(f"{term}_weight", weight)
        check_temperature("temperature", temperature)
        check_choice("objects", objects, OBJECTS)
        if legacy_scale and objects == "masks":
            raise ValueError(
                "legacy_scale is True, but masks have no box to stretch: set it False."
            )
        self.levels = levels
        self.temperature = temperature
        self.objects = objects
        self.legacy_scale = legacy_scale
        self.adapter = build_adapters(levels)
        self.student_context, self.teacher_context = (
            nn.ModuleDict({p.student: GlobalContext(p.teacher_channels) for p in levels})
            for _ in range(2)
        )

    @classmethod
    def from_config(cls, cfg: CfgNode, pair: DistillPair) -> Dict[str, Any]:
        check_masks_are_read("DISTILL.FGD.OBJECTS", cfg.DISTILL.FGD.OBJECTS, cfg)
        return head_arguments(cls, cfg, pair)

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            A, a = T's attention over cells and over channels (mean 1),  E = A a (X - T)^2
            foreground = alpha sum of E * M,  background = beta sum of E * B  (focal_masks)
            attention = gamma (sum of |A_T - A_X| + sum of |a_T - a_X|)
            global = lambda sum of (X + context(X) - T - context(T))^2

        Args:
            student, teacher: views with features S (N, Cs, Hi, Wi) and T (N, C, Hi, Wi);
                X = adapter(S)

        Returns:
            {"loss_fgd_foreground", "loss_fgd_background", "loss_fgd_attention", "loss_fgd_global":
            {level: scalar}}: each summed over channels and cells, averaged over images and
            multiplied by its weight
        """
        names, ours, theirs = [], [], []
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            names.append(level)
            ours.append(self.adapter[level](x).float())
            theirs.append(target.detach().float())
        masks = self._masks(student, [x.shape[-2:] for x in ours])
        terms: List[Tensor] = []  # the four of the first level, those of the second, ...
        for level in zip(names, ours, theirs, masks):
            terms += self._terms(*level)
        weights = torch.tensor(list(self.weights.values())) / len(ours[0])
        weights = weights.to(terms[0].device, non_blocking=True)
        terms = (torch.stack(terms).view(-1, len(weights)) * weights).unbind(1)
        self.maps = {"foreground": {k: foreground for k, (foreground, _) in zip(names, masks)}}
        return {f"loss_fgd_{k}": dict(zip(names, x)) for k, x in zip(self.weights, terms)}

    def _terms(
        self, level: str, x: Tensor, target: Tensor, masks: Tuple[Tensor, Tensor]
    ) -> List[Tensor]:
        """The four terms without their weights, summed over images."""
        sizes = [v.abs() for v in (x, target)]
        our_cells, cells = self._attention([v.mean(dim=1, keepdim=True) for v in sizes])
        our_channels, channels = self._attention([v.mean(dim=(2, 3), keepdim=True) for v in sizes])
        error = F.mse_loss(x, target, reduction="none") * channels
        error = error.sum(dim=1, keepdim=True) * cells
        foreground, background = ((error * mask).sum() for mask in masks)
        of_cells = F.l1_loss(our_cells, cells, reduction="sum")
        of_channels = F.l1_loss(our_channels, channels, reduction="sum")
        ours, theirs = self.student_context[level](x), self.teacher_context[level](target)
        context = F.mse_loss(x + ours, target + theirs, reduction="sum")
        return [foreground, background, of_cells + of_channels, context]

    def _attention(self, means: List[Tensor]) -> Tuple[Tensor, Tensor]:
        """Of mean magnitudes of student and teacher; both by the same operators."""
        return mean_one_softmax(torch.cat(means), self.temperature).chunk(2)

    def _masks(
        self, view: DetectorView, sizes: Sequence[Tuple[int, int]]
    ) -> List[Tuple[Tensor, Tensor]]:
        """focal_masks of levels whose maps have these heights and widths."""
        regions = Regions([x.gt_boxes for x in view.gt_instances])
        image, num_images = regions.image, len(view.gt_instances)
        if self.objects == "masks":
            strides = [p.student_stride for p in self.levels]
            cells = object_cells(view.gt_instances, strides, sizes)
            return focal_masks_of_cells(image, cells, num_images)
        boxes = self._in_cells(regions.rois, view.image_sizes, sizes)
        return focal_masks(image, boxes, sizes, num_images)

    def _in_cells(
        self,
        rois: Tensor,
        image_sizes: Sequence[Tuple[int, int]],
        sizes: Sequence[Tuple[int, int]],
    ) -> Tensor:
        """(M, 5) -> (M, L, 4), XYXY in the cells of each level."""
        boxes, device = rois[:, None, 1:].float(), rois.device
        if self.legacy_scale:
            # In this order: a box that ends with the image may not be rounded beyond the map.
            boxes = boxes / _xyxy(image_sizes, device)[rois[:, 0].long()][:, None]
            return boxes * _xyxy(sizes, device)
        strides = torch.tensor([p.student_stride for p in self.levels])
        return boxes / strides.to(device, non_blocking=True)[:, None]


def _xyxy(sizes: Sequence[Tuple[int, int]], device: torch.device) -> Tensor:
    """K heights and widths -> (K, 4), what X and Y of boxes in them are measured by."""
    return torch.tensor(sizes).flip(1).repeat(1, 2).to(device, non_blocking=True)


def focal_masks(
    image: Tensor, boxes: Tensor, sizes: Sequence[Tuple[int, int]], num_images: int
) -> List[Tuple[Tensor, Tensor]]:
    """
    How much each cell counts as foreground and as background.

    Args:
        image: index of each box's image, (M,)
        boxes: ground truth XYXY in the cells of each level, (M, L, 4)
        sizes: height and width of the maps

    Returns:
        of each level two of (num_images, 1, Hi, Wi). Foreground: in every cell that a box touches,
        up to one cell beyond its right and lower side, 1 / (cells of the box), the largest of all
        boxes. Background: the same in all other cells, 1 in all.
    """
    axes, first, last = Axes(sizes, boxes.device), boxes[..., :2].floor(), boxes[..., 2:].ceil()
    value = 1 / (last - first + 1).prod(dim=2)
    values = axes.spread(torch.stack([torch.ones_like(value), value], dim=2))
    maps = axes.paint(axes.covered(first, last) * values, image, num_images)
    return [(foreground, _background(foreground)) for foreground in maps]


def focal_masks_of_cells(
    image: Tensor, cells: Sequence[Tensor], num_images: int
) -> List[Tuple[Tensor, Tensor]]:
    """
    As focal_masks, of objects of any shape.

    Args:
        cells: of each level those of M objects, boolean (M, Hi, Wi)
    """
    values = (x / x.sum(dim=(1, 2), keepdim=True).clamp(min=1) for x in cells)
    return [(x, _background(x)) for x in paint_maps(values, image, num_images)]


def _background(foreground: Tensor) -> Tensor:
    background = foreground == 0
    return background / background.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)


class GlobalContext(nn.Module):
    """
    The global context block of FGD's relation loss, after GCNet (https://arxiv.org/abs/1904.11492):
    a vector of the whole map, for each channel, to be added to every cell. It starts as 0.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.attention = nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.attention.bias)
        hidden = max(channels // 2, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        attention = self.attention(x).flatten(2).softmax(dim=2)  # (N, 1, H*W)
        # Not a product under AMP: of thousands of cells each has a share too small for float16.
        with torch.autocast(x.device.type, enabled=False):
            pooled = torch.matmul(x.flatten(2).to(attention.dtype), attention.transpose(1, 2))
        return self.transform(pooled[..., None])  # of (N, C, 1, 1)
