"""Vectors of length one, and those that have none."""

import math

import pytest
import torch

from d2kd.layers import unit_vectors

from toys import noise


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
