"""
Deformable convolutions of a ResNet (MODEL.RESNETS.DEFORM_ON_PER_STAGE) on every device.

Detectron2's own have an operator only where it was compiled, and no gradient on a CPU.
"""

from typing import Callable, Optional, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from detectron2.layers import deform_conv as detectron2_operators
from detectron2.modeling.backbone import resnet

from ..utils.compat import has_compiled_operators
from .deform_conv2d import deform_conv2d

COMPILED = has_compiled_operators()


class DeformConv(nn.Module):
    """
    Detectron2's DeformConv and, called with a mask, its ModulatedDeformConv: the same parameters,
    so that checkpoints load, and on a GPU the same operator if it was compiled. Elsewhere
    `deform_conv2d` computes the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, Tuple[int, int]],
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        deformable_groups: int = 1,
        bias: bool = False,
        norm: Optional[nn.Module] = None,
        activation: Optional[Callable[[Tensor], Tensor]] = None,
    ):
        """
        Args:
            deformable_groups: of channels, each with offsets and masks of its own
            norm, activation: applied to the output, in this order
        """
        super().__init__()
        self.stride, self.padding, self.dilation = stride, padding, dilation
        self.groups, self.deformable_groups = groups, deformable_groups
        self.norm, self.activation = norm, activation
        shape = out_channels, in_channels // groups, *_pair(kernel_size)
        self.weight = nn.Parameter(torch.empty(shape))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.weight, nonlinearity="relu")

    def forward(self, x: Tensor, offset: Tensor, mask: Optional[Tensor] = None) -> Tensor:
        """
        Args:
            x: (N, C, H, W)
            offset: (N, 2 * G * Kh * Kw, H', W'), in cells, y and x of each place that the kernel
                reads, for each of G deformable groups
            mask: (N, G * Kh * Kw, H', W'), factors of what is read there

        Returns:
            (N, C', H', W')
        """
        convolve = _by_detectron2 if COMPILED and x.is_cuda else _elsewhere
        # In the weights' precision also under AMP: Detectron2's operator takes no maps of another,
        # and torchvision's has no half precision on CPUs.
        kind, dtype = x.dtype, self.weight.dtype
        with torch.autocast(x.device.type, enabled=False):
            x, offset, mask = (y if y is None else y.to(dtype) for y in (x, offset, mask))
            x = convolve(self, x, offset, mask).to(kind)
        x = x if self.norm is None else self.norm(x)
        return x if self.activation is None else self.activation(x)


def _elsewhere(layer: DeformConv, x: Tensor, offset: Tensor, mask: Optional[Tensor]) -> Tensor:
    how = layer.stride, layer.padding, layer.dilation
    return deform_conv2d(x, offset, layer.weight, layer.bias, *how, mask)


def _by_detectron2(layer: DeformConv, x: Tensor, offset: Tensor, mask: Optional[Tensor]) -> Tensor:
    how = layer.stride, layer.padding, layer.dilation, layer.groups, layer.deformable_groups
    # It refuses a teacher with the channels last, or would read its offsets and masks as if they
    # were in the usual order.
    x, offset, weight = (y.contiguous() for y in (x, offset, layer.weight))
    if mask is None:
        return detectron2_operators.deform_conv(x, offset, weight, *how)
    return detectron2_operators.modulated_deform_conv(
        x, offset, mask.contiguous(), weight, layer.bias, *how
    )


def use_in_resnets() -> None:
    """Let Detectron2's ResNets be built with it from here on."""
    resnet.DeformConv = resnet.ModulatedDeformConv = DeformConv
