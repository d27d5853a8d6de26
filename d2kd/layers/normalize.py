"""Normalise features per channel or per cell."""

from typing import Optional, Tuple

import torch
from torch import Tensor


def standardise(x: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """
    Normalise each channel of (N, C, H, W) to zero mean and unit variance over batch and cells.

    With a single value per channel the variance is undefined (Bessel's correction divides by zero):
    such a map has no correlation and becomes 0.

    Args:
        inside: (N, 1, H, W), cells to use; the others become 0; None: all
    """
    if inside is None:
        std, mean = std_and_mean(x)
        return (x - mean) / (std + 1e-6)
    count = inside.sum()
    centred = (x - (x * inside).sum(dim=(0, 2, 3), keepdim=True) / count) * inside
    variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / (count - 1).clamp(min=1)
    # sqrt has an infinite gradient at 0, the variance of a constant channel.
    return centred / (variance.clamp(min=1e-24).sqrt() + 1e-6)


def std_and_mean(x: Tensor) -> Tuple[Tensor, Tensor]:
    """Of each channel of (N, C, H, W), (1, C, 1, 1); the deviation of a single value is 0."""
    dims, single = (0, 2, 3), x[:, 0].numel() == 1
    return torch.std_mean(x, dim=dims, correction=0 if single else 1, keepdim=True)


def unit_vectors(x: Tensor) -> Tensor:
    """
    Normalise (N, C, ...) to unit length along C, in float32.

    Zero vectors, from ReLUs that are all inactive, stay zero and get no gradient: 1 / length would
    overflow half precision.
    """
    x = x.float()
    length = x.norm(dim=1, keepdim=True)
    return x / length.clamp(min=1e-6) * (length > 1e-6)
