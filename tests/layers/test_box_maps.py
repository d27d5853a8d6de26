"""What is painted from boxes, beside painting cell by cell; shapes in closed form; memory."""

import math
from typing import List

import pytest
import torch
from torch import Tensor

from d2kd.layers import box_maps as module
from d2kd.layers import covered, paint
from tests.helpers.baseline_references import LargestTensor
from tests.helpers.toys import noise


def random_boxes(count: int, images: int, height: int, width: int) -> List[Tensor]:
    """Rows, columns and images, in an order that is not that of the images."""
    rows = noise(count, height, seed=1).clamp(min=0)
    columns = noise(count, width, seed=2).clamp(min=0)
    return [rows, columns, torch.arange(count) * 7 % images]


def painted_one_by_one(rows: Tensor, columns: Tensor, image: Tensor, images: int) -> Tensor:
    canvas = torch.zeros(images, 1, rows.shape[1], columns.shape[1], dtype=rows.dtype)
    for row, column, n in zip(rows, columns, image):
        canvas[n, 0] = torch.maximum(canvas[n, 0], torch.outer(row, column))
    return canvas


def test_cell_gets_the_largest_product_of_its_row_and_column() -> None:
    rows, columns, image = random_boxes(9, 3, 4, 5)
    found = paint(rows, columns, image, 3)
    assert found.shape == (3, 1, 4, 5)
    for n in range(3):
        for i in range(4):
            for j in range(5):
                values = [
                    rows[m, i].item() * columns[m, j].item() for m in range(9) if image[m] == n
                ]
                assert found[n, 0, i, j].item() == max(values)


@pytest.mark.parametrize("count", [255, 256, 257, 600])
def test_many_boxes_are_painted_as_one_by_one(count: int) -> None:
    boxes = random_boxes(count, 3, 6, 7)
    assert torch.equal(paint(*boxes, 3), painted_one_by_one(*boxes, 3))


def test_all_boxes_count_also_the_last_of_many() -> None:
    # A single box in each column of cells; one left out would leave its cell empty.
    count = 3 * module._CHUNK + 1
    found = paint(torch.ones(count, 1), torch.eye(count), torch.zeros(count).long(), 1)
    assert torch.equal(found, torch.ones(1, 1, 1, count))


def test_image_without_boxes_is_empty() -> None:
    found = paint(torch.ones(2, 3), torch.ones(2, 4), torch.tensor([2, 2]), 4)
    assert found.sum(dim=(1, 2, 3)).tolist() == [0, 0, 12, 0]
    nothing = paint(torch.ones(0, 3), torch.ones(0, 4), torch.zeros(0).long(), 2)
    assert torch.equal(nothing, torch.zeros(2, 1, 3, 4))


def test_ten_thousand_boxes_of_an_image_never_lie_in_memory_together() -> None:
    # All of them at once would be 10,000 maps of 100 x 168 cells, 168 million numbers.
    sides = [torch.arange(10_000) % size for size in (100, 168)]
    rows, columns = (covered(x.float(), x + 3.0, n) for x, n in zip(sides, (100, 168)))
    with LargestTensor() as largest:
        found = paint(rows, columns, torch.zeros(10_000).long(), 1)
    assert largest.entries == module._CHUNK * 100 * 168
    assert module._CHUNK <= 256 and found.shape == (1, 1, 100, 168) and found.max() == 1


def test_cells_from_first_to_last_are_covered_both_included() -> None:
    found = covered(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3.0, 2.0, 9.0]), 5)
    assert found.tolist() == [[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert found.dtype == torch.float32


def test_nothing_is_covered_by_what_lies_beyond_the_map_and_all_by_what_reaches_across() -> None:
    found = covered(torch.tensor([-7.0, 5.0, -2.0, -2.0]), torch.tensor([-1.0, 8.0, 0.0, 11.0]), 5)
    assert found.tolist() == [[0] * 5, [0] * 5, [1, 0, 0, 0, 0], [1] * 5]


def test_bell_is_one_at_the_centre_and_exp_of_minus_a_half_at_the_sides() -> None:
    # From 1.5 to 5.5: middle 3.5, the centre of cell 3; the sides are the centres of 1 and 5. One
    # half width further, at 7.5, it is exp(-2); half of it, at 4.5, exp(-1/8).
    (found,) = module.gaussian(torch.tensor([1.5]), torch.tensor([5.5]), 8).double()
    side = math.exp(-1 / 2)
    assert found[3] == 1.0
    assert [found[1].item(), found[5].item()] == pytest.approx([side, side], rel=1e-6)
    assert found[4].item() == pytest.approx(math.exp(-1 / 8), rel=1e-6)
    assert found[7].item() == pytest.approx(math.exp(-2), rel=1e-6)


def test_bell_is_that_of_its_formula_in_every_cell() -> None:
    sides = [(0.3, 2.1), (-3.0, 1.0), (4.0, 4.6), (2.0, 12.0)]
    found = module.gaussian(*(torch.tensor(x) for x in zip(*sides)), size=6)
    for row, (first, last) in zip(found.tolist(), sides):
        middle, half = (first + last) / 2, (last - first) / 2
        expected = [math.exp(-0.5 * ((j + 0.5 - middle) / half) ** 2) for j in range(6)]
        assert row == pytest.approx(expected, rel=1e-4, abs=1e-9)


def test_bell_of_a_box_without_any_width_is_finite() -> None:
    # On the centre of cell 1 it is 1 there; between two centres, nowhere anything.
    found = module.gaussian(torch.tensor([1.5, 2.0]), torch.tensor([1.5, 2.0]), 4)
    assert found.tolist() == [[0, 1, 0, 0], [0, 0, 0, 0]]
