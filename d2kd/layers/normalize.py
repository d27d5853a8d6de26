"""Normalise features per channel or per cell."""

from typing import Optional

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
        std = x.std(dim=(0, 2, 3), keepdim=True) if x[:, 0].numel() > 1 else 0.0
        return (x - x.mean(dim=(0, 2, 3), keepdim=True)) / (std + 1e-6)
    count = inside.sum()
    centred = (x - (x * inside).sum(dim=(0, 2, 3), keepdim=True) / count) * inside
    variance = centred.square().sum(dim=(0, 2, 3), keepdim=True) / (count - 1).clamp(min=1)
    # sqrt has an infinite gradient at 0, the variance of a constant channel.
    return centred / (variance.clamp(min=1e-24).sqrt() + 1e-6)


def unit_vectors(x: Tensor) -> Tensor:
    """
    Normalise (N, C, ...) to unit length along C, in float32.

    Zero vectors, from ReLUs that are all inactive, stay zero and get no gradient: 1 / length would
    overflow half precision.
    """
    x = x.float()
    length = x.norm(dim=1, keepdim=True)
    return x / length.clamp(min=1e-6) * (length > 1e-6)
