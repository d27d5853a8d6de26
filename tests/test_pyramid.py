"""Which level learns from which, and what of two paddings is compared."""

import math
from typing import Dict, List

import pytest
import torch

from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from d2kd.pyramid import LevelPair, describe_plan, match_levels, pair_levels

from toys import detector_config, level_pairs


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
    assert names(pair_levels(DENSE, TWO_STAGE, [["p5", "p5"], ["p3", "p3"]])) == [
        ["p5", "p5"],
        ["p3", "p3"],
    ]


@pytest.mark.parametrize(
    "named, message",
    [
        ([["p2", "p2"]], r"names 'p2', which the student does not have.*p3 \(stride 8\)"),
        ([["p7", "p7"]], r"names 'p7', which the teacher does not have.*p2 \(stride 4\)"),
        ([["p3", "p2"]], r"'p3' \(stride 8\) with 'p2' \(stride 4\): .*never resized"),
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
    assert lines[4:] == ["  not used of the student: p7", "  not used of the teacher: p2"]


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
