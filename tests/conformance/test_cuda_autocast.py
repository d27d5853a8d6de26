"""cuda_autocast: PyTorch's own lists for CUDA, on CPU tensors, and nothing left behind."""

import os
import re
from typing import Any, Callable, Dict, Set

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detectron2.modeling import build_model
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage

from d2kd.conformance import cuda_autocast as lists
from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.half_precision import runs_in_float16
from tests.helpers.toys import batch, detector_config

pytestmark = pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")

HEADER = os.path.join(os.path.dirname(torch.__file__), "include", "ATen", "autocast_mode.h")
HALF, FLOAT = torch.float16, torch.float32


def listed(macro: str) -> Set[str]:
    """The operators of one of PyTorch's own lists, as name or name.overload."""
    with open(HEADER) as file:
        body = re.search(rf"#define {macro}\(_\)((?:.*\\\n)*.*)", file.read()).group(1)
    entries = re.findall(r"_\((\w+)(?:,\s*(\w+))?\)", body)
    return {f"{name}.{overload}" if overload else name for name, overload in entries}


@pytest.mark.skipif(
    not os.path.exists(HEADER) or "AT_FORALL_PROMOTE" not in open(HEADER).read(),
    reason="this PyTorch keeps its lists elsewhere",
)
@pytest.mark.parametrize(
    "macro, ours",
    [
        ("AT_FORALL_LOWER_PRECISION_FP", lists.HALF),
        ("AT_FORALL_FP32", lists.FLOAT),
        ("AT_FORALL_FP32_SET_OPT_DTYPE", lists.FLOAT_RESULT),
        ("AT_FORALL_PROMOTE", lists.WIDEST),
    ],
)
def test_lists_are_those_of_the_installed_pytorch(macro: str, ours: str) -> None:
    # norm: PyTorch appends the type as an argument, with the same result. Flash attention: a part
    # of scaled_dot_product_attention that only GPUs have.
    special = {"norm.Scalar", "norm.ScalarOpt_dim", "_scaled_dot_product_flash_attention"}
    assert set(ours.split()) - special == listed(macro) - special


CASES: Dict[str, Callable[[Tensor], Tensor]] = {
    "conv2d": lambda x: F.conv2d(x, torch.ones(1, 2, 1, 1)),
    "matmul": lambda x: x @ x.transpose(2, 3),
    "einsum": lambda x: torch.einsum("nchw,ndhw->ncd", x, x),
}
FLOATS: Dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.half().softmax(dim=1),
    "log_softmax": lambda x: F.log_softmax(x.half(), dim=1),
    "cross_entropy": lambda x: F.cross_entropy(x.half(), torch.zeros(2, 4, 4).long()),
    "norm": lambda x: x.half().norm(dim=1),
    "vector_norm": lambda x: torch.linalg.vector_norm(x.half(), dim=1),
    "sum": lambda x: x.half().sum(dim=1),
    "square": lambda x: x.half().square(),
    "group_norm": lambda x: F.group_norm(x.half(), 1),
    "interpolate": lambda x: F.interpolate(x.half(), scale_factor=2),
    "cat": lambda x: torch.cat([x, x.half()]),
}
AS_THEY_ARE: Dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.half().mean(),
    "std": lambda x: x.half().std(),
    "sigmoid": lambda x: x.half().sigmoid(),
    "batch_norm": nn.BatchNorm2d(2),
    "relu": lambda x: x.half().relu(),
    "double": lambda x: x.double() @ x.double(),
}


@pytest.mark.parametrize("name", [*CASES, *FLOATS, *AS_THEY_ARE])
def test_results_have_the_type_that_cuda_gives_them(name: str) -> None:
    x = torch.rand(2, 2, 4, 4)
    expected = HALF if name in CASES else FLOAT
    if name in AS_THEY_ARE:
        expected = AS_THEY_ARE[name](x).dtype  # as without autocast
    with cuda_autocast():
        found = {**CASES, **FLOATS, **AS_THEY_ARE}[name](x)
    assert found.dtype == expected


def test_gradient_of_a_shared_layer_is_summed_in_half_precision() -> None:
    # 2048 + 1 is 2048 in float16.
    layer = nn.Linear(1, 1, bias=False)
    with cuda_autocast():
        first, second = layer(torch.full((1, 1), 2048.0)), layer(torch.ones(1, 1))
        (first + second).float().sum().backward()
    assert layer.weight.grad.dtype == FLOAT and layer.weight.grad.item() == 2048.0


def test_what_cuda_refuses_is_refused() -> None:
    with cuda_autocast():
        with pytest.raises(RuntimeError, match="Index put requires the source and destination"):
            torch.zeros(3, dtype=HALF)[torch.tensor([True, False, True])] = torch.ones(2)
        with pytest.raises(RuntimeError, match="unsafe to autocast"):
            F.binary_cross_entropy(torch.rand(2), torch.rand(2))


def test_autocast_is_switched_off_inside_and_as_it_was_afterwards() -> None:
    def types() -> Any:
        x, half = torch.rand(2, 2), torch.rand(2, 2, dtype=torch.bfloat16)
        return (x @ x).dtype, half.softmax(dim=0).dtype, F.kl_div(half, half).dtype

    def under_cpu_autocast() -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return types()

    plain, before = types(), under_cpu_autocast()
    with cuda_autocast():
        assert types() == (HALF, FLOAT, FLOAT)
        with torch.autocast("cpu", enabled=False):
            assert types() == plain
    assert types() == plain and under_cpu_autocast() == before


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn", "mask_rcnn", "cascade_rcnn"])
def test_detectors_train_and_detect(name: str) -> None:
    torch.manual_seed(0)
    model = build_model(detector_config(name)).train()
    inputs = batch()
    for x in inputs:
        x["instances"].gt_masks = BitMasks(torch.rand(len(x["instances"]), 64, 64) > 0.5)
    with EventStorage(), cuda_autocast():
        losses = model(inputs)
    assert all(x.dtype == FLOAT and x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with torch.no_grad(), cuda_autocast():
        assert [set(x) for x in model.eval()(batch())] == [{"instances"}] * 2
