"""How much each cell counts: beside the rule cell by cell, and in closed form."""

import math
from typing import Any, List, Sequence

import pytest
import torch
from torch import Tensor

from detectron2.structures import Boxes, Instances

from d2kd.heads.mar_mask import ObjectMask
from tests.helpers.baseline_references import multi_value_mask

STRIDES = [8, 16, 32]
# Of maps of 96 x 128 pixels: overlapping, on the border, beyond it, tiny, all, none. Half-pixels,
# so that no side of an enlarged box lies on a border of cells by rounding alone.
BOXES = [
    [[10.5, 12.5, 50.5, 70.5], [30.5, 40.5, 90.5, 60.5], [40.0, 48.0, 42.0, 50.0]],
    [[0.0, 0.0, 24.0, 16.0], [100.5, 70.5, 128.0, 96.0], [-20.5, 30.5, 10.5, 140.5]],
    [],
    [[60.25, 60.25, 60.75, 60.75], [200.0, 20.0, 240.0, 60.0], [64.0, 16.0, 64.0, 16.0]],
    [[0.0, 0.0, 128.0, 96.0], [20.5, 21.5, 220.5, 321.5], [1.5, 2.5, 230.5, 250.5]],
]


def draw_levels(
    mask: ObjectMask, boxes: Sequence[Any], strides: Sequence[int], size: Any
) -> List[Tensor]:
    """All of one size."""
    instances = [Instances(size, gt_boxes=Boxes(torch.tensor(x).view(-1, 4))) for x in boxes]
    return mask(instances, strides, [size] * len(strides))


def draw(
    boxes: Sequence[Sequence[Sequence[float]]], stride: int = 8, size: Any = (12, 16), **fields: Any
) -> Tensor:
    """(N, H, W) of a level."""
    found = draw_levels(ObjectMask(**fields), boxes, STRIDES, size)[STRIDES.index(stride)]
    assert found.shape == (len(boxes), 1, *size) and found.dtype == torch.float32
    return found[:, 0]


@pytest.mark.parametrize("by_size", [True, False])
@pytest.mark.parametrize("kind", ["values", "gaussian"])
@pytest.mark.parametrize("stride", STRIDES)
def test_mask_is_that_of_the_rule(stride: int, kind: str, by_size: bool) -> None:
    size = (96 // stride, 128 // stride)
    # Without the box of no size, on which a bell has no width
    boxes = [[box for box in x if kind == "values" or box[2] > box[0]] for x in BOXES]
    fields = {"inside": 0.9, "near": 0.4, "far": 0.05, "near_factor": 1.7, "by_size": by_size}
    found = draw(boxes, stride, size, kind=kind, **fields)
    for mask, image in zip(found, boxes):
        expected = multi_value_mask(
            image, stride, STRIDES, *size, (0.9, 0.4, 0.05), 1.7, by_size, kind == "gaussian"
        )
        torch.testing.assert_close(mask, expected.float(), rtol=1e-5, atol=1e-7)


def test_cells_are_inside_near_or_far() -> None:
    # 16 to 48 pixels: the cells 2 to 5. One and a half times as wide: 8 to 56, the cells 1 to 6.
    (mask,) = draw([[[16.0, 16.0, 48.0, 48.0]]], by_size=False)
    for i in range(12):
        for j in range(16):
            expected = 1.0 if 2 <= min(i, j) and max(i, j) <= 5 else 0.1
            if expected < 1 and 1 <= min(i, j) and max(i, j) <= 6:
                expected = 0.5
            assert mask[i, j].item() == pytest.approx(expected)


def test_inside_of_one_box_wins_over_near_another() -> None:
    # Cell 2 is near the first (cells 0 and 1, near to 2.5) and inside the second (cells 2 and 3).
    row = draw([[[0.0, 0.0, 16.0, 8.0], [16.0, 0.0, 32.0, 8.0]]], by_size=False)[0, 0]
    assert row[:6].tolist() == pytest.approx([1, 1, 1, 1, 0.5, 0.1])


def test_factor_of_one_leaves_nothing_near() -> None:
    mask = draw([[[10.5, 12.5, 50.5, 70.5]]], by_size=False, near_factor=1.0)
    assert sorted(set(mask.flatten().tolist())) == pytest.approx([0.1, 1.0])


@pytest.mark.parametrize(
    "side, stride",
    [
        (0.5, 8),
        (112, 8),
        (223.5, 8),
        (224, 16),
        (300, 16),
        (447.5, 16),
        (448, 32),
        (895, 32),
        (896, 32),  # of stride 64, were there one
        (5000, 32),
    ],
)
def test_box_of_224_pixels_belongs_to_stride_16_and_twice_as_much_to_the_next(
    side: float, stride: int
) -> None:
    # Also where its sides differ: what counts is the root of the area.
    for width, height in ((side, side), (side / 4, side * 4)):
        marked = [s for s in STRIDES if (draw([[[0.0, 0.0, width, height]]], s, (2, 2)) == 1).any()]
        assert marked == [stride]


def test_levels_are_those_that_are_there() -> None:
    # Without stride 8, a small box belongs to stride 16; alone, a level has all boxes.
    boxes, mask = [[[0.0, 0.0, 20.0, 20.0]]], ObjectMask()
    for strides in ([16, 32], [32, 16]):  # in whatever order
        found = dict(zip(strides, draw_levels(mask, boxes, strides, (4, 4))))
        assert found[16][0, 0, 0, 0] == 1
        assert (found[32] < 1).all()
    (found,) = draw_levels(mask, boxes, [32], (4, 4))
    assert found[0, 0, 0, 0] == 1


def test_bell_is_one_at_the_centre_and_falls_to_exp_of_minus_a_half_at_the_sides() -> None:
    # 20 to 52 pixels: cells 2.5 to 6.5. The middle, 4.5, is the centre of cell 4, the sides are
    # those of cells 2 and 6; a corner has both factors, exp(-1).
    (mask,) = draw([[[20.0, 20.0, 52.0, 52.0]]], kind="gaussian", by_size=False, far=0.0)
    side, corner = math.exp(-1 / 2), math.exp(-1)
    found = [mask[4, 4], mask[4, 2], mask[4, 6], mask[2, 4], mask[6, 4], mask[2, 2], mask[6, 2]]
    expected = [1.0, side, side, side, side, corner, corner]
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-6)
    # At distances of 2 and 4 half-widths: exp(-2), exp(-8)
    assert mask[4, 8].item() == pytest.approx(math.exp(-2), rel=1e-5)
    assert mask[4, 12].item() == pytest.approx(math.exp(-8), rel=1e-5)


