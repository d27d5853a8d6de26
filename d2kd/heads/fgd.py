from typing import Dict, Sequence, Tuple

import torch
from torch import Tensor, nn

from ..layers import build_adapters, channel_attention, covered, paint, spatial_attention
from ..pairing.levels import LevelPair, match_levels
from ..utils.checks import check_temperature, check_weight
from ..views import DetectorView, Regions
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
        legacy_scale: bool = False,
    ):
        """
        Args:
            levels: the pairs of levels to distil
            foreground_weight: alpha; published: 1e-3 for RetinaNet, 1.6e-3 for FCOS, 5e-5 for
                two-stage students
            background_weight: beta; 5e-4, 8e-4, 2.5e-5
            attention_weight: gamma; 5e-4, 8e-4, 5e-5
            global_weight: lambda, of the global context; 5e-6, 8e-6, 5e-7
            temperature: T of both attentions, > 0: 0.5, and 0.8 for FCOS
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
        self.levels = levels
        self.temperature = temperature
        self.legacy_scale = legacy_scale
        self.adapter = build_adapters(levels)
        self.student_context, self.teacher_context = (
            nn.ModuleDict({p.student: GlobalContext(p.teacher_channels) for p in levels})
            for _ in range(2)
        )

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
        losses: Dict[str, Dict[str, Tensor]] = {f"loss_fgd_{term}": {} for term in self.weights}
        self.maps = {"foreground": {}}
        rois = Regions([x.gt_boxes for x in student.gt_instances]).rois
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x, target = self.adapter[level](x), target.detach()
            boxes = self._in_cells(rois, student, level, target)
            foreground, background = focal_masks(rois[:, 0].long(), boxes, target)
            terms = self._terms(level, x.float(), target.float(), foreground, background)
            for term, value in terms.items():
                losses[f"loss_fgd_{term}"][level] = self.weights[term] * value / len(x)
            self.maps["foreground"][level] = foreground
        return losses

    def _terms(
        self, level: str, x: Tensor, target: Tensor, foreground: Tensor, background: Tensor
    ) -> Dict[str, Tensor]:
        """Each term without its weight, summed over images."""
        cells, our_cells = (spatial_attention(v, self.temperature) for v in (target, x))
        channels, our_channels = (channel_attention(v, self.temperature) for v in (target, x))
        error = ((x - target).square() * channels).sum(dim=1, keepdim=True) * cells
        attention = (channels - our_channels).abs().sum() + (cells - our_cells).abs().sum()
        terms = {
            "foreground": (error * foreground).sum(),
            "background": (error * background).sum(),
            "attention": attention,
        }
        ours, theirs = self.student_context[level](x), self.teacher_context[level](target)
        return {**terms, "global": (x - target + (ours - theirs)).square().sum()}

    def _in_cells(self, rois: Tensor, view: DetectorView, level: str, like: Tensor) -> Tensor:
        """(M, 5) in input pixels -> boxes XYXY in cells of the level, (M, 4)."""
        boxes = rois[:, 1:].float()
        if not self.legacy_scale:
            return boxes / view.strides[level]
        height, width = like.shape[-2:]
        sizes = torch.tensor([(w, h, w, h) for h, w in view.image_sizes])
        sizes = sizes.to(like.device, non_blocking=True)[rois[:, 0].long()]
        # In this order: a box that ends with the image may not be rounded beyond the map.
        return boxes / sizes * boxes.new_tensor([width, height, width, height])


def focal_masks(image: Tensor, boxes: Tensor, like: Tensor) -> Tuple[Tensor, Tensor]:
    """
    How much each cell counts as foreground and as background.

    Args:
        image: index of each box's image, (M,)
        boxes: ground truth XYXY in cells, (M, 4)
        like: a map of the level, (N, C, Hi, Wi)

    Returns:
        two of (N, 1, Hi, Wi). Foreground: in every cell that a box touches, up to one cell beyond
        its right and lower side, 1 / (cells of the box), the largest of all boxes. Background: the
        same in all other cells, 1 in all.
    """
    images, _, height, width = like.shape
    first, last = boxes[:, :2].floor(), boxes[:, 2:].ceil()
    value = 1 / (last - first + 1).prod(dim=1, keepdim=True)
    columns = covered(first[:, 0], last[:, 0], width)
    foreground = paint(covered(first[:, 1], last[:, 1], height) * value, columns, image, images)
    background = (foreground == 0).float()
    total = background.sum(dim=(1, 2, 3), keepdim=True).clamp(min=1)
    return foreground, background / total


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
