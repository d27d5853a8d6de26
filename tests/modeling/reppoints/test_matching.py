"""Which cells learn which box, in the first and in the second stage."""

from typing import Sequence, Tuple

import pytest
import torch
from torch import Tensor

from detectron2.modeling.matcher import Matcher
from detectron2.structures import Boxes

from d2kd.modeling.reppoints.cells import Cells, cells_of
from d2kd.modeling.reppoints.matching import level_strides, match_boxes, match_points

STRIDES = torch.tensor([8.0, 16.0, 32.0, 64.0, 128.0])
NONE = torch.zeros(0, 4)


def cells(image: Tuple[int, int] = (64, 64), batch: Tuple[int, int] = (64, 64)) -> Cells:
    """Of an image of this (height, width) in a batch of that, at strides 8 and 16."""
    levels = []
    for stride in (8, 16):
        y, x = torch.meshgrid(*(torch.arange(0, v, stride) for v in batch), indexing="ij")
        centres = torch.stack([x, y, x, y], dim=2).view(-1, 4)
        levels.append(Boxes(centres + stride / 2 * torch.tensor([-1, -1, 1, 1])))
    return cells_of(levels, [image], 32)


def match(gt: Sequence[Sequence[float]], where: Cells) -> Tensor:
    boxes = torch.tensor(gt).view(-1, 4)
    return match_points(boxes, where.corners, where.strides, where.valid[0], scale=4.0)


@pytest.mark.parametrize(
    "side, stride",
    [(1, 8), (63.9, 8), (64, 16), (127.9, 16), (128, 32), (255.9, 32), (256, 64), (511.9, 64)]
    + [(512, 128), (4000, 128)],
)
@pytest.mark.parametrize("shape", [1.0, 4.0])
def test_level_of_a_box_is_that_of_the_root_of_its_area(
    side: float, stride: int, shape: float
) -> None:
    size = torch.tensor([[side * shape, side / shape]])
    assert level_strides(size, STRIDES, 4.0).item() == stride


def test_nearest_cell_of_the_level_learns_a_box() -> None:
    where = cells()
    found = match([[10.0, 20.0, 40.0, 50.0], [0.0, 0.0, 64.0, 64.0]], where)
    assert (found >= 0).sum() == 2
    for box, corner, stride in ((0, (24.0, 32.0), 8), (1, (32.0, 32.0), 16)):
        row = int((found == box).nonzero())
        assert tuple(where.corners[row].tolist()) == corner and where.strides[row] == stride


def test_distance_is_in_widths_and_heights_of_the_box() -> None:
    # The centre (20.5, 19) is 3.5 from x = 24 and 3 from y = 16; both axes decide by themselves, so
    # a flat box's nearest cell is the same, but between two boxes the larger one is nearer.
    small, large = [15.5, 14.0, 25.5, 24.0], [0.5, 0.0, 40.5, 38.0]
    for boxes in ([small, large], [large, small]):
        found = match(boxes, cells())
        assert (found >= 0).sum() == 1  # one cell for both: the other box has none
        assert boxes[int(found.max())] == large


def test_first_of_two_equal_boxes_has_the_cell() -> None:
    box = [10.0, 10.0, 30.0, 30.0]
    assert match([box, box], cells()).max() == 0


def test_padding_learns_nothing() -> None:
    # Of a 20 x 40 image, 32 x 64 count.
    where = cells(image=(20, 40), batch=(128, 128))
    inside = (where.corners < torch.tensor([64, 32])).all(dim=1)
    assert torch.equal(where.valid[0], inside)
    found = match([[10.0, 20.0, 74.0, 84.0]], where)  # its centre is (42, 52)
    row = int((found >= 0).nonzero())
    assert where.corners[row].tolist() == [48, 16] and where.strides[row] == 16


def test_image_without_boxes() -> None:
    where = cells()
    assert (match([], where) == -1).all()
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    boxes, valid = torch.rand(len(where.corners), 4), torch.ones(len(where.corners)) > 0
    assert (match_boxes(NONE, boxes, valid, matcher)[1] == 0).all()


@pytest.mark.parametrize(
    "width, label",  # of a box in a ground truth of width 10: IoU = width / 10
    [(3.9, 0), (4.1, -1), (4.9, -1), (5.1, 1), (10.0, 1)],
)
def test_iou_decides_on_classes(width: float, label: int) -> None:
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, width, 10.0]])
    assert labels_of(torch.tensor([[0.0, 0.0, 10.0, 10.0]]), boxes).tolist() == [1, label]


def labels_of(gt: Tensor, boxes: Tensor, valid: Sequence[bool] = ()) -> Tensor:
    matcher = Matcher([0.4, 0.5], [0, -1, 1], allow_low_quality_matches=True)
    usable = torch.tensor(valid or [True] * len(boxes))
    return match_boxes(gt, boxes, usable, matcher)[1]


def test_best_box_of_an_object_counts_however_low_its_iou() -> None:
    gt = torch.tensor([[0.0, 0.0, 10.0, 10.0], [50.0, 50.0, 60.0, 60.0]])
    boxes = torch.tensor([[0.0, 0.0, 2.0, 2.0], [0.0, 0.0, 1.0, 1.0], [80.0, 80.0, 90.0, 90.0]])
    # The second object overlaps with none: all would be its best.
    assert labels_of(gt, boxes).tolist() == [1, 0, 0]
    assert labels_of(gt, boxes, [False, True, True]).tolist() == [-1, 1, 0]
