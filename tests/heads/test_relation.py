"""How alike each two pixels are, beside the equation pair by pair; what does not change it."""

import math
from typing import List, Tuple

import pytest
import torch
from torch import Tensor

from d2kd.heads.mar import average_cells, relation_error
from tests.helpers.baseline_references import average, cosines, pooled_pixels, relation
from tests.helpers.toys import noise


def pixels_of(x: Tensor) -> List[List[Tensor]]:
    """(B, C, P) -> P vectors of each."""
    return [list(sample.T) for sample in x]


def random_rotation(channels: int) -> Tensor:
    return torch.linalg.qr(noise(channels, channels, seed=9))[0]


# The error ----------------------------------------------------------------------------------------


def test_error_is_that_of_the_equation() -> None:
    x, target = noise(3, 4, 7, seed=1) * 3, noise(3, 6, 7, seed=2) + 1
    found = relation_error(x, target)
    assert found.shape == (3,) and found.dtype == torch.float32
    expected = [relation(ours, theirs) for ours, theirs in zip(pixels_of(x), pixels_of(target))]
    assert found.tolist() == pytest.approx(expected, rel=1e-5) and min(expected) > 0.1


def test_pixels_outside_do_not_count() -> None:
    x, target = noise(3, 4, 7, seed=1), noise(3, 6, 7, seed=2)
    inside = torch.tensor([[1] * 7, [1, 1, 1, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0, 0]]).bool()
    found = relation_error(x, target, inside)
    kept = [[v[:, mask] for v, mask in zip(side, inside)] for side in (x, target)]
    expected = [relation(list(a.T), list(b.T)) for a, b in zip(*kept)]
    assert found.tolist() == pytest.approx(expected, rel=1e-5)
    # A single pixel is like itself, on both sides.
    assert found[2].item() == pytest.approx(0, abs=1e-12)
    garbage = torch.where(inside[:, None], x, 1e4 * x)
    torch.testing.assert_close(relation_error(garbage, target, inside), found)


def test_two_pixels_at_a_right_angle_beside_two_that_are_parallel() -> None:
    # Of the four cosines two, of each pixel with itself, are 1 in both. The other two are 0 and 1:
    # (1 + 1) / 4 = 1/2. At 60 degrees they are 1/2: (1/4 + 1/4) / 4 = 1/8.
    parallel = torch.tensor([[[1.0, 2.0], [0.0, 0.0]]])
    for angle, expected in ((90, 1 / 2), (60, 1 / 8)):
        radians = math.radians(angle)
        x = torch.tensor([[[1.0, math.cos(radians)], [0.0, math.sin(radians)]]])
        assert relation_error(x, parallel).item() == pytest.approx(expected, rel=1e-6)


def test_opposite_pixels_are_twice_as_far_from_parallel_ones_as_a_right_angle() -> None:
    # (2^2 + 2^2) / 4
    x, target = torch.tensor([[[1.0, -1.0]]]), torch.tensor([[[1.0, 1.0]]])
    assert relation_error(x, target).item() == pytest.approx(2.0)


def test_rotated_and_mirrored_channels_are_as_alike_as_before() -> None:
    x, target = noise(2, 5, 6, seed=1), noise(2, 3, 6, seed=2)
    rotated = torch.einsum("dc,ncp->ndp", random_rotation(5), x)
    torch.testing.assert_close(relation_error(rotated, target), relation_error(x, target))
    torch.testing.assert_close(relation_error(x.flip(1), target), relation_error(x, target))
    assert relation_error(rotated, x).max() < 1e-10


def test_magnitude_of_a_pixel_does_not_matter() -> None:
    x, target = noise(2, 5, 6, seed=1), noise(2, 3, 6, seed=2)
    factor = noise(2, 1, 6, seed=3).exp() * 10
    torch.testing.assert_close(relation_error(factor * x, target), relation_error(x, target))
    torch.testing.assert_close(relation_error(x, factor * target), relation_error(x, target))
    assert relation_error(factor * x, x).max() < 1e-10


def test_error_does_not_depend_on_the_order_of_pixels_but_on_which_is_which() -> None:
    x, target = noise(2, 5, 6, seed=1), noise(2, 3, 6, seed=2)
    order = torch.tensor([3, 1, 5, 0, 4, 2])
    expected = relation_error(x, target)
    torch.testing.assert_close(relation_error(x[..., order], target[..., order]), expected)
    assert not torch.allclose(relation_error(x[..., order], target), expected)


