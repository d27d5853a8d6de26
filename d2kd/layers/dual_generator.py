from typing import Optional

import torch
from torch import Tensor, nn

from .generator import Generator


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
        x = x if inside is None else x * inside
        return from_cells + self.from_channels(x * channels, inside, weights[1])
