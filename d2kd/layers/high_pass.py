import math
from typing import Optional

import torch
from torch import Tensor
from torch.nn import functional as F


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