def test_gradient_is_the_student_s_alone_and_at_a_right_angle_to_each_pixel() -> None:
    # The length does not matter, so that no gradient is along a pixel.
    x, target = (noise(2, 4, 6, seed=i).requires_grad_() for i in (1, 2))
    relation_error(x, target).sum().backward()
    assert target.grad is None and (x.grad.abs().sum(dim=1) > 0).all()
    assert (x.grad * x.detach()).sum(dim=1).abs().max() < 1e-6


def test_dead_pixels_are_like_nothing_and_finite() -> None:
    x, target = noise(1, 4, 6, seed=1), noise(1, 4, 6, seed=2)
    x[..., 2], target[..., 4] = 0.0, 0.0
    assert sum(cosines(pixels_of(x)[0])[2]) == 0
    error = relation_error(x.requires_grad_(), target)
    assert error.item() == pytest.approx(relation(pixels_of(x)[0], pixels_of(target)[0]), rel=1e-5)
    error.sum().backward()
    assert x.grad.isfinite().all() and (x.grad[..., 2] == 0).all()


@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 4, 1)])
def test_no_samples_and_single_pixels_give_a_connected_zero(shape: Tuple[int, ...]) -> None:
    x = torch.randn(*shape, requires_grad=True)
    errors = relation_error(x, torch.randn(*shape))
    assert errors.shape == shape[:1]
    assert errors.sum().item() == pytest.approx(0, abs=1e-12)
    errors.sum().backward()
    assert x.grad.shape == shape and x.grad.isfinite().all()


def test_error_without_any_pixel_inside_is_zero_and_finite() -> None:
    x = torch.randn(1, 4, 6, requires_grad=True)
    error = relation_error(x, torch.randn(1, 4, 6), torch.zeros(1, 6, dtype=torch.bool))
    error.sum().backward()
    assert error.item() == 0 and (x.grad == 0).all()


def test_cosines_are_taken_in_float32_under_autocast() -> None:
    # Nearly equal maps: in 8 significant bits their cosines would differ by rounding alone.
    x = noise(2, 8, 300, seed=1).float()
    target = x + 0.001 * noise(2, 8, 300, seed=2).float()
    exact = relation_error(x, target)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = relation_error(x, target)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact)


def test_half_precision_features_are_compared_in_float32() -> None:
    # 100^2 x 64 channels overflow float16, whose largest number is 65,504.
    x, target = ((noise(1, 64, 40, seed=i) + 100).half() for i in (1, 2))
    found = relation_error(x, target)
    assert found.dtype == torch.float32
    assert torch.equal(found, relation_error(x.float(), target.float())) and found > 0


# Fewer cells --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(4, 6), (7, 5), (3, 11), (1, 1), (2, 9)])
def test_map_is_averaged_to_at_most_so_many_cells_a_side(size: Tuple[int, int]) -> None:
    x = noise(2, 3, *size)
    found, inside = average_cells(x, 4)
    assert inside is None and found.dtype == torch.float32
    expected = average(x, *(min(cells, 4) for cells in size)).float()
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("size", [(4, 3), (7, 9)])
def test_padding_is_not_averaged_in(size: Tuple[int, int]) -> None:
    parts = [(size[0], 2), (3, size[1]), (1, 1)]  # rows and columns of each image
    x, inside = noise(3, 2, *size), torch.zeros(3, 1, *size, dtype=torch.bool)
    for mask, (rows, columns) in zip(inside, parts):
        mask[:, :rows, :columns] = True
    found, kept = average_cells(torch.where(inside, x, 1e4 * x), 4, inside)
    assert kept.shape == (3, 1, *found.shape[2:]) and kept.dtype == torch.bool
    for n, part in enumerate(parts):
        expected = torch.stack(pooled_pixels(x[n], 4, *part), dim=1).float()
        torch.testing.assert_close(found[n][:, kept[n, 0]], expected, rtol=1e-4, atol=1e-5)


def test_map_that_is_small_enough_stays_as_it_is() -> None:
    x = noise(2, 3, 5, 4).float()
    assert torch.equal(average_cells(x, 5)[0], x)
