"""
What RoIAlign and the heads for RoI features compute, slowly and in float64: point by point, one
region and one level at a time. Only the parameters of a head are taken from the code under test.
"""

import math
from typing import List, Sequence, Tuple

import torch
from torch import Tensor, nn


def bilinear(image: Tensor, y: float, x: float) -> Tensor:
    """
    (C, H, W) at a point whose integers are the centres of cells -> (C,). Beyond the outer centres
    the edge goes on for one cell; after that comes 0.
    """
    _, height, width = image.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return torch.zeros(len(image), dtype=torch.float64)
    y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
    top, left = int(y), int(x)
    below, right = min(top + 1, height - 1), min(left + 1, width - 1)
    v, u = y - top, x - left
    upper = (1 - u) * image[:, top, left] + u * image[:, top, right]
    lower = (1 - u) * image[:, below, left] + u * image[:, below, right]
    return (1 - v) * upper + v * lower


def roi_align(
    image: Tensor, box: Sequence[float], stride: int, size: int = 7, sampling_ratio: int = 0
) -> Tensor:
    """
    Each of size x size cells of the box is the mean over a grid of points in it.

    Args:
        image: (C, H, W); its cell (0, 0) spans the pixels 0 to stride, so has its centre at
            stride / 2, which is the point (0, 0)
        box: XYXY in pixels
        sampling_ratio: points along a side of a cell; 0: as many as map cells fit, rounded up
    """
    x0, y0, x1, y1 = (v / stride - 0.5 for v in box)
    height, width = (y1 - y0) / size, (x1 - x0) / size  # of a cell of the result
    rows = sampling_ratio or math.ceil(height)
    columns = sampling_ratio or math.ceil(width)
    image = image.detach().double()
    out = torch.zeros(len(image), size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            for a in range(rows):
                for b in range(columns):
                    y = y0 + height * (i + (a + 0.5) / rows)
                    x = x0 + width * (j + (b + 0.5) / columns)
                    out[:, i, j] += bilinear(image, y, x) / (rows * columns)
    return out


def pool_all_levels(
    maps: Sequence[Tensor],
    strides: Sequence[int],
    rois: Tensor,
    size: int = 7,
    sampling_ratio: int = 0,
) -> Tensor:
    """L maps (N, C, Hi, Wi) and (R, 5) rois, index of the image first -> (R, L, C, size, size)."""
    regions = []
    for image, *box in rois.tolist():
        levels = [
            roi_align(x[int(image)], box, stride, size, sampling_ratio)
            for x, stride in zip(maps, strides)
        ]
        regions.append(torch.stack(levels))
    return torch.stack(regions)


def assigned_level(box: Sequence[float], strides: Sequence[int]) -> int:
    """Index into `strides`, finest first: a box of 224 pixels a side belongs to stride 16."""
    x0, y0, x1, y1 = box
    level = math.floor(4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224))
    levels = [int(math.log2(stride)) for stride in strides]
    return levels.index(min(max(level, levels[0]), levels[-1]))


def pool_assigned_level(maps: Sequence[Tensor], strides: Sequence[int], rois: Tensor) -> Tensor:
    """Like pool_all_levels, but of each region the one level of its size, (R, C, 7, 7)."""
    regions = []
    for image, *box in rois.tolist():
        i = assigned_level(box, strides)
        regions.append(roi_align(maps[i][int(image)], box, strides[i]))
    return torch.stack(regions)


def adapt(x: Tensor, adapter: nn.Conv2d) -> Tensor:
    """A 1x1 convolution with its bias, cell by cell: (Cs, S, S) -> (Ct, S, S)."""
    weight = adapter.weight.detach().double()[:, :, 0, 0]
    bias = adapter.bias.detach().double()
    out = torch.zeros(len(weight), *x.shape[1:], dtype=torch.float64)
    for i in range(x.shape[1]):
        for j in range(x.shape[2]):
            out[:, i, j] = weight @ x[:, i, j] + bias
    return out


def convolve(x: Tensor, layer: nn.Conv2d, stride: int = 2) -> Tensor:
    """Without padding: (Cin, S, S) -> (Cout, S', S'), S' = (S - kernel) // stride + 1."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    kernel = weight.shape[-1]
    size = (x.shape[-1] - kernel) // stride + 1
    out = torch.zeros(len(weight), size, size, dtype=torch.float64)
    for i in range(size):
        for j in range(size):
            window = x[:, i * stride : i * stride + kernel, j * stride : j * stride + kernel]
            out[:, i, j] = (weight * window).sum(dim=(1, 2, 3)) + bias
    return out


def relu(x: Tensor, negative_slope: float) -> Tensor:
    return torch.where(x > 0, x, negative_slope * x)


def embed(x: Tensor, convs: Sequence[nn.Conv2d], slope: float, last_relu: bool = True) -> Tensor:
    """Two 3x3 convolutions of stride 2, a (leaky) ReLU after each: (C, S, S) -> (d,)."""
    first, second = convs
    x = convolve(relu(convolve(x.double(), first), slope), second)
    return (relu(x, slope) if last_relu else x).flatten()


def softmax(values: Sequence[float]) -> List[float]:
    powers = [math.exp(v - max(values)) for v in values]
    return [p / sum(powers) for p in powers]


def sgfi(
    pooled: Tensor,
    target: Tensor,
    adapter: nn.Conv2d,
    convs: Sequence[nn.Conv2d],
    temperature: float,
    negative_slope: float = 0.0,
    last_relu: bool = True,
    over_regions: bool = False,
) -> Tuple[float, Tensor]:
    """
    K^s_l = embed(adapt(S_l)), K^t = embed(T), alpha = softmax_l(K^s_l . K^t / temperature);
    mean over regions and over C*S*S of (sum_l alpha_l adapt(S_l) - T)^2

    Args:
        pooled: the student's raw features S, (R, L, Cs, S, S)
        target: the teacher's T, (R, Ct, S, S)
        last_relu: False: a known mistake, the embedding ends without its ReLU
        over_regions: True: a known mistake, the softmax is over regions

    Returns:
        the loss and alpha (R, L)
    """
    adapted = [[adapt(x, adapter) for x in region] for region in pooled]
    similarity = []
    for levels, goal in zip(adapted, target):
        theirs = embed(goal, convs, negative_slope, last_relu)
        ours = [embed(x, convs, negative_slope, last_relu) for x in levels]
        similarity.append([float(x @ theirs) / temperature for x in ours])
    if over_regions:
        columns = [softmax(column) for column in zip(*similarity)]
        alpha = [list(row) for row in zip(*columns)]
    else:
        alpha = [softmax(row) for row in similarity]
    total = 0.0
    for weights, levels, goal in zip(alpha, adapted, target):
        mixture = sum(a * x for a, x in zip(weights, levels))
        total += ((mixture - goal.double()) ** 2).mean().item()
    return total / len(target), torch.tensor(alpha, dtype=torch.float64)


def roi_fi(pooled: Tensor, target: Tensor, adapter: nn.Conv2d) -> float:
    """Mean over regions and entries of (adapt(S) - T)^2; both (R, C, S, S) of assigned levels."""
    errors = [((adapt(x, adapter) - t.double()) ** 2).mean() for x, t in zip(pooled, target)]
    return float(sum(errors)) / len(errors)
