"""The reduction that published weights assume, and weights at other sizes of the input."""

import pytest
import torch

from d2kd.layers import pixel_factor, squared_error

from references import parts
from toys import feature_view, noise

SIZES = [(40, 48), (24, 30)]  # 5 x 6 and 3 x 4 cells, in maps of 5 x 6

# Cells per level, padded to a multiple of 32 pixels; P6 and P7 are strided convolutions.
LEVELS_800x1344 = {"p3": 100 * 168, "p4": 50 * 84, "p5": 25 * 42, "p6": 13 * 21, "p7": 7 * 11}
LEVELS_512x512 = {"p3": 64 * 64, "p4": 32 * 32, "p5": 16 * 16, "p6": 8 * 8, "p7": 4 * 4}


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


def test_weights_at_512_pixels_are_those_at_800x1344() -> None:
    # 800 x 1344 / 512^2 = 4.1. P6 and P7 are rounded up to whole cells at 800 x 1344 (13 x 21 for
    # 12.5 x 21), hence have 4 % and 15 % less at 512; together they are 1.6 % of all cells.
    reference = 800 * 1344
    assert pixel_factor(reference, [(800, 1344)] * 2) == 1.0
    factor = pixel_factor(reference, [(512, 512)] * 2)
    weights = {k: factor * cells for k, cells in LEVELS_512x512.items()}
    for level in ("p3", "p4", "p5"):
        assert weights[level] == pytest.approx(LEVELS_800x1344[level], rel=0.01)
    assert sum(weights.values()) == pytest.approx(sum(LEVELS_800x1344.values()), rel=0.01)


def test_factor_is_that_of_the_mean_size_and_one_as_published() -> None:
    assert pixel_factor(0, [(10, 10)]) == 1.0
    assert pixel_factor(3000, [(10, 10), (20, 20), (10, 50)]) == 9.0  # 1000 pixels on average
