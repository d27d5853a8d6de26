"""Nine points: where they are read, and the box that they stand for."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from d2kd.modeling.reppoints.points import (
    MomentBox,
    PointBoxTransform,
    PointConv,
    scale_gradient,
)
from tests.helpers.toys import noise


def grid_points() -> Tensor:
    """(1, 18, 1, 1), y and x of a cell's neighbours, row by row."""
    return torch.tensor([v for y in (-1, 0, 1) for x in (-1, 0, 1) for v in (y, x)]).view(
        1, 18, 1, 1
    )


def bilinear(image: Tensor, y: float, x: float) -> float:
    """One value of (H, W); zeros outside."""
    height, width = image.shape
    total = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(y - row)) * (1 - abs(x - column))
                total += share * float(image[row, column])
    return total


def test_points_on_the_neighbours_make_a_plain_convolution() -> None:
    layer = PointConv(4)
    torch.nn.init.normal_(layer.weight)
    x = noise(2, 4, 5, 6).float()
    expected = F.conv2d(x, layer.weight, padding=1).relu()
    found = layer(x, grid_points().expand(2, -1, 5, 6))
    assert torch.allclose(found, expected, atol=1e-5)


def test_point_convolution_reads_at_the_points_in_the_order_y_x() -> None:
    layer = PointConv(2)
    torch.nn.init.normal_(layer.weight)
    x, points = noise(1, 2, 4, 5).float(), 2 * noise(1, 18, 4, 5, seed=1).float()
    found = layer(x, points)
    for row in range(4):
        for column in range(5):
            read = [
                [
                    bilinear(x[0, c], row + points[0, 2 * k, row, column].item(),
                             column + points[0, 2 * k + 1, row, column].item())
                    for k in range(9)
                ]
                for c in range(2)
            ]  # fmt: skip
            values = (layer.weight * torch.tensor(read).view(1, 2, 3, 3)).sum(dim=(1, 2, 3))
            assert torch.allclose(found[0, :, row, column], values.relu(), atol=1e-4)


def test_moment_box_of_a_known_grid() -> None:
    to_box, points = MomentBox(), grid_points().float()
    deviation = math.sqrt(6 / 8)  # of -1, 0, 1, three times each, with n - 1
    box = to_box(points).flatten()
    assert torch.allclose(box, deviation * torch.tensor([-1.0, -1, 1, 1]))
    # Twice as wide, then moved 5 to the right: x is the second of each pair.
    wide = points * torch.tensor([1.0, 2.0]).repeat(9).view(1, 18, 1, 1)
    moved = wide + torch.tensor([0.0, 5.0]).repeat(9).view(1, 18, 1, 1)
    expected = torch.tensor([5 - 2 * deviation, -deviation, 5 + 2 * deviation, deviation])
    assert torch.allclose(to_box(moved).flatten(), expected)
    with torch.no_grad():
        to_box.log_scale.copy_(torch.tensor([0.0, math.log(3)]))  # of the height
    assert torch.allclose(to_box(points).flatten()[[0, 3]], deviation * torch.tensor([-1.0, 3]))


def test_moment_box_of_one_place_has_finite_gradients() -> None:
    points = torch.zeros(1, 18, 1, 1, requires_grad=True)
    MomentBox()(points).sum().backward()
    assert points.grad.isfinite().all()


def test_gradient_of_the_scale_is_a_hundredth() -> None:
    to_box, points = MomentBox(), noise(1, 18, 2, 2).float()
    to_box(points)[:, 2].sum().backward()  # right side: centre + deviation * exp(m)
    deviation = points.unflatten(1, (9, 2))[:, :, 1].std(dim=1).sum()
    assert torch.allclose(to_box.log_scale.grad, torch.stack([0.01 * deviation, torch.zeros(())]))


@pytest.mark.parametrize("factor", [0.1, 1.0])
def test_gradient_is_scaled_and_values_are_not(factor: float) -> None:
    x = noise(3).requires_grad_()
    y = scale_gradient(x, factor)
    y.sum().backward()
    assert torch.allclose(y, x) and torch.allclose(x.grad, torch.full_like(x, factor))


def test_boxes_are_in_strides_from_the_corner_of_the_cell() -> None:
    anchor = torch.tensor([[20.0, 4.0, 28.0, 12.0]])  # stride 8, corner (24, 8)
    delta = torch.tensor([[-1.0, -0.5, 2.0, 0.25]])
    found = PointBoxTransform().apply_deltas(delta, anchor)
    assert torch.equal(found, torch.tensor([[16.0, 4.0, 40.0, 10.0]]))