def test_bell_is_nowhere_below_far_and_as_high_as_inside() -> None:
    (mask,) = draw(
        [[[20.0, 20.0, 52.0, 52.0]]], kind="gaussian", by_size=False, far=0.2, inside=0.7, near=0.3
    )
    assert mask.min().item() == pytest.approx(0.2) and mask.max().item() == pytest.approx(0.7)
    assert mask[4, 4] == mask.max()


@pytest.mark.parametrize("kind", ["values", "gaussian"])
@pytest.mark.parametrize("boxes", [[[], []], [[[900.0, 0.0, 950.0, 9.0]], []]])
def test_image_without_any_object_is_far_everywhere(kind: str, boxes: List[List[Any]]) -> None:
    assert (draw(boxes, kind=kind, far=0.25) == 0.25).all()


@pytest.mark.parametrize("corner", [(20.0, 20.0), (16.0, 24.0), (0.0, 0.0)])
@pytest.mark.parametrize("side", [0.0, 0.01, 1.0])
def test_box_smaller_than_a_cell_marks_one_cell(side: float, corner: Sequence[float]) -> None:
    x, y = corner
    (mask,) = draw([[[x, y, x + side, y + side]]])
    assert (mask == 1).nonzero().tolist() == [[y // 8, x // 8]]


def test_defaults() -> None:
    assert ObjectMask() == ObjectMask("values", 1.0, 0.5, 0.1, 1.5, True)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"kind": "disc"}, r"^kind must be one of values, gaussian, got 'disc'"),
        ({"near": 1.5}, "INSIDE >= NEAR >= FAR >= 0 .*, got 1.0, 1.5 and 0.1"),
        ({"far": 0.75}, "INSIDE >= NEAR >= FAR >= 0 .*, got 1.0, 0.5 and 0.75"),
        ({"far": -0.5}, "INSIDE >= NEAR >= FAR >= 0 .*, got 1.0, 0.5 and -0.5"),
        ({"inside": 0.0, "near": 0.0, "far": 0.0}, r"above 0, .*, got 0.0, 0.0 and 0.0"),
        *(({k: math.nan}, "^inside must be .* nan") for k in ("inside", "near", "far")),
        ({"near_factor": 0.5}, r"^near_factor must be at least 1, got 0.5"),
        ({"near_factor": math.nan}, r"^near_factor must be at least 1, got nan"),
    ],
)
def test_value_outside_its_range_is_refused_by_its_name(values: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ObjectMask(**values)


def test_values_at_the_limits_are_taken() -> None:
    for values in ({"far": 0.0, "near": 0.0}, {"near": 1.0, "far": 1.0}, {"near_factor": 1.0}):
        ObjectMask(**values)
