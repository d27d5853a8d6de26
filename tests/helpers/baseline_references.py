"""
What FGD, CWD, ReviewKD and MAR compute, slowly and in float64: image by image, box by box and cell
by cell, as the equations read. Only the parameters of a head are taken from the code under test.
"""

import math
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from detectron2.structures import Boxes, Instances

from d2kd.heads.fgd import GlobalContext
from d2kd.heads.reviewkd import ReviewFusion
from d2kd.views import Regions, RegionSampler
from d2kd.views.predictions import DensePredictions

from .references import cell_attention, channel_attention
from .toys import FeatureView

Box = Sequence[float]  # XYXY in input pixels


class BoxView(FeatureView):
    """A FeatureView with ground truth, one list of boxes per image; an image may have none."""

    def __init__(
        self,
        features: Mapping[str, Tensor],
        boxes: Sequence[Sequence[Box]],
        image_sizes: Sequence[Tuple[int, int]] = (),
    ):
        super().__init__(features, image_sizes)
        self._boxes = boxes

    @property
    def gt_instances(self) -> List[Instances]:
        found = []
        for boxes, size in zip(self._boxes, self.image_sizes):
            found.append(Instances(size))
            found[-1].gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
        return found


class PartsView(BoxView):
    """A BoxView with towers and RoI features, which are handed out whatever they are asked for."""

    def __init__(
        self,
        features: Mapping[str, Tensor],
        boxes: Sequence[Sequence[Box]],
        image_sizes: Sequence[Tuple[int, int]] = (),
        towers: Optional[Mapping[str, Tensor]] = None,
        rois: Optional[Tensor] = None,
        regions: Optional[Regions] = None,
    ):
        super().__init__(features, boxes, image_sizes)
        self.towers, self.rois, self._regions = towers or {}, rois, regions

    def dense(self) -> DensePredictions:
        maps = list(self.towers.values())
        return DensePredictions(list(self.towers), logits=maps, deltas=maps, tower=maps)

    def regions(self, sampler: RegionSampler) -> Regions:
        return self._regions

    def roi_features(self, boxes: List[Boxes]) -> Tensor:
        assert len(boxes) == len(self.gt_instances)
        return self.rois


def rois_of(boxes: Sequence[Sequence[Box]]) -> Tensor:
    """Boxes of each image -> (M, 5), index of the image first."""
    rows = [[float(n), *box] for n, image in enumerate(boxes) for box in image]
    return torch.tensor(rows, dtype=torch.float32).view(-1, 5)


def zeros(*shape: int) -> Tensor:
    return torch.zeros(*shape, dtype=torch.float64)


