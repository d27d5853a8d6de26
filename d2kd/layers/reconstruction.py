"""Generators of MGD and DMKD, and the reconstruction error."""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .inside import zero_outside

# Weight and bias of a convolution
Parameters = Tuple[Tensor, Tensor]


class Generator(nn.Sequential):
    """MGD's generator, (N, C, H, W) -> the same shape: 3x3 conv, ReLU, 3x3 conv, no norm."""

    def __init__(self, channels: int):
        super().__init__(
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        )

    def forward(
        self, x: Tensor, inside: Optional[Tensor] = None, output: Optional[Parameters] = None
    ) -> Tensor:
        """
        Args:
            x: masked features, 0 where hidden and outside the image
            inside: (N, 1, H, W), cells inside the image; None: all
            output: the second convolution's parameters, in place of its own

        Returns:
            (N, C, H, W); inside an image it does not depend on the amount of padding
        """
        first, relu, second = self
        # Zero the padding again, so that the second convolution sees the image border.
        hidden = zero_outside(relu(first(x)), inside)
        if output is None:
            return second(hidden)
        return F.conv2d(hidden, *output, padding=1)

    def output(self, scale: Tensor) -> Parameters:
        """
        The second convolution's parameters, times a scalar: scaling what it gives would keep all of
        that for the backward pass.
        """
        return self[-1].weight * scale, self[-1].bias * scale


class DualGenerator(nn.Module):
    """
    DMKD's reconstruction: one generator gets the visible cells, the other the visible channels;
    their outputs are fused with two learned weights (softmax, initially equal).
    """

    def __init__(self, channels: int):
        super().__init__()
        self.from_cells = Generator(channels)
        self.from_channels = Generator(channels)
        self.fusion = nn.Parameter(torch.zeros(2))

    def outputs(self) -> List[Parameters]:
        """The last parameters of each generator, times its weight in the fusion."""
        weights = self.fusion.softmax(dim=0)
        generators = self.from_cells, self.from_channels
        return [x.output(weight) for x, weight in zip(generators, weights)]

    def forward(
        self,
        x: Tensor,
        cells: Tensor,
        channels: Tensor,
        inside: Optional[Tensor] = None,
        outputs: Optional[List[Parameters]] = None,
    ) -> Tensor:
        """
        Args:
            x: adapted student features, (N, C, H, W)
            cells: visible cells, (N, 1, H, W), False outside the image
            channels: visible channels, (N, C, 1, 1)
            inside: cells inside the image, (N, 1, H, W); None: all
            outputs: of :meth:`outputs`, where several maps in a step share them

        Returns:
            (N, C, H, W)
        """
        of_cells, of_channels = outputs or self.outputs()
        from_cells = self.from_cells(x * cells, inside, of_cells)
        x = zero_outside(x, inside) * channels
        return from_cells + self.from_channels(x, inside, of_channels)


def squared_error(
    rebuilt: Tensor, target: Tensor, inside: Optional[Tensor] = None, weight: float = 1.0
) -> Tensor:
    """
    Squared error, summed over channels and the cells inside the image, averaged over images.

    Args:
        rebuilt, target: (N, C, H, W); the target gets no gradient
        inside: (N, 1, H, W), cells inside the image; None: all
        weight: by which it is multiplied

    Returns:
        scalar, float32 also under AMP, as a sum over 100,000 cells overflows half precision
    """
    rebuilt, target = rebuilt.float(), target.detach().float()
    error = F.mse_loss(zero_outside(rebuilt, inside), zero_outside(target, inside), reduction="sum")
    return error * (weight / len(rebuilt))
