import torch
from torch import Tensor, nn


class GlobalContext(nn.Module):
    """
    The global context block of FGD's relation loss, after GCNet (https://arxiv.org/abs/1904.11492):
    a vector of the whole map, for each channel, to be added to every cell. It starts as 0.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.attention = nn.Conv2d(channels, 1, kernel_size=1)
        nn.init.kaiming_normal_(self.attention.weight, mode="fan_in", nonlinearity="relu")
        nn.init.zeros_(self.attention.bias)
        hidden = max(channels // 2, 1)
        self.transform = nn.Sequential(
            nn.Conv2d(channels, hidden, kernel_size=1),
            nn.LayerNorm([hidden, 1, 1]),
            nn.ReLU(inplace=True),
            nn.Conv2d(hidden, channels, kernel_size=1),
        )
        nn.init.zeros_(self.transform[-1].weight)
        nn.init.zeros_(self.transform[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C, 1, 1)"""
        attention = self.attention(x).flatten(2).softmax(dim=2)  # (N, 1, H*W)
        # Not a product under AMP: of thousands of cells each has a share too small for float16.
        with torch.autocast(x.device.type, enabled=False):
            pooled = torch.matmul(x.flatten(2).to(attention.dtype), attention.transpose(1, 2))
        return self.transform(pooled[..., None])  # of (N, C, 1, 1)
