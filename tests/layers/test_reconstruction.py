"""The reduction that published weights assume."""

import pytest
import torch

from d2kd.layers import squared_error
from tests.helpers.references import parts
from tests.helpers.toys import feature_view, noise

SIZES = [(40, 48), (24, 30)]  # 5 x 6 and 3 x 4 cells, in maps of 5 x 6


def test_error_is_summed_over_channels_and_cells_inside_and_averaged_over_images() -> None:
    x, target = noise(2, 3, 5, 6, seed=1), noise(2, 3, 5, 6, seed=2)
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    total = sum(((a - b) ** 2).sum().item() for a, b in zip(parts(x, SIZES), parts(target, SIZES)))
    garbage = torch.where(inside, target, 1e6)
    assert squared_error(x, garbage, inside).item() == pytest.approx(total / 2, rel=1e-5)
    whole = ((x - target) ** 2).sum().item()
    assert squared_error(x, target).item() == pytest.approx(whole / 2, rel=1e-5)


def test_gradient_goes_to_what_was_rebuilt_and_not_to_the_target_or_the_padding() -> None:
    x, target = (noise(2, 3, 5, 6, seed=i).requires_grad_() for i in (1, 2))
    inside = feature_view({"p3": x}, SIZES).inside_image("p3")
    squared_error(x, target, inside).backward()
    assert target.grad is None
    # d/dx (x - t)^2 / N = 2 (x - t) / N
    torch.testing.assert_close(x.grad, ((x - target) * inside).detach(), rtol=1e-5, atol=1e-6)


def test_sum_is_in_float32() -> None:
    # 10^2 x 64 channels x 32 x 32 cells = 6,553,600; the largest float16 is 65,504.
    x, target = (torch.full((1, 64, 32, 32), v, dtype=torch.float16) for v in (0.0, 10.0))
    for inside in (None, torch.ones(1, 1, 32, 32, dtype=torch.bool)):
        loss = squared_error(x, target, inside)
        assert loss.dtype == torch.float32 and loss.item() == 6553600.0
