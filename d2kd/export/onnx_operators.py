"""What PyTorch's exporter to ONNX does not know: torchvision's deformable convolution."""

from typing import Any

import torch
from torch import nn
from torch.onnx.symbolic_helper import _get_tensor_sizes, parse_args

from ..modeling.deform_conv import DeformConv
from ..modeling.reppoints.points import PointConv

OPSET, WITH_DEFORM_CONV = 16, 19


def opset_of(model: nn.Module) -> int:
    """The version of ONNX's operators that a model needs; its exporter knows them afterwards."""
    if not any(isinstance(x, (DeformConv, PointConv)) for x in model.modules()):
        return OPSET
    name = "torchvision::deform_conv2d"
    torch.onnx.register_custom_op_symbolic(name, _deform_conv, WITH_DEFORM_CONV)
    return WITH_DEFORM_CONV


# v: a value of the graph; i: an integer; b: a boolean
@parse_args(*"vvvvviiiiiiiib")
def _deform_conv(
    graph: Any,
    x: Any,
    weight: Any,
    offset: Any,
    mask: Any,
    bias: Any,
    stride_y: int,
    stride_x: int,
    padding_y: int,
    padding_x: int,
    dilation_y: int,
    dilation_x: int,
    groups: int,
    offset_groups: int,
    has_mask: bool,
) -> Any:
    """The arguments of torchvision's operator, whose offsets are in ONNX's order."""
    return graph.op(
        "DeformConv",
        *(x, weight, offset, bias),
        *([mask] if has_mask else []),
        kernel_shape_i=_get_tensor_sizes(weight)[2:],
        strides_i=[stride_y, stride_x],
        pads_i=[padding_y, padding_x] * 2,
        dilations_i=[dilation_y, dilation_x],
        group_i=groups,
        offset_group_i=offset_groups,
    )
