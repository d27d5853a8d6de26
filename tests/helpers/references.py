"""
What the heads for masked features compute, slowly and in float64, one image (C, H, W) at a time and
without padding: whoever has padding cuts it off first (see `parts`).
"""

import math
from fractions import Fraction
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from d2kd.layers import AttentionGuide, DualGenerator, Generator, MaskRule

# Masks that draw nothing: what is hidden follows from the features.
MOST = MaskRule(hide="most")
BOTH_MOST = {"cell_mask": MOST, "channel_mask": MaskRule(ratio=0.5, hide="most")}


def parts(x: Tensor, image_sizes: Sequence[Tuple[int, int]] = ()) -> List[Tensor]:
    """(N, C, H, W) of stride 8 -> of each image the cells that hold at least one of its pixels."""
    if not image_sizes:
        return list(x)
    return [
        image[:, : math.ceil(height / 8), : math.ceil(width / 8)]
        for image, (height, width) in zip(x, image_sizes)
    ]


def conv(x: Tensor, layer: nn.Module) -> Tensor:
    """Stride 1, zeros around so that the size stays: (Cin, H, W) -> (Cout, H, W)."""
    if isinstance(layer, nn.Identity):
        return x
    weight, (height, width) = layer.weight.detach().double(), x.shape[1:]
    size = weight.shape[-1]
    around = torch.zeros(len(x), height + size - 1, width + size - 1, dtype=torch.float64)
    around[:, size // 2 :, size // 2 :][:, :height, :width] = x
    y = layer.bias.detach().double()[:, None, None].expand(-1, height, width)
    for i in range(size):
        for j in range(size):
            shifted = around[:, i : i + height, j : j + width]
            y = y + torch.einsum("oc,chw->ohw", weight[:, :, i, j], shifted)
    return y


def generate(generator: Generator, x: Tensor) -> Tensor:
    first, _, second = generator
    return conv(conv(x, first).clamp(min=0), second)


def generate_from_both(
    generator: DualGenerator, x: Tensor, cells: Tensor, channels: Tensor
) -> Tensor:
    """w_s G_s(X * M_s) + w_c G_c(X * M_c), (w_s, w_c) = softmax(a)."""
    a, b = generator.fusion.exp().tolist()
    return (
        a * generate(generator.from_cells, x * cells)
        + b * generate(generator.from_channels, x * channels)
    ) / (a + b)


def mean_one_softmax(scores: Tensor, temperature: float) -> Tensor:
    """n softmax(scores / temperature) over all n entries."""
    e = torch.exp((scores - scores.max()) / temperature)
    return len(scores.flatten()) * e / e.sum()


def cell_attention(x: Tensor, temperature: float) -> Tensor:
    """HW softmax_ij(1/C sum_c |x_cij| / temperature), (1, H, W)."""
    return mean_one_softmax(x.abs().sum(dim=0, keepdim=True) / len(x), temperature)


def channel_attention(x: Tensor, temperature: float) -> Tensor:
    """C softmax_c(1/HW sum_ij |x_cij| / temperature), (C, 1, 1)."""
    return mean_one_softmax(x.abs().sum(dim=(1, 2)) / x[0].numel(), temperature)[:, None, None]


def hidden_count(ratio: float, entries: int) -> int:
    """ceil(ratio * entries), for the decimal number that `ratio` was written as."""
    return math.ceil(Fraction(str(ratio)) * entries)


def visible(rule: MaskRule, attention: Tensor) -> Tensor:
    """1.0 visible, 0.0 hidden, as `attention`; rules without chance."""
    values = attention.flatten().tolist()
    if rule.rule == "threshold":
        hidden = [i for i, a in enumerate(values) if (a >= rule.threshold) == (rule.hide == "most")]
    else:
        order = sorted(range(len(values)), key=values.__getitem__, reverse=rule.hide == "most")
        hidden = order[: hidden_count(rule.ratio, len(values))]
    mask = [0.0 if i in hidden else 1.0 for i in range(len(values))]
    return torch.tensor(mask, dtype=torch.float64).view_as(attention)


def guide_of(guide: AttentionGuide, x: Tensor, target: Tensor) -> Tensor:
    return {"teacher": target, "student": x}[guide.source]


def masks_of(
    cell_mask: MaskRule,
    channel_mask: Optional[MaskRule],
    guide: AttentionGuide,
    x: Tensor,
    target: Tensor,
) -> Tuple[Tensor, Tensor]:
    """Visible cells (1, H, W) and channels (C, 1, 1) by attention over the whole image."""
    source = guide_of(guide, x, target)
    return (
        visible(cell_mask, cell_attention(source, guide.temperature)),
        visible(channel_mask, channel_attention(source, guide.temperature)),
    )


def standardise(images: Sequence[Tensor]) -> List[Tensor]:
    """(x - mean) / (std + 1e-6) per channel over all cells of all images, std with m - 1."""
    values = torch.cat([x.flatten(1) for x in images], dim=1)
    m = values.shape[1]
    mean = values.sum(dim=1) / m
    deviation = ((values - mean[:, None]) ** 2).sum(dim=1).div(m - 1).sqrt()
    return [(x - mean[:, None, None]) / (deviation[:, None, None] + 1e-6) for x in images]
