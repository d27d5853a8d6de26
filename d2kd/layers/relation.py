"""How alike each two pixels of a map are, and where two detectors differ on it."""

from typing import Optional, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .unit import unit_vectors


def relation_error(x: Tensor, target: Tensor, inside: Optional[Tensor] = None) -> Tensor:
    """
    Mean squared difference of the cosines of each two of P pixels.

    Args:
        x, target: (B, C, P) and (B, Ct, P), channels may differ; the target gets no gradient
        inside: boolean (B, P), pixels that count; None: all

    Returns:
        (B,) float32
    """
    with torch.autocast(x.device.type, enabled=False):  # a difference of nearly equal numbers
        difference = _cosines(x, inside) - _cosines(target.detach(), inside)
    pixels = x.shape[2] if inside is None else inside.sum(dim=1).clamp(min=1)
    return difference.square().sum(dim=(1, 2)) / pixels**2


def average_cells(
    x: Tensor, max_cells: int, inside: Optional[Tensor] = None
) -> Tuple[Tensor, Optional[Tensor]]:
    """
    Average a map to at most `max_cells` rows and columns.

    Args:
        x: (N, C, H, W)
        inside: (N, 1, H, W), cells that hold a part of their image, which alone count; None: all

    Returns:
        (N, C, H', W'), and which of its cells hold a part of their image, (N, 1, H', W'), or None
    """
    x = x.float()
    size = [min(cells, max_cells) for cells in x.shape[2:]]
    if inside is None:
        return F.adaptive_avg_pool2d(x, size), None
    share = F.adaptive_avg_pool2d(inside.float(), size)
    pooled = F.adaptive_avg_pool2d(x * inside, size)
    return pooled / share.clamp(min=1e-6), share > 0


def _cosines(x: Tensor, inside: Optional[Tensor]) -> Tensor:
    """(B, C, P) -> (B, P, P)"""
    unit = unit_vectors(x)
    if inside is not None:
        unit = unit * inside[:, None]
    return unit.transpose(1, 2) @ unit
