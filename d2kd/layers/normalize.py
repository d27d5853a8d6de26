"""Features brought to a common scale: per channel, or per cell."""

from typing import Optional, Tuple

import torch
from torch import Tensor


def standardise(x: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """
    Each channel of (N, C, H, W) to mean 0 and deviation 1 over the batch and all cells.

    With a single value per channel there is no deviation (Bessel's correction divides by zero):
    such a map carries no correlation and becomes 0.

    Args:
        inside: (N, 1, H, W), cells that count; what is outside becomes 0; None: all count
    """
    if inside is None:
        std, mean = std_and_mean(x)
        return (x - mean) / (std + 1e-6)
    count = inside.sum()
    centred = (x - (x * inside).sum(dim=(0, 2, 3), keepdim=True) / count) * inside
    variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / (count - 1).clamp(min=1)
    # A root has no gradient at 0, where a channel is constant.
    return centred / (variance.clamp(min=1e-24).sqrt() + 1e-6)


def std_and_mean(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Of each channel of (N, C, H, W), (1, C, 1, 1); the deviation of a single value is 0."""
    dims, single = (0, 2, 3), x[:, 0].numel() == 1
    return torch.std_mean(x, dim=dims, correction=0 if single else 1, keepdim=True)


def unit_vectors(x: Tensor) -> Tensor:
    """
    (N, C, ...) with vectors of length 1 along C, float32.

    A vector of zeros, where all of a ReLU is dead, stays one and gets no gradient: 1 / length would
    overflow half precision, and with it the whole step.
    """
    x = x.float()
    length = x.norm(dim=1, keepdim=True)
    return x / length.clamp(min=1e-6) * (length > 1e-6)
