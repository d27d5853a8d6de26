"""Mean 0 and deviation 1 per channel, of the cells that count; vectors of length one."""

import math

import pytest
import torch

from d2kd.layers import standardise, unit_vectors
from tests.helpers.references import parts
from tests.helpers.references import standardise as standardise_of_equation
from tests.helpers.toys import feature_view, noise

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


# Unit vectors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 5), (2, 3, 4, 5)])
def test_vectors_along_channels_get_the_length_one_and_keep_their_direction(shape: tuple) -> None:
    x = noise(*shape) * 7
    unit = unit_vectors(x).movedim(1, -1).reshape(-1, shape[1])
    for found, vector in zip(unit.tolist(), x.movedim(1, -1).reshape(-1, shape[1]).tolist()):
        length = math.sqrt(sum(v * v for v in vector))
        assert found == pytest.approx([v / length for v in vector], rel=1e-5)


def test_three_and_four_are_divided_by_five() -> None:
    torch.testing.assert_close(unit_vectors(torch.tensor([[3.0, 4.0]])), torch.tensor([[0.6, 0.8]]))


def test_a_positive_factor_does_not_matter() -> None:
    x = noise(2, 3, 5).float()
    for factor in (1e-3, 1e3):
        torch.testing.assert_close(unit_vectors(factor * x), unit_vectors(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_stay_zeros_without_a_gradient(dtype: torch.dtype) -> None:
    x = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=dtype, requires_grad=True)
    unit = unit_vectors(x)  # the vectors are the rows
    assert unit.dtype == torch.float32 and unit.tolist() == [[0, 1], [0, 0]]
    unit.sum().backward()
    # d/dx of x / |x| at (0, 1): the first entry turns the vector, the second would stretch it.
    assert x.grad.tolist() == [[1, 0], [0, 0]]


def test_length_of_half_precision_vectors_does_not_overflow() -> None:
    # 600 entries of 3,000: the sum of their squares is 5.4e9, the largest float16 65,504.
    unit = unit_vectors(torch.full((1, 600), 3000.0, dtype=torch.float16))
    torch.testing.assert_close(unit, torch.full((1, 600), 600**-0.5))
