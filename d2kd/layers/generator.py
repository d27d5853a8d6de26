from torch import nn


def build_generator(channels: int) -> nn.Module:
    """MGD's generator, (N, C, H, W) -> the same shape: 3x3 conv, ReLU, 3x3 conv, no norm."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(channels, channels, kernel_size=3, padding=1),
    )
