"""Deformable convolutions of a ResNet, on a CPU and without Detectron2's operators."""

from functools import partial
from typing import Any, Dict, List, Optional, Tuple

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair

import detectron2.layers
from detectron2.modeling import build_model
from detectron2.modeling.backbone import resnet

from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.half_precision import runs_in_float16
from d2kd.modeling import deform_conv
from d2kd.modeling.deform_conv import DeformConv
from d2kd.modeling.deform_conv2d import deform_conv2d
from tests.helpers.toys import detector_config, noise

# Channels of the layers below are 4 -> 6.
SHAPES = [
    {"padding": 1},
    {"padding": 1, "stride": 2, "groups": 2},
    {"padding": 2, "dilation": 2, "deformable_groups": 2},
    {"stride": 2, "dilation": 2, "groups": 2, "deformable_groups": 4},
]


def layer_and_inputs(masked: bool, **shape: int) -> Tuple[DeformConv, List[Optional[Tensor]]]:
    """In float64: the layer, and x, offsets and masks that all need gradients."""
    torch.manual_seed(0)
    layer = DeformConv(4, 6, 3, bias=masked, **shape).double()
    x = noise(2, 4, 7, 8)
    plain = F.conv2d(x, layer.weight, None, layer.stride, layer.padding, layer.dilation,
                     layer.groups)  # fmt: skip
    size, groups = plain.shape[-2:], layer.deformable_groups
    offset = 2 * noise(2, 18 * groups, *size, seed=1)
    mask = noise(2, 9 * groups, *size, seed=2).sigmoid() if masked else None
    return layer, [x if x is None else x.requires_grad_() for x in (x, offset, mask)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_without_offsets_it_is_a_convolution(masked: bool, shape: Any) -> None:
    layer, (x, offset, mask) = layer_and_inputs(masked, **shape)
    if masked:
        nn.init.normal_(layer.bias)
        mask = torch.ones_like(mask)
    expected = F.conv2d(x, layer.weight, layer.bias, layer.stride, layer.padding, layer.dilation,
                        layer.groups)  # fmt: skip
    assert torch.allclose(layer(x, torch.zeros_like(offset), mask), expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients_are_those_of_a_loop(masked: bool, shape: Any) -> None:
    layer, inputs = layer_and_inputs(masked, **shape)
    learning = [x for x in (*inputs, layer.weight) if x is not None]
    found, expected = layer(*inputs), by_loop(layer, *inputs)
    assert torch.allclose(found, expected)
    upstream = noise(*found.shape, seed=3)
    for ours, theirs in zip(
        *(torch.autograd.grad(y, learning, upstream) for y in (found, expected))
    ):
        assert theirs.abs().max() > 0 and torch.allclose(ours, theirs)


def test_kernel_that_differs_by_axis_reads_as_torchvision_s() -> None:
    weight, how = noise(6, 4, 3, 2), {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 3)}
    x = noise(2, 4, 7, 8, seed=1)
    size = F.conv2d(x, weight, **how).shape[-2:]
    offset = 2 * noise(2, 12, *size, seed=2)
    found = deform_conv2d(x, offset, weight, **how)
    assert torch.allclose(found, torchvision.ops.deform_conv2d(x, offset, weight, **how))


def test_a_traced_graph_has_the_operator_that_exporters_know() -> None:
    layer, (x, offset, _) = layer_and_inputs(False)
    graph = torch.jit.trace(layer, (x, offset)).inlined_graph
    assert "torchvision::deform_conv2d" in {node.kind() for node in graph.nodes()}


def by_loop(layer: DeformConv, x: Tensor, offset: Tensor, mask: Optional[Tensor]) -> Tensor:
    """The definition: bilinear shares of all cells at each of the nine places, for each group."""
    rows, columns = (torch.arange(v).double() * layer.stride for v in offset.shape[2:])
    read = []
    for k in range(9):
        groups = []
        for g, part in enumerate(x.chunk(layer.deformable_groups, dim=1)):
            place = 9 * g + k
            y = rows[:, None] - layer.padding + k // 3 * layer.dilation + offset[:, 2 * place]
            z = columns - layer.padding + k % 3 * layer.dilation + offset[:, 2 * place + 1]
            of_rows, of_columns = (
                (1 - (at[..., None] - torch.arange(size)).abs()).clamp(min=0)
                for at, size in ((y, x.shape[2]), (z, x.shape[3]))
            )
            value = torch.einsum("ncyx,nhwy,nhwx->nchw", part, of_rows, of_columns)
            groups.append(value if mask is None else value * mask[:, place, None])
        read.append(torch.cat(groups, dim=1))
    parts = zip(
        torch.stack(read, dim=2).chunk(layer.groups, dim=1),  # (N, C, 9, H', W')
        layer.weight.flatten(2).chunk(layer.groups),  # (C', C, 9)
    )
    output = torch.cat([torch.einsum("nckhw,ock->nohw", a, b) for a, b in parts], dim=1)
    return output if layer.bias is None else output + layer.bias[:, None, None]


def test_norm_and_activation_come_after_it() -> None:
    layer, (x, offset, _) = layer_and_inputs(False, padding=1)
    whole = DeformConv(4, 6, 3, padding=1, norm=nn.GroupNorm(2, 6), activation=F.relu).double()
    whole.weight = layer.weight
    nn.init.normal_(whole.norm.bias)
    assert torch.equal(whole(x, offset), F.relu(whole.norm(layer(x, offset))))
    assert set(whole.state_dict()) == {"weight", "norm.weight", "norm.bias"}


def test_an_empty_batch_gives_an_empty_one() -> None:
    layer, (x, offset, _) = layer_and_inputs(False, padding=1, stride=2)
    assert layer(x[:0], offset[:0]).shape == (0, 6, 4, 4)


# An uncompiled Detectron2 has, from 0.6 on, no layers to compare with.
needs_layers = pytest.mark.skipif(
    not issubclass(detectron2.layers.DeformConv, nn.Module), reason="Detectron2 is not compiled"
)


@needs_layers
@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_operator_is_called_as_detectron2_calls_it(
    masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = {"padding": 1, "stride": 2, "groups": 2, "deformable_groups": 2}
    ours, inputs = layer_and_inputs(masked, **shape)
    theirs = (detectron2.layers.ModulatedDeformConv if masked else detectron2.layers.DeformConv)(
        4, 6, 3, bias=masked, **shape
    )
    theirs.load_state_dict(ours.state_dict())
    calls: List[Any] = []
    for name in ("deform_conv", "modulated_deform_conv"):
        record = partial(lambda *args: calls.append(args) or torch.zeros(()), name)
        monkeypatch.setattr(deform_conv.detectron2_operators, name, record)
    theirs(*inputs[: 2 + masked])
    deform_conv._by_detectron2(ours, *inputs)
    wanted, found = ([x if torch.is_tensor(x) else _pair(x) for x in args] for args in calls)
    assert len(found) == len(wanted)
    for a, b in zip(wanted, found):
        assert torch.equal(a.double(), b) if torch.is_tensor(a) else a == b


DEFORMABLE = {"MODEL__RESNETS__DEFORM_ON_PER_STAGE": [False, True, True, True]}
WAYS = [
    {},
    {"MODEL__RESNETS__DEFORM_NUM_GROUPS": 2},
    {"MODEL__RESNETS__DEFORM_MODULATED": True, "MODEL__RESNETS__NUM_GROUPS": 2},
]


def resnet_of(way: Dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    return build_model(detector_config("retinanet", **DEFORMABLE, **way)).backbone.bottom_up


@needs_layers
@pytest.mark.parametrize("way", WAYS)
def test_weights_of_a_resnet_are_those_of_detectron2_s_layers(
    way: Dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = resnet_of(way).state_dict()
    for name in ("DeformConv", "ModulatedDeformConv"):
        monkeypatch.setattr(resnet, name, getattr(detectron2.layers, name))
    theirs = resnet_of(way).state_dict()
    assert list(ours) == list(theirs) and "res3.0.conv2_offset.weight" in ours
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


@pytest.mark.parametrize("way", WAYS)
def test_a_resnet_starts_as_a_plain_one_and_learns_where_to_read(way: Dict[str, Any]) -> None:
    backbone = resnet_of(way).train()
    assert isinstance(backbone.res3[0].conv2, DeformConv)
    assert not isinstance(backbone.res2[0].conv2, DeformConv)
    optimizer = torch.optim.SGD(backbone.parameters(), lr=0.1)
    for _ in range(2):  # the offsets are 0 at first
        optimizer.zero_grad()
        sum(x.square().mean() for x in backbone(noise(2, 3, 64, 64).float()).values()).backward()
        optimizer.step()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert "conv2_offset" not in name or parameter.abs().max() > 0, name


@pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
@pytest.mark.parametrize("masked", [False, True])
def test_under_amp_it_computes_in_the_precision_of_its_weights(masked: bool) -> None:
    layer, inputs = layer_and_inputs(masked, padding=1)
    layer.float()
    half = [x if x is None else x.detach().half() for x in inputs]
    with cuda_autocast():
        found = layer(*half)
    expected = layer(*(x if x is None else x.float() for x in half))
    assert found.dtype == torch.float16 and torch.equal(found, expected.half())


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> List[Tensor]:
    """What a compiled operator is called with on a GPU, for a result of 2 x 6 x 7 x 7."""
    tensors: List[Tensor] = []

    def operator(*args: Any) -> Tensor:
        tensors.extend(x for x in args if torch.is_tensor(x))
        return args[0].new_zeros(2, 6, 7, 7)

    for name in ("deform_conv", "modulated_deform_conv"):
        monkeypatch.setattr(deform_conv.detectron2_operators, name, operator)
    monkeypatch.setattr(deform_conv, "COMPILED", True)
    monkeypatch.setattr(Tensor, "is_cuda", True)
    return tensors


@pytest.mark.parametrize("masked", [False, True])
def test_under_amp_a_compiled_operator_gets_maps_in_the_precision_of_its_weights(
    masked: bool, given: List[Tensor]
) -> None:
    """Detectron2's multiplies by the weights as they are, and fails where maps are float16."""
    layer, inputs = layer_and_inputs(masked, padding=1)
    layer.float()
    with cuda_autocast():
        found = layer(*(x if x is None else x.detach().half() for x in inputs))
    assert found.dtype == torch.float16
    assert len(given) == (5 if masked else 3) and all(x.dtype == torch.float32 for x in given)


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_operator_gets_what_has_the_channels_last_in_the_usual_order(
    masked: bool, given: List[Tensor]
) -> None:
    """Detectron2's checks some of it, and reads all of it as it lies in memory."""
    layer, inputs = layer_and_inputs(masked, padding=1)
    last = {"memory_format": torch.channels_last}
    layer.to(**last)(*(x if x is None else x.contiguous(**last) for x in inputs))
    assert len(given) == (5 if masked else 3) and all(x.is_contiguous() for x in given)
