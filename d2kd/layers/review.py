"""The two pieces of ReviewKD: fusion of levels, and the loss over a pyramid of averages."""

from typing import Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Values per channel, fewer of which BatchNorm sees in float32 also under AMP: of the 2 to 8 that P7
# of a small image has, its gradient is a difference of nearly equal numbers. So few cost no time.
_FEW = 64


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
