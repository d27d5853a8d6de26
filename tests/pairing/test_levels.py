"""Which level learns from which, and what of two paddings is compared."""

import math
from typing import Dict, List

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from d2kd.pairing.levels import (
    LevelPair,
    crop_to,
    describe_plan,
    match_inside,
    match_levels,
    pair_levels,
)
from tests.helpers.toys import detector_config, feature_view, level_pairs


def shapes(**strides: int) -> Dict[str, ShapeSpec]:
    return {k: ShapeSpec(channels=8, stride=s) for k, s in strides.items()}


def names(pairs) -> List[List[str]]:
    return [[p.student, p.teacher] for p in pairs]


DENSE = shapes(p3=8, p4=16, p5=32, p6=64, p7=128)
TWO_STAGE = shapes(p2=4, p3=8, p4=16, p5=32, p6=64)


def test_detectron2_s_retinanet_and_faster_rcnn_pair_by_stride() -> None:
    student = build_model(detector_config("retinanet")).backbone.output_shape()
    teacher = build_model(detector_config("faster_rcnn")).backbone.output_shape()
    assert names(pair_levels(student, teacher)) == [[k, k] for k in ("p3", "p4", "p5", "p6")]
    assert names(pair_levels(teacher, student)) == [[k, k] for k in ("p3", "p4", "p5", "p6")]


def test_strides_decide_and_not_names_nor_order() -> None:
    # The same pyramid under shifted names, written coarsest first.
    shifted = shapes(p4=32, p3=16, p2=8)
    pairs = pair_levels(DENSE, shifted)
    assert names(pairs) == [["p3", "p2"], ["p4", "p3"], ["p5", "p4"]]
    assert all(p.student_stride == p.teacher_stride for p in pairs)


def test_pair_knows_channels_and_strides_of_both_sides() -> None:
    student, teacher = ({"p3": ShapeSpec(channels=c, stride=8)} for c in (4, 6))
    assert pair_levels(student, teacher) == (LevelPair("p3", "p3", 4, 6, 8, 8),)


def test_named_pairs_replace_those_by_stride() -> None:
    named = [["p3", "p3"], ["p5", "p5"]]
    assert names(pair_levels(DENSE, TWO_STAGE, named)) == named
    # Finest first, however they are named: heads may take the first of them.
    assert names(pair_levels(DENSE, TWO_STAGE, named[::-1])) == named


@pytest.mark.parametrize(
    "named, message",
    [
        ([["p2", "p2"]], r"names 'p2', which the student does not have.*p3 \(stride 8\)"),
        ([["P3", "p3"]], r"names 'P3', which the student does not have. Did you mean 'p3'\?"),
        ([["p7", "p7"]], r"names 'p7', which the teacher does not have.*p2 \(stride 4\)"),
        ([["p3", "p2"]], r"'p3' \(stride 8\) with 'p2' \(stride 4\): .*does not resize"),
        ([["p3", "p3"], ["p3", "p3"]], r"names a student level twice: \['p3', 'p3'\]"),
        ([["p3"]], r"the entry \['p3'\]; each must be \[student level, teacher level\]"),
        (["p3"], r"the entry 'p3'; each must be \[student level, teacher level\]"),
        (["p3", "p4"], r"the entry 'p3'"),
    ],
)
def test_named_pair_that_cannot_be_is_refused(named: List, message: str) -> None:
    with pytest.raises(ValueError, match=r"DISTILL\.LEVELS.*" + message):
        pair_levels(DENSE, TWO_STAGE, named)


def test_pyramids_without_a_common_stride_are_refused_with_both() -> None:
    with pytest.raises(ValueError) as error:
        pair_levels(shapes(res4=16), shapes(p3=8, p5=32))
    message = str(error.value)
    assert "No common level" in message
    assert "student: res4 (stride 16)" in message
    assert "teacher: p3 (stride 8), p5 (stride 32)" in message


def test_plan_says_what_is_paired_and_what_is_left_out() -> None:
    lines = describe_plan(pair_levels(DENSE, TWO_STAGE), DENSE, TWO_STAGE).splitlines()
    assert len(lines) == 4 + 2
    assert lines[0] == "  p3 (stride 8, 8 channels) <- p3 (stride 8, 8 channels)"
    assert lines[4:] == ["  unused levels of the student: p7", "  unused levels of the teacher: p2"]


def test_maps_of_equal_size_are_handed_on_as_they_are() -> None:
    x, target = torch.randn(2, 4, 5, 6), torch.randn(2, 3, 5, 6)
    (found,) = match_levels(level_pairs(p3=(4, 3)), {"p3": x}, {"p3": target})
    assert found[0] == "p3" and found[1] is x and found[2] is target


