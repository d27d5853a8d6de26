"""The pretended GPU itself: it refuses what a GPU refuses and counts when the host waits."""

from typing import Any, Callable, Optional

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.pretended_cuda import PretendedCuda


@pytest.fixture(autouse=True)
def gpu(pretended: Optional[PretendedCuda]) -> PretendedCuda:
    if pretended is None:
        pytest.skip("of the pretended GPU")
    return pretended


def on_gpu(*shape: int) -> Tensor:
    return torch.arange(1.0, 1 + torch.Size(shape).numel()).view(shape).to("cuda")


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_gpu(3) + torch.ones(3),
        lambda: on_gpu(3).add_(torch.ones(3)),
        lambda: on_gpu() * torch.ones(3),
        lambda: torch.stack([on_gpu(), torch.ones(())]),
        lambda: torch.cat([on_gpu(3), torch.ones(3)]),
        lambda: on_gpu(3)[on_gpu(3) > 1].sub(torch.ones(2)),
        lambda: torch.ones(3)[on_gpu(3) > 1],
        lambda: nn.Linear(3, 1)(on_gpu(2, 3)),
        lambda: torch.arange(3, device="cuda").repeat_interleave(torch.ones(3).long()),
    ],
)
def test_tensors_of_two_devices_do_not_meet(mix: Callable[[], Any]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        mix()


@pytest.mark.parametrize(
    "mix",
    [
        lambda: on_gpu(3) * torch.tensor(2.0),
        lambda: on_gpu(3)[torch.tensor([0, 2])],
        lambda: on_gpu(3).copy_(torch.ones(3)),
        lambda: torch.tensor([1.0, 2.0], device="cuda"),
        lambda: on_gpu(3).new_zeros(2),
        lambda: torch.rand(3, device="cuda"),
        lambda: torch.autograd.grad(nn.Linear(3, 1).cuda()(x := on_gpu(3).requires_grad_()), x)[0],
    ],
)
def test_results_are_where_a_gpu_has_them(mix: Callable[[], Tensor]) -> None:
    assert mix().device == torch.device("cuda:0") and mix().is_cuda


@pytest.mark.parametrize(
    "work, waits",
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).all()), 1),
        (lambda x: x[x > 1], 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x.tolist(), 1),
        (lambda x: x.cpu() + 1, 1),
        (lambda x: torch.tensor([1.0], device="cuda"), 1),
        (lambda x: x.masked_fill(x > 1, 0.0), 0),
        (lambda x: x.__setitem__(x > 1, 0.0), 0),
        (lambda x: x[[0, 1]], 1),
        (lambda x: x.relu().softmax(0).sum(), 0),
        (lambda x: x.long().repeat_interleave(x.long(), output_size=6), 0),
        (lambda x: x.long().repeat_interleave(x.long()), 1),
        (lambda x: torch.equal(x, x), 1),
    ],
)
def test_waits_are_counted(work: Callable[[Tensor], Any], waits: int, gpu: PretendedCuda) -> None:
    x = on_gpu(3)
    gpu.waits.clear()
    work(x)
    assert sum(gpu.waits.values()) == waits, gpu.waits


def test_copy_that_the_host_does_not_wait_for_is_refused() -> None:
    with pytest.raises(RuntimeError, match="does not wait"):
        on_gpu(3).to("cpu", non_blocking=True)


def test_numbers_are_those_of_the_cpu_and_autocast_is_cuda_s() -> None:
    layer = nn.Conv2d(2, 3, 3)
    x = torch.rand(1, 2, 5, 5)
    expected = layer(x)
    expected.sum().backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    parameter = layer.weight
    layer.cuda()
    assert layer.weight is parameter, "optimizers keep the parameters that they were given"
    found = layer(x.cuda())
    found.sum().backward()
    assert torch.equal(found.cpu(), expected) and torch.equal(layer.weight.grad.cpu(), gradient)
    with torch.autocast("cuda"):
        assert layer(x.cuda()).dtype == torch.float16
        with torch.autocast("cuda", enabled=False):
            assert layer(x.cuda()).dtype == torch.float32


def test_a_gpu_s_data_is_not_numpy_s() -> None:
    with pytest.raises((RuntimeError, TypeError), match="numpy"):
        on_gpu(3).numpy()
