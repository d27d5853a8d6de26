from typing import Optional

from torch import Tensor, nn
from torch.nn import functional as F


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
        hidden = relu(first(x))
        if inside is not None:
            hidden = hidden * inside  # what the second convolution would see were there no padding
        if scale is None:
            return second(hidden)
        # In the weights: multiplied later, the whole result would be kept for the backward.
        return F.conv2d(hidden, second.weight * scale, second.bias * scale, padding=1)
