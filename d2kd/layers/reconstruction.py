"""MGD's and DMKD's generators, and the error of what they rebuild."""

from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inside import zero_outside


class Generator(nn.Sequential):
    """MGD's generator, (N, C, H, W) -> the same shape: 3x3 conv, ReLU, 3x3 conv, no norm."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(
        self, x: Tensor, inside: Optional[Tensor] = None, scale: Optional[Tensor] = None
    ) -> Tensor:
        """
        Args:
            x: masked features, 0 where hidden and outside the image
            inside: (N, 1, H, W), cells that hold a part of their image; None: all do
            scale: scalar that multiplies the result

        Returns:
            (N, C, H, W); inside an image it does not depend on how far it was padded
        """
        first, relu, second = self
        # What the second convolution would see were there no padding.
        hidden = zero_outside(relu(first(x)), inside)
        if scale is None:
            return second(hidden)
        # In the weights: multiplied later, the whole result would be kept for the backward.
        return F.conv2d(hidden, second.weight * scale, second.bias * scale, padding=1)


class DualGenerator(nn.Module):
    """
    DMKD's reconstruction: one generator sees the visible cells, the other the visible channels, and
    two learned weights (softmax, equal at first) fuse what they rebuild.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.from_cells = Generator(channels)
        self.from_channels = Generator(channels)
        self.fusion = nn.Parameter(torch.zeros(2))

    def forward(
        self, x: Tensor, cells: Tensor, channels: Tensor, inside: Optional[Tensor] = None
    ) -> Tensor:
        """
        Args:
            x: adapted student features, (N, C, H, W)
            cells: visible cells, (N, 1, H, W), False outside the image
            channels: visible channels, (N, C, 1, 1)
            inside: cells that hold a part of their image, (N, 1, H, W); None: all do

        Returns:
            (N, C, H, W)
        """
        weights = self.fusion.softmax(dim=0)
        from_cells = self.from_cells(x * cells, inside, weights[0])
        x = zero_outside(x, inside) * channels
        return from_cells + self.from_channels(x, inside, weights[1])


def squared_error(rebuilt: Tensor, target: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """
    Squared error, summed over channels and the cells inside the image, averaged over images.

    Args:
        rebuilt, target: (N, C, H, W); the target gets no gradient
        inside: (N, 1, H, W); None: all cells count

    Returns:
        scalar in float32 also under AMP: a sum over 100,000 cells overflows half precision
    """
    rebuilt, target = rebuilt.float(), target.detach().float()
    error = F.mse_loss(zero_outside(rebuilt, inside), zero_outside(target, inside), reduction="sum")
    return error / len(rebuilt)
