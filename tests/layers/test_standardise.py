"""Mean 0 and deviation 1 per channel, of the cells that count."""

import pytest
import torch

from d2kd.layers import standardise

from references import parts
from references import standardise as standardise_of_equation
from toys import feature_view, noise

SIZES = [(40, 48), (24, 30)]  # 5 x 6 and 3 x 4 cells, in maps of 5 x 6


@pytest.mark.parametrize("padded", [False, True])
def test_values_are_those_of_the_equation(padded: bool) -> None:
    x = noise(2, 3, 5, 6) * torch.tensor([0.1, 1.0, 50.0]).view(3, 1, 1) + 4
    sizes = SIZES if padded else [(40, 48)] * 2
    inside = feature_view({"p3": x}, sizes).inside_image("p3")
    found = standardise(x if inside is None else torch.where(inside, x, 1e4), inside)
    for image, expected in zip(parts(found, sizes), standardise_of_equation(parts(x, sizes))):
        torch.testing.assert_close(image, expected)
    assert inside is None or (found * ~inside == 0).all()


def test_cells_all_inside_are_as_no_mask_at_all() -> None:
    x = noise(2, 3, 5, 6)
    torch.testing.assert_close(standardise(x, torch.ones(2, 1, 5, 6).bool()), standardise(x))


@pytest.mark.parametrize("cells", [1, 2])
def test_single_value_and_constant_channel_become_zero_without_gradient(cells: int) -> None:
    x = torch.full((1, 2, 3, 3), 0.5, requires_grad=True)
    inside = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
    inside[..., 0, :cells] = True
    y = standardise(x, inside)
    assert (y == 0).all()
    (y * torch.rand(3, 3)).sum().backward()
    assert x.grad.isfinite().all() and (x.grad * ~inside == 0).all()
