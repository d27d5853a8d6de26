"""
Every head between every pair of detectors that it takes, on a GPU.

Not run on a GPU yet, but rehearsed on the CPU (tests/gpu/conftest.py).
"""

import pytest
import torch

from d2kd.conformance.case import Pair
from d2kd.conformance.half_precision import SCALE, relative_error
from tests.helpers.device_steps import EVERY_CASE, DrawOnCpu, served, take_step

# Float32 sums in another order differ by about 1e-6 of their size, and a loss is a sum of sums. A
# gradient is a difference of such sums, and passes more layers.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-4, 1e-3


@EVERY_CASE
def test_losses_and_gradients_are_those_of_the_cpu(name: str, pair: Pair) -> None:
    case = served(name, pair)
    expected, found = take_step(case, "cpu"), take_step(case, "cuda")
    assert found.losses == pytest.approx(expected.losses, rel=LOSS_TOLERANCE)
    assert len(found.gradients) == len(expected.gradients)
    assert relative_error(expected.gradients, found.gradients) < GRADIENT_TOLERANCE


@EVERY_CASE
def test_mixed_precision_gives_student_and_head_finite_gradients(name: str, pair: Pair) -> None:
    case = served(name, pair)
    step = take_step(case, "cuda", amp=True, scale=SCALE)
    assert torch.tensor(list(step.losses.values())).isfinite().all(), step.losses
    assert all(x.isfinite().all() for x in step.gradients)
    without = [k for k, p in step.distiller.heads.named_parameters() if p.grad is None]
    assert not without and any(p.grad is not None for p in step.distiller.student.parameters())
    assert all(p.grad is None for p in step.distiller.teacher.model.parameters())


@pytest.mark.parametrize("draw", ["rand", "rand_like", "exponential_"])
def test_draws_are_those_of_the_cpu(draw: str) -> None:
    def drawn(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        like = torch.empty(3, device=device)
        with DrawOnCpu():
            if draw == "rand":
                return torch.rand(3, device=device)
            return torch.rand_like(like) if draw == "rand_like" else like.exponential_()

    assert drawn("cuda").tolist() == drawn("cpu").tolist()
