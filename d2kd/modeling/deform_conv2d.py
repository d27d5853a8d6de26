"""Deformable convolution for the CPU: torchvision's, as one sparse and one dense product."""

from contextlib import contextmanager
from typing import Iterator, Optional, Tuple

import torch
import torchvision
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

_ours = True  # on a CPU


@contextmanager
def as_traced() -> Iterator[None]:
    """
    Inside, a detector computes with torchvision's on a CPU too, as its graphs do: ours has the same
    values but for rounding.
    """
    global _ours
    _ours = False
    try:
        yield
    finally:
        _ours = True


def deform_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Optional[Tensor] = None,
    stride: Tuple[int, int] = (1, 1),
    padding: Tuple[int, int] = (0, 0),
    dilation: Tuple[int, int] = (1, 1),
    mask: Optional[Tensor] = None,
) -> Tensor:
    """
    As torchvision's, which is used on a GPU, where it is traced, as exporters know it by name, and
    inside :func:`as_traced`.

    It is written for GPUs: it finds the four cells around each place that the kernel reads, and
    their shares, anew for every channel. Here they are found once, and each moves a whole row of
    channels: an eighth to a fifth of the time, half on maps of a few cells. What the kernel reads
    is kept for the backward.
    """
    if x.is_cuda or torch.jit.is_tracing() or not _ours:
        how = stride, padding, dilation
        return torchvision.ops.deform_conv2d(x, offset, weight, bias, *how, mask)
    kernel = tuple(weight.shape[2:])
    places = _places(offset, kernel, _pair(stride), _pair(padding), _pair(dilation))
    if mask is not None:
        mask = mask.unflatten(1, (-1, *kernel)).permute(0, 4, 5, 1, 2, 3)
    output = _convolve(_read(x, *places, mask), weight)
    return (output if bias is None else output + bias).permute(0, 3, 1, 2)


def _places(
    offset: Tensor,
    kernel: Tuple[int, int],
    stride: Tuple[int, int],
    padding: Tuple[int, int],
    dilation: Tuple[int, int],
) -> Tuple[Tensor, Tensor]:
    """y and x, in cells, of all that is read, each (N, H', W', G, Kh, Kw)."""
    groups = offset.shape[1] // (2 * kernel[0] * kernel[1])
    y, x = offset.unflatten(1, (groups, *kernel, 2)).permute(4, 0, 5, 6, 1, 2, 3)
    rows, columns = (
        torch.arange(outputs)[:, None] * stride[i]
        - padding[i]
        + torch.arange(kernel[i]) * dilation[i]
        for i, outputs in enumerate(offset.shape[2:])
    )
    return y + rows[:, None, None, :, None], x + columns[:, None, None, :]


def _read(features: Tensor, y: Tensor, x: Tensor, mask: Optional[Tensor]) -> Tensor:
    """
    Args:
        features: (N, C, H, W)
        y, x: (N, H', W', G, Kh, Kw)
        mask: of the same shape, factors

    Returns:
        (N, H', W', G, Kh * Kw, C / G)
    """
    images, channels, height, width = features.shape
    groups, places = y.shape[3], y.shape[4:].numel()
    (rows, row_shares), (columns, column_shares) = _neighbours(y, height), _neighbours(x, width)
    share = row_shares[..., :, None] * column_shares[..., None, :]
    if mask is not None:
        share = share * mask[..., None, None]
    cell = rows[..., :, None] * width + columns[..., None, :]
    # A row of the table: of one cell of one image the channels of one deformable group.
    table = features.permute(0, 2, 3, 1).reshape(-1, channels // groups)
    first = torch.arange(images).view(-1, 1, 1, 1, 1, 1, 1, 1) * height * width
    row = (first + cell) * groups + torch.arange(groups).view(-1, 1, 1, 1, 1)
    read = F.embedding_bag(
        row.view(-1, 4), table, mode="sum", per_sample_weights=share.view(-1, 4).to(table.dtype)
    )
    return read.view(*y.shape[:4], places, table.shape[1])


def _neighbours(at: Tensor, size: int) -> Tuple[Tensor, Tensor]:
    """The cells before and after each place along one axis, and their shares; outside, 0."""
    before = at.detach().floor()
    cells = torch.stack([before, before + 1], dim=-1)
    shares = torch.stack([before + 1 - at, at - before], dim=-1)
    inside = (cells >= 0) & (cells < size)
    return cells.clamp(min=0, max=size - 1).long(), shares * inside


def _convolve(read: Tensor, weight: Tensor) -> Tensor:
    """
    Args:
        read: (N, H', W', G, Kh * Kw, C / G)
        weight: (C', C / groups, Kh, Kw)

    Returns:
        (N, H', W', C')
    """
    deformable_groups, _, channels = read.shape[3:]
    groups = deformable_groups * channels // weight.shape[1]
    if groups == 1:  # what is read need not be sorted
        weight = weight.view(len(weight), deformable_groups, channels, -1)
        return read.flatten(3) @ weight.transpose(2, 3).flatten(1).T
    of_group = weight[0].numel()
    read = read.transpose(4, 5).reshape(*read.shape[:3], groups, of_group)
    output = torch.einsum("nyxgi,goi->nyxgo", read, weight.view(groups, -1, of_group))
    return output.flatten(3)
