from typing import Optional

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PerAnchorLinear(nn.Module):
    """
    A linear map without bias for each anchor of a cell: the anchors share the cell's feature, and
    only their maps tell them apart.
    """

    def __init__(self, in_channels: int, out_channels: int, num_anchors: int = 1):
        super().__init__()
        linear = [nn.Linear(in_channels, out_channels, bias=False) for _ in range(num_anchors)]
        self.weight = nn.Parameter(torch.stack([x.weight.detach() for x in linear]))  # (A, D, C)

    def forward(self, x: Tensor, anchor: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x: (R, C)
            anchor: (R,) integers below A; None where A is 1

        Returns:
            (R, D)
        """
        if len(self.weight) == 1:
            return F.linear(x, self.weight[0])
        # Anchor by anchor: all maps on all rows would be A times the arithmetic.
        order = anchor.argsort()
        rows = x[order].split(anchor.bincount(minlength=len(self.weight)).tolist())
        return torch.cat([F.linear(r, w) for r, w in zip(rows, self.weight)])[order.argsort()]