class LargestTensor(TorchDispatchMode):
    """While entered, remembers the number of entries of the largest tensor that came about."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Tuple[Any, ...] = (), kwargs: Optional[Dict] = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_flatten(result)[0] if isinstance(x, Tensor)]
        self.entries = max([self.entries, *sizes])
        return result


# FGD ----------------------------------------------------------------------------------------------


def focal_masks(
    boxes: Sequence[Box], height: int, width: int, scale: Tuple[float, float]
) -> Tuple[Tensor, Tensor]:
    """
    Of one image. M_fg: the largest 1 / (h w) of all boxes on the cell, where a box reaches from
    floor(min) to ceil(max), both included; M_bg: equal in all other cells, 1 in all.

    Args:
        scale: cells per pixel, along x and y
    """
    foreground, background = zeros(height, width), zeros(height, width)
    for x0, y0, x1, y1 in boxes:
        left, right = math.floor(x0 * scale[0]), math.ceil(x1 * scale[0])
        top, bottom = math.floor(y0 * scale[1]), math.ceil(y1 * scale[1])
        value = 1 / ((right + 1 - left) * (bottom + 1 - top))
        for i in range(height):
            for j in range(width):
                if top <= i <= bottom and left <= j <= right:
                    foreground[i, j] = max(foreground[i, j].item(), value)
    free = [(i, j) for i in range(height) for j in range(width) if foreground[i, j] == 0]
    for i, j in free:
        background[i, j] = 1 / len(free)
    return foreground, background


def global_context(block: GlobalContext, x: Tensor) -> Tensor:
    """W2 ReLU(LN(W1 sum_ij softmax_ij(Wk F) F)) of one image (C, H, W) -> (C,)."""
    value = {k: v.detach().double() for k, v in block.state_dict().items()}
    cells = x.double().flatten(1).T  # (H*W, C)
    scores = [
        (value["attention.weight"][0, :, 0, 0] @ cell + value["attention.bias"][0]).item()
        for cell in cells
    ]
    powers = [math.exp(s - max(scores)) for s in scores]
    context = sum(p / sum(powers) * cell for p, cell in zip(powers, cells))
    y = value["transform.0.weight"][:, :, 0, 0] @ context + value["transform.0.bias"]
    mean = y.sum() / len(y)
    variance = ((y - mean) ** 2).sum() / len(y)
    y = (y - mean) / torch.sqrt(variance + 1e-5)
    y = y * value["transform.1.weight"][:, 0, 0] + value["transform.1.bias"][:, 0, 0]
    y = torch.tensor([max(v, 0.0) for v in y.tolist()], dtype=torch.float64)
    return value["transform.3.weight"][:, :, 0, 0] @ y + value["transform.3.bias"]


def fgd(
    x: Tensor,
    target: Tensor,
    boxes: Sequence[Sequence[Box]],
    scales: Sequence[Tuple[float, float]],
    temperature: float,
    blocks: Tuple[GlobalContext, GlobalContext],
) -> List[float]:
    """
    L_fg, L_bg, L_at and L_gl of one level, without their weights.

    Args:
        x, target: (N, C, H, W), the student's through its adapter
        blocks: of the student and of the teacher
    """
    images, channels, height, width = x.shape
    foreground = background = attention = context = 0.0
    for n in range(images):
        masks = focal_masks(boxes[n], height, width, scales[n])
        cells, our_cells = (cell_attention(v[n], temperature) for v in (target, x))
        weights, our_weights = (channel_attention(v[n], temperature) for v in (target, x))
        ours, theirs = global_context(blocks[0], x[n]), global_context(blocks[1], target[n])
        for i in range(height):
            for j in range(width):
                attention += abs(cells[0, i, j] - our_cells[0, i, j]).item()
                for c in range(channels):
                    s, t = x[n, c, i, j].item(), target[n, c, i, j].item()
                    error = (cells[0, i, j] * weights[c, 0, 0]).item() * (t - s) ** 2
                    foreground += masks[0][i, j].item() * error
                    background += masks[1][i, j].item() * error
                    context += ((t + theirs[c].item()) - (s + ours[c].item())) ** 2
        for c in range(channels):
            attention += abs(weights[c] - our_weights[c]).item()
    return [v / images for v in (foreground, background, attention, context)]


# CWD ----------------------------------------------------------------------------------------------


def softmax(values: Sequence[float], temperature: float) -> List[float]:
    powers = [math.exp((v - max(values)) / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def cwd(x: Tensor, target: Tensor, temperature: float) -> float:
    """tau^2 / (N C) sum_nc sum_ij phi_t log(phi_t / phi_s), phi = softmax_ij(x / tau)."""
    images, channels = x.shape[:2]
    total = 0.0
    for n in range(images):
        for c in range(channels):
            ours = softmax(x[n, c].flatten().tolist(), temperature)
            theirs = softmax(target[n, c].flatten().tolist(), temperature)
            total += sum(p * math.log(p / q) for p, q in zip(theirs, ours))
    return temperature**2 * total / (images * channels)


# ReviewKD -----------------------------------------------------------------------------------------


def conv_norm(x: Tensor, layers: nn.Sequential) -> Tensor:
    """A convolution without bias, zeros around, and BatchNorm by the statistics of the batch."""
    conv, norm = layers
    weight = conv.weight.detach().double()
    size, (images, _, height, width) = weight.shape[-1], x.shape
    around = zeros(images, x.shape[1], height + size - 1, width + size - 1)
    around[:, :, size // 2 :, size // 2 :][:, :, :height, :width] = x
    y = zeros(images, len(weight), height, width)
    for i in range(height):
        for j in range(width):
            window = around[:, :, i : i + size, j : j + size]
            y[:, :, i, j] = torch.einsum("ncab,ocab->no", window, weight)
    for c in range(len(weight)):
        count = y[:, c].numel()
        mean = y[:, c].sum() / count
        variance = ((y[:, c] - mean) ** 2).sum() / count
        y[:, c] = (y[:, c] - mean) / torch.sqrt(variance + norm.eps)
        y[:, c] = y[:, c] * norm.weight[c].item() + norm.bias[c].item()
    return y


def fuse(block: ReviewFusion, x: Tensor, coarser: Optional[Tensor]) -> Tuple[Tensor, Tensor]:
    """res = z_0 x + z_1 up(coarser), z = sigmoid(conv([x, up(coarser)])); (out, res)."""
    x = conv_norm(x.double(), block.reduce)
    if coarser is not None:
        weight = block.attention.weight.detach().double()[:, :, 0, 0]
        bias = block.attention.bias.detach().double()
        images, _, height, width = x.shape
        fused = torch.zeros_like(x)
        for i in range(height):
            for j in range(width):
                # The cell that the place belongs to on the coarser map
                row, column = i * coarser.shape[2] // height, j * coarser.shape[3] // width
                for n in range(images):
                    ours, theirs = x[n, :, i, j], coarser[n, :, row, column]
                    z = 1 / (1 + torch.exp(-(weight @ torch.cat([ours, theirs]) + bias)))
                    fused[n, :, i, j] = z[0] * ours + z[1] * theirs
        x = fused
    return conv_norm(x, block.expand), x


def window(i: int, cells: int, windows: int) -> range:
    """Which of `cells` the i-th of `windows` spans; a cell may belong to two of them."""
    return range(i * cells // windows, -(-(i + 1) * cells // windows))


def average(x: Tensor, height: int, width: int) -> Tensor:
    """(..., H, W) -> (..., height, width): the mean of each window."""
    y = zeros(*x.shape[:-2], height, width)
    for i in range(height):
        for j in range(width):
            rows, columns = window(i, x.shape[-2], height), window(j, x.shape[-1], width)
            y[..., i, j] = sum(x[..., a, b] for a in rows for b in columns)
            y[..., i, j] /= len(rows) * len(columns)
    return y


def hcl(x: Tensor, target: Tensor) -> float:
    """[MSE + sum w_l MSE(pool_l)] / (1 + sum w_l), l = 4, 2, 1 below H, w = 1/2, 1/4, 1/8."""
    x, target = x.double(), target.double()
    weights = [0.5, 0.25, 0.125]
    total, count = ((x - target) ** 2).mean().item(), 1.0
    for size in (4, 2, 1):
        if size < x.shape[2]:
            weight = weights.pop(0)
            difference = average(x, size, size) - average(target, size, size)
            total += weight * (difference**2).mean().item()
            count += weight
    return total / count


# MAR ----------------------------------------------------------------------------------------------


def stride_of(box: Box, strides: Sequence[int]) -> int:
    """The level of a box: 14 s to 28 s pixels a side belong to stride s = 2^k."""
    side = math.sqrt(max(box[2] - box[0], 0) * max(box[3] - box[1], 0))
    stride = 2 ** math.floor(math.log2(side / 14)) if side else 0
    return min(max(stride, min(strides)), max(strides))


def touched(first: float, last: float, cell: int) -> bool:
    """Whether the cell, [cell, cell + 1], and the side share more than a border; else its start."""
    if math.floor(first) == math.ceil(last):  # no length, on a border of cells
        return cell == first
    return cell < last and cell + 1 > first


def multi_value_mask(
    boxes: Sequence[Box],
    stride: int,
    strides: Sequence[int],
    height: int,
    width: int,
    values: Tuple[float, float, float] = (1.0, 0.5, 0.1),
    near_factor: float = 1.5,
    by_size: bool = True,
    gaussian: bool = False,
) -> Tensor:
    """V of one image and level, (H, W): the largest of what each box gives to a cell."""
    inside, near, far = values
    mask = zeros(height, width) + far
    for box in boxes:
        if by_size and stride_of(box, strides) != stride:
            continue
        x0, y0, x1, y1 = (v / stride for v in box)
        x, y, w, h = (x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0
        ring = [x - near_factor * w / 2, y - near_factor * h / 2]
        ring += [x + near_factor * w / 2, y + near_factor * h / 2]
        for i in range(height):
            for j in range(width):
                if gaussian:
                    across = ((j + 0.5 - x) / (w / 2)) ** 2 / 2
                    value = inside * math.exp(-across - ((i + 0.5 - y) / (h / 2)) ** 2 / 2)
                elif touched(x0, x1, j) and touched(y0, y1, i):
                    value = inside
                elif touched(ring[0], ring[2], j) and touched(ring[1], ring[3], i):
                    value = near
                else:
                    value = far
                mask[i, j] = max(mask[i, j].item(), value)
    return mask


def masked_error(x: Tensor, target: Tensor, mask: Tensor) -> float:
    """sum V ||x - t||^2 / max(1, 2 C sum V) over images and cells; mask (N, H, W)."""
    total = 0.0
    for n in range(len(x)):
        for i in range(x.shape[2]):
            for j in range(x.shape[3]):
                error = ((x[n, :, i, j] - target[n, :, i, j]).double() ** 2).sum()
                total += (mask[n, i, j] * error).item()
    return total / max(1.0, 2 * x.shape[1] * mask.sum().item())


def cosines(pixels: Sequence[Tensor]) -> List[List[float]]:
    """Of each two of P vectors; one of zeros is like nothing, not even itself."""
    lengths = [math.sqrt((v.double() ** 2).sum().item()) for v in pixels]
    return [
        [
            (a.double() @ b.double()).item() / (la * lb) if la > 0 and lb > 0 else 0.0
            for b, lb in zip(pixels, lengths)
        ]
        for a, la in zip(pixels, lengths)
    ]


def relation(x: Sequence[Tensor], target: Sequence[Tensor]) -> float:
    """1 / P^2 sum_mn (R(x) - R(target))_mn^2 between P pixels of one image or region."""
    if not x:
        return 0.0
    rows = zip(cosines(x), cosines(target))
    return sum((a - b) ** 2 for ours, theirs in rows for a, b in zip(ours, theirs)) / len(x) ** 2


def pooled_pixels(x: Tensor, most: int, rows: int, columns: int) -> List[Tensor]:
    """
    One map (C, H, W), averaged to at most `most` cells a side -> the (C,) of each cell that holds
    a part of the image: the mean of those of its cells that do, the first `rows` x `columns`.
    """
    height, width = (min(size, most) for size in x.shape[1:])
    pixels = []
    for i in range(height):
        for j in range(width):
            inside = [
                x[:, a, b].double()
                for a in window(i, x.shape[1], height)
                for b in window(j, x.shape[2], width)
                if a < rows and b < columns
            ]
            if inside:
                pixels.append(sum(inside) / len(inside))
    return pixels
