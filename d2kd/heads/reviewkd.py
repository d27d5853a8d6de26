from typing import Dict, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..pairing.levels import LevelPair, match_levels
from ..utils.checks import MAX_CHANNELS, check_range
from ..views import DetectorView
from .registry import DISTILL_HEAD_REGISTRY

# Values per channel, fewer of which BatchNorm sees in float32 also under AMP: of the 2 to 8 that P7
# of a small image has, its gradient is a difference of nearly equal numbers. So few cost no time.
_FEW = 64


@DISTILL_HEAD_REGISTRY.register()
class ReviewKDHead(nn.Module):
    """
    Knowledge Review, https://arxiv.org/abs/2104.09044 (exact, after the authors' released detection
    code): walk the student's pyramid from coarse to fine, join each level with what the coarser
    ones gave, and compare what comes out with the teacher's level at several scales.

    Shapes: N images; Cs, Ct student and teacher channels; Hi, Wi height and width of level i.

    Attributes:
        loss_weight: published: RetinaNet R50 1.0; Faster R-CNN R18 1.2, R50 1.0, MobileNetV2 2.0;
            Mask R-CNN R18 1.5, R50 0.8, MobileNetV2 1.0
    """

    loss_weight = 1.0

    def __init__(self, *, levels: Sequence[LevelPair], mid_channels: int = 256):
        """
        Args:
            levels: the pairs of levels to distil
            mid_channels: of what is passed on from level to level
        """
        super().__init__()
        check_range("mid_channels", mid_channels, 1, MAX_CHANNELS)
        # In the released code by position; strides say the same and cannot be out of order.
        self.levels = sorted(levels, key=lambda p: p.student_stride, reverse=True)
        self.fusion = nn.ModuleDict(
            {
                p.student: ReviewFusion(p.student_channels, mid_channels, p.teacher_channels, i > 0)
                for i, p in enumerate(self.levels)
            }
        )

    def forward(self, student: DetectorView, teacher: DetectorView) -> Dict[str, Dict[str, Tensor]]:
        """
        ::

            X_i, G_i = fusion_i(S_i, G_{i+1}),  from coarse to fine
            loss = sum over k of w_k mean (pool_k(X_i) - pool_k(T_i))^2 / sum over k of w_k
            w_k = 1, 1/2, 1/4, 1/8 for the map itself and its averages over 4x4, 2x2, 1x1 windows

        Args:
            student, teacher: views with features S_i (N, Cs, Hi, Wi) and T_i (N, Ct, Hi, Wi)

        Returns:
            {"loss_reviewkd": {level: scalar}}, which is summed over levels
        """
        losses, gathered = {}, None
        for level, x, target in match_levels(self.levels, student.features, teacher.features):
            x, gathered = self.fusion[level](x, gathered)
            losses[level] = pyramid_error(x, target)
        return {"loss_reviewkd": losses}


class ReviewFusion(nn.Module):
    """
    Attention Based Fusion: one level of the student, joined with what was gathered from all coarser
    levels by two attention maps.
    """

    def __init__(self, in_channels: int, mid_channels: int, out_channels: int, fuse: bool):
        """
        Args:
            fuse: False for the coarsest level, which has nothing to be joined with
        """
        super().__init__()
        self.reduce = _conv_norm(in_channels, mid_channels, kernel_size=1)
        self.expand = _conv_norm(mid_channels, out_channels, kernel_size=3)
        self.attention = nn.Conv2d(2 * mid_channels, 2, kernel_size=1) if fuse else None

    def forward(self, x: Tensor, coarser: Optional[Tensor] = None) -> Tuple[Tensor, Tensor]:
        """
        Args:
            x: (N, Cs, H, W)
            coarser: what the next coarser level gave as `gathered`, (N, mid_channels, H', W')

        Returns:
            to be compared with the teacher, (N, Ct, H, W); `gathered`, (N, mid_channels, H, W)
        """
        if x[:, 0].numel() >= _FEW:
            return self._fuse(x, coarser)
        with torch.autocast(x.device.type, enabled=False):
            # A coarser level has fewer still, and is in float32 already.
            return self._fuse(x.to(torch.promote_types(x.dtype, torch.float32)), coarser)

    def _fuse(self, x: Tensor, coarser: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
        x = self.reduce(x)
        if self.attention is not None:
            coarser = F.interpolate(coarser, x.shape[-2:], mode="nearest")
            weights = self.attention(torch.cat([x, coarser], dim=1)).sigmoid()
            x = x * weights[:, :1] + coarser * weights[:, 1:]
        return self.expand(x), x


def pyramid_error(x: Tensor, target: Tensor) -> Tensor:
    """
    Hierarchical Context Loss: the mean squared error of a map, and of its averages over 4x4, 2x2
    and 1x1 windows as far as these are fewer than its rows. Each counts half as much as the one
    before; the weights are divided by their sum.

    Args:
        x, target: (N, C, H, W)
    """
    x, target = x.float(), target.detach().float()
    total, weight, weights = F.mse_loss(x, target), 1.0, 1.0
    for size in (4, 2, 1):
        if size < x.shape[2]:
            pooled = (F.adaptive_avg_pool2d(v, size) for v in (x, target))
            weight /= 2
            weights += weight
            total = total + weight * F.mse_loss(*pooled)
    return total / weights


def _conv_norm(in_channels: int, out_channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    return nn.Sequential(conv, _BatchNorm(out_channels))


class _BatchNorm(nn.BatchNorm2d):
    """Takes a single image of a single cell, which has no deviation, by its running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x[:, 0].numel() > 1:
            return super().forward(x)
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
        )