def test_maps_of_unequal_padding_are_cropped_to_what_they_share() -> None:
    x, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 6, 9)
    ((_, cropped, cropped_target),) = match_levels(
        level_pairs(p3=(4, 4)), {"p3": x}, {"p3": target}
    )
    assert torch.equal(cropped, x[:, :, :6, :8])
    assert torch.equal(cropped_target, target[:, :, :6, :8])


@pytest.mark.parametrize("height, width", [(64, 64), (70, 100), (1, 127), (129, 33)])
def test_cropping_loses_only_padding(height: int, width: int) -> None:
    # An image padded below and to the right to multiples of 32 and of 128; cells of 8 pixels.
    sizes = [
        [math.ceil(side / divisor) * divisor // 8 for side in (height, width)]
        for divisor in (32, 128)
    ]
    x, target = (torch.zeros(1, 1, *size) for size in sizes)
    for cells in (x, target):  # 1 where a cell has a pixel of the image
        cells[..., : math.ceil(height / 8), : math.ceil(width / 8)] = 1
    ((_, cropped, cropped_target),) = match_levels(
        level_pairs(p3=(1, 1)), {"p3": x}, {"p3": target}
    )
    assert torch.equal(cropped, cropped_target)
    assert cropped.sum() == x.sum() == target.sum()


def test_levels_of_unequal_stride_are_never_cropped_into_each_other() -> None:
    pair = LevelPair("p3", "p2", 4, 4, 8, 4)
    with pytest.raises(AssertionError, match=r"p3 \(stride 8\) and p2 \(stride 4\)"):
        list(match_levels([pair], {"p3": torch.zeros(1)}, {"p2": torch.zeros(1)}))


@pytest.mark.parametrize("student, teacher", [((8, 8), (6, 9)), ((6, 9), (8, 8)), ((5, 7), (8, 9))])
def test_cells_inside_are_those_of_the_part_that_both_have(student, teacher) -> None:
    # Images of 5 x 7 and, begun by a pixel, 3 x 6 cells of 8 pixels; each detector pads them to
    # its own size. The first image fills the smallest map.
    sizes = [(40, 56), (17, 41)]
    views = [feature_view({"p3": torch.randn(2, 4, *cells)}, sizes) for cells in (student, teacher)]
    ((level, x, target, inside),) = match_inside(level_pairs(p3=(4, 4)), *views)
    height, width = (min(sides) for sides in zip(student, teacher))
    assert level == "p3" and x.shape == target.shape == (2, 4, height, width)
    expected = torch.zeros(2, 1, height, width, dtype=torch.bool)
    expected[0, :, :5, :7] = True
    expected[1, :, :3, :6] = True
    assert inside.dtype == torch.bool and torch.equal(inside, expected)
    assert torch.equal(x, views[0].features["p3"][..., :height, :width])
    assert torch.equal(target, views[1].features["p3"][..., :height, :width])


def test_student_that_pads_nothing_has_every_cell_inside_whatever_the_teacher_pads() -> None:
    views = [
        feature_view({"p3": torch.randn(2, 4, *cells)}, [(40, 56)] * 2)
        for cells in ((5, 7), (8, 8))
    ]
    ((_, x, target, inside),) = match_inside(level_pairs(p3=(4, 4)), *views)
    assert inside is None and x.shape == target.shape == (2, 4, 5, 7)


def test_inside_is_told_level_by_level() -> None:
    # 40 pixels are 5 of 6 rows of 8 pixels, but all 3 of 16.
    features = {"p3": torch.randn(1, 4, 6, 8), "p4": torch.randn(1, 4, 3, 4)}
    view = feature_view(features, [(40, 64)])
    found = {
        k: inside for k, _, _, inside in match_inside(level_pairs(p3=(4, 4), p4=(4, 4)), view, view)
    }
    assert list(found) == ["p3", "p4"] and found["p4"] is None
    assert found["p3"].sum() == 5 * 8 and not found["p3"][:, :, 5].any()


@pytest.mark.parametrize("other, size", [((5, 6), (5, 6)), ((7, 9), (5, 6)), ((3, 9), (3, 6))])
def test_crop_cuts_below_and_to_the_right_what_the_other_lacks(other, size) -> None:
    x = torch.randn(2, 4, 5, 6) > 0
    cropped = crop_to(x, torch.zeros(1, *other))
    assert torch.equal(cropped, x[..., : size[0], : size[1]])
    assert (cropped is x) == (size == (5, 6)), "handed on as it is"
