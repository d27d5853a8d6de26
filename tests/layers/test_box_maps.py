"""What is painted from boxes, beside painting cell by cell; shapes in closed form; memory."""

import math
from typing import Sequence, Tuple

import pytest
import torch
from torch import Tensor

from d2kd.layers import Axes
from d2kd.layers import box_maps as module
from tests.helpers.baseline_references import LargestTensor
from tests.helpers.toys import noise

CPU = torch.device("cpu")
# Height and width of two levels
SIZES = [(4, 5), (2, 3)]


def random_boxes(count: int, sizes: Sequence[Tuple[int, int]]) -> Tensor:
    """Values of boxes for all columns and rows, (count, T)."""
    return noise(count, sum(map(sum, sizes)), seed=1).clamp(min=0)


def image_of(count: int) -> Tensor:
    """Of three, in an order that is not theirs."""
    return torch.arange(count) * 7 % 3


@pytest.mark.parametrize("count", [9, 255, 256, 257, 600])
def test_cell_gets_the_largest_product_of_its_row_and_column(count: int) -> None:
    values, image = random_boxes(count, SIZES), image_of(count)
    found = Axes(SIZES, CPU).paint(values, image, 3)
    axes = values.split([5, 4, 3, 2], dim=1)
    for level, size, columns, rows in zip(found, SIZES, axes[::2], axes[1::2]):
        assert level.shape == (3, 1, *size)
        expected = torch.zeros_like(level)
        for row, column, n in zip(rows, columns, image):
            expected[n, 0] = torch.maximum(expected[n, 0], torch.outer(row, column))
        assert torch.equal(level, expected)


def test_all_boxes_count_also_the_last_of_many() -> None:
    # A single box in each column of cells; one left out would leave its cell empty.
    count = 3 * module._CHUNK + 1
    values = torch.cat([torch.eye(count), torch.ones(count, 1)], dim=1)
    (found,) = Axes([(1, count)], CPU).paint(values, torch.zeros(count).long(), 1)
    assert torch.equal(found, torch.ones(1, 1, 1, count))


def test_image_without_boxes_is_empty() -> None:
    axes = Axes([(3, 4)], CPU)
    (found,) = axes.paint(torch.ones(2, 7), torch.tensor([2, 2]), 4)
    assert found.sum(dim=(1, 2, 3)).tolist() == [0, 0, 12, 0]
    (nothing,) = axes.paint(torch.ones(0, 7), torch.zeros(0).long(), 2)
    assert torch.equal(nothing, torch.zeros(2, 1, 3, 4))


def test_ten_thousand_boxes_of_an_image_never_lie_in_memory_together() -> None:
    # All of them at once would be 10,000 maps of 100 x 168 cells, 168 million numbers.
    first = torch.stack([torch.arange(10_000.0) % size for size in (168, 100)], dim=1)[:, None]
    axes = Axes([(100, 168)], CPU)
    values = axes.covered(first, first + 3).float()
    with LargestTensor() as largest:
        (found,) = axes.paint(values, torch.zeros(10_000).long(), 1)
    assert largest.entries == module._CHUNK * 100 * 168
    assert module._CHUNK <= 256 and found.shape == (1, 1, 100, 168) and found.max() == 1


def along_x(draw: str, first: Sequence[float], last: Sequence[float], width: int) -> Tensor:
    """(M, width): what `draw` of Axes makes of boxes in the columns of a single level."""
    axes = Axes([(1, width)], CPU)
    sides = (torch.tensor(x)[:, None, None].expand(-1, 1, 2) for x in (first, last))
    return getattr(axes, draw)(*sides)[:, :width]


def test_cells_from_first_to_last_are_covered_both_included() -> None:
    found = along_x("covered", [1.0, 2.0, 4.0], [3.0, 2.0, 9.0], 5)
    assert found.long().tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]


def test_nothing_is_covered_by_what_lies_beyond_the_map_and_all_by_what_reaches_across() -> None:
    found = along_x("covered", [-7.0, 5.0, -2.0, -2.0], [-1.0, 8.0, 0.0, 11.0], 5)
    assert found.long().tolist() == [[0] * 5, [0] * 5, [1, 0, 0, 0, 0], [1] * 5]


def test_columns_and_rows_of_each_level_have_their_own_sides() -> None:
    # X and Y of the first level, then of the second
    first = torch.tensor([[[1.0, 0.0], [2.0, 1.0]]])
    found = Axes(SIZES, CPU).covered(first, first)[0].long().split([5, 4, 3, 2])
    assert [x.tolist() for x in found] == [[0, 1, 0, 0, 0], [1, 0, 0, 0], [0, 0, 1], [0, 1]]


def test_bell_is_one_at_the_centre_and_exp_of_minus_a_half_at_the_sides() -> None:
    # From 1.5 to 5.5: middle 3.5, the centre of cell 3; the sides are the centres of 1 and 5. One
    # half width further, at 7.5, it is exp(-2); half of it, at 4.5, exp(-1/8).
    (found,) = along_x("bells", [1.5], [5.5], 8).double()
    side = math.exp(-1 / 2)
    assert found[3] == 1.0
    assert [found[1].item(), found[5].item()] == pytest.approx([side, side], rel=1e-6)
    assert found[4].item() == pytest.approx(math.exp(-1 / 8), rel=1e-6)
    assert found[7].item() == pytest.approx(math.exp(-2), rel=1e-6)


def test_bell_is_that_of_its_formula_in_every_cell() -> None:
    sides = [(0.3, 2.1), (-3.0, 1.0), (4.0, 4.6), (2.0, 12.0)]
    found = along_x("bells", *zip(*sides), width=6)
    for row, (first, last) in zip(found.tolist(), sides):
        middle, half = (first + last) / 2, (last - first) / 2
        expected = [math.exp(-0.5 * ((j + 0.5 - middle) / half) ** 2) for j in range(6)]
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_bell_of_a_box_without_any_width_is_finite() -> None:
    # On the centre of cell 1 it is 1 there; between two centres, nowhere anything.
    found = along_x("bells", [1.5, 2.0], [1.5, 2.0], 4)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
