"""
Masks of the cells inside the image; all others are padding.

`inside` is boolean, (N, 1, H, W); None means that all cells are inside and saves computation.
"""

from typing import Optional

from torch import Tensor


def zero_outside(x: Tensor, inside: Optional[Tensor]) -> Tensor:
    """(N, C, H, W) with the padding set to zero."""
    return x if inside is None else x * inside


def mean_inside(x: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """(N, C, H, W) -> (N, C, 1, 1): the mean over the cells that are inside the image."""
    if inside is None:
        return x.mean(dim=(2, 3), keepdim=True)
    return (x * inside).sum(dim=(2, 3), keepdim=True) / inside.sum(dim=(2, 3), keepdim=True)
