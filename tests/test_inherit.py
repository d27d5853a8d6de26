"""Initialising parts of the student from the teacher: exactly the fitting entries, said aloud."""

import logging
from typing import Dict, List

import pytest
import torch
from torch import nn

from detectron2.modeling import build_model

from d2kd.inherit import inherit, part_of

from toys import detector_config


def build(name: str, seed: int, **overrides: object) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(detector_config(name, **overrides))


def snapshot(model: nn.Module) -> Dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


@pytest.mark.parametrize(
    "key, part",
    [
        ("backbone.bottom_up.stem.conv1.weight", "backbone"),
        ("backbone.fpn_lateral3.weight", "neck"),
        ("backbone.top_block.p6.weight", "neck"),
        ("head.cls_score.weight", "head"),
        ("proposal_generator.rpn_head.conv.weight", "head"),
        ("roi_heads.box_head.fc1.weight", "head"),
    ],
)
def test_every_entry_of_a_detector_belongs_to_one_part(key: str, part: str) -> None:
    assert part_of(key) == part


@pytest.mark.parametrize("name", ["retinanet", "faster_rcnn"])
@pytest.mark.parametrize("parts", [["neck"], ["head"], ["neck", "head"]])
def test_the_named_parts_are_copied_and_nothing_else(name: str, parts: List[str]) -> None:
    student, teacher = build(name, seed=1), build(name, seed=2)
    before, source = snapshot(student), snapshot(teacher)
    copied = inherit(student, teacher, parts)
    assert sorted(copied) == sorted(k for k in before if part_of(k) in parts)
    for key, value in student.state_dict().items():
        expected = source[key] if part_of(key) in parts else before[key]
        assert torch.equal(value, expected), key
    assert all(torch.equal(v, source[k]) for k, v in teacher.state_dict().items())


def test_entries_of_another_shape_are_skipped_and_listed(caplog: pytest.LogCaptureFixture) -> None:
    student = build("retinanet", seed=1)
    teacher = build("retinanet", seed=2, MODEL__RETINANET__NUM_CLASSES=5)
    before = snapshot(student)
    with caplog.at_level(logging.INFO, logger="d2kd.inherit"):
        copied = inherit(student, teacher, ["head"])
    # 3 anchors a cell: 3 x 3 logits in the student, 3 x 5 in the teacher.
    skipped = {"head.cls_score.weight", "head.cls_score.bias"}
    assert set(copied) == {k for k in before if part_of(k) == "head"} - skipped
    assert all(torch.equal(student.state_dict()[k], before[k]) for k in skipped)
    assert f"{len(copied)} of {len(copied) + 2}" in caplog.text
    assert "head.cls_score.bias (teacher (15,), student (9,))" in caplog.text


def test_entries_that_the_teacher_lacks_are_skipped_and_listed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    # P2 of a Faster R-CNN, and P6, P7 of a RetinaNet, are the one's alone.
    student, teacher = build("retinanet", seed=1), build("faster_rcnn", seed=2)
    with caplog.at_level(logging.INFO, logger="d2kd.inherit"):
        copied = inherit(student, teacher, ["neck"])
    assert {k.split(".")[1] for k in copied} == {
        f"fpn_{kind}{i}" for kind in ("lateral", "output") for i in (3, 4, 5)
    }
    assert "backbone.top_block.p6.weight (not in the teacher)" in caplog.text


def test_part_of_which_nothing_fits_is_refused() -> None:
    student, teacher = build("retinanet", seed=1), build("faster_rcnn", seed=2)
    with pytest.raises(ValueError, match="DISTILL.INHERIT: nothing of the student's 'head' has"):
        inherit(student, teacher, ["head"])


def test_unknown_part_is_refused() -> None:
    detector = build("retinanet", seed=1)
    with pytest.raises(ValueError, match="DISTILL.INHERIT: .*'spine'"):
        inherit(detector, detector, ["spine"])
