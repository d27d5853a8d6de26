"""Initialising parts of the student from the teacher: exactly the fitting entries, said aloud."""

import copy
import logging
from pathlib import Path
from typing import Dict, List, Tuple

import pytest
import torch
from torch import nn

from detectron2.config import get_cfg
from detectron2.modeling import build_model

from d2kd.data.outlines import CLASSES
from d2kd.inherit import inherit
from d2kd.weights.coverage import part_of
from tests.helpers.toys import NUM_CLASSES, detector_config, distill_config, write_teacher


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


def test_a_detector_without_a_pyramid_inherits_no_neck() -> None:
    """Not its whole backbone, which is no pyramid and is not to be inherited."""
    values = {
        "MODEL__BACKBONE__NAME": "build_resnet_backbone",
        "MODEL__RESNETS__OUT_FEATURES": ["res4"],
        "MODEL__RPN__IN_FEATURES": ["res4"],
        "MODEL__ROI_HEADS__IN_FEATURES": ["res4"],
        "MODEL__ROI_HEADS__NAME": "Res5ROIHeads",
        "MODEL__ANCHOR_GENERATOR__SIZES": [[32, 64]],
    }
    student, teacher = (build("faster_rcnn", seed=seed, **values) for seed in (1, 2))
    with pytest.raises(ValueError, match="no entry of the student's 'neck'"):
        inherit(student, teacher, ["neck"])


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
    with pytest.raises(ValueError, match="DISTILL.INHERIT: no entry of the student's 'head'"):
        inherit(student, teacher, ["head"])


def test_unknown_part_is_refused() -> None:
    detector = build("retinanet", seed=1)
    with pytest.raises(ValueError, match="DISTILL.INHERIT: .*'spine'"):
        inherit(detector, detector, ["spine"])


# Other classes -----------------------------------------------------------------------------------

# By detector, the layers whose rows are classes. The boxes of a dense head are of no class, nor are
# those of a cascade.
ROWS = {
    "retinanet": ["head.cls_score"],
    "faster_rcnn": ["roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred"],
    "mask_rcnn": [
        "roi_heads.box_predictor.cls_score",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.mask_head.predictor",
    ],
    "cascade_rcnn": [f"roi_heads.box_predictor.{i}.cls_score" for i in range(3)],
}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("others", [0, 2], ids=["as many", "more"])
def test_rows_of_other_classes_are_left_alone_and_all_else_is_copied(
    name: str, others: int, caplog: pytest.LogCaptureFixture
) -> None:
    count = NUM_CLASSES + others
    values = {"MODEL__RETINANET__NUM_CLASSES": count, "MODEL__ROI_HEADS__NUM_CLASSES": count}
    student, teacher = build(name, seed=1), build(name, seed=2, **values)
    for i, x in enumerate([*student.state_dict().values(), *teacher.state_dict().values()]):
        x += i  # also biases, and statistics that nothing has changed yet, differ
    before, source = snapshot(student), snapshot(teacher)
    rows = {f"{layer}.{x}" for layer in ROWS[name] for x in ("weight", "bias")}
    with caplog.at_level(logging.INFO, logger="d2kd.inherit"):
        copied = inherit(student, teacher, ["neck", "head"], same_classes=False)
    assert set(copied) == {k for k in before if part_of(k) != "backbone"} - rows
    for key, value in student.state_dict().items():
        assert torch.equal(value, source[key] if key in copied else before[key]), key
    for key in rows:
        shapes = f"teacher {tuple(source[key].shape)}, student {tuple(before[key].shape)}"
        reason = shapes if others else "different classes"
        assert f"{key} ({reason})" in caplog.text


@pytest.mark.parametrize(
    "values, layers",
    [
        ({"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}, ["box_predictor.bbox_pred"]),
        ({"MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK": True}, ["mask_head.predictor"]),
    ],
)
def test_layer_without_rows_for_each_class_is_copied_between_other_classes(
    values: Dict[str, object], layers: List[str]
) -> None:
    student, teacher = build("mask_rcnn", seed=1, **values), build("mask_rcnn", seed=2, **values)
    copied = inherit(student, teacher, ["head"], same_classes=False)
    expected = [*ROWS["mask_rcnn"]]
    for layer in layers:
        expected.remove(f"roi_heads.{layer}")
    left = {k for k in snapshot(student) if part_of(k) == "head"} - set(copied)
    assert left == {f"{layer}.{x}" for layer in expected for x in ("weight", "bias")}


@pytest.mark.parametrize("order, same", [((0, 1, 2, 3, 4, 5), True), ((1, 0, 2, 3, 4, 5), False)])
def test_distiller_inherits_rows_of_the_same_classes_only(
    order: Tuple[int, ...], same: bool, tmp_path: Path
) -> None:
    classes = {"MODEL__RETINANET__NUM_CLASSES": 6}
    opts = write_teacher(tmp_path, "retinanet", **classes)
    names = [list(CLASSES)[i] for i in order]
    values = {"DATASETS__TRAIN": ("d2kd_shapes_train",), "DISTILL__INHERIT": ["head"]}
    cfg = distill_config("retinanet", opts, ["PKD"], **classes, **values)
    cfg.DISTILL.TEACHER.CLASSES = names
    distiller = build_model(cfg)
    distiller.inherit_from_teacher()
    ours, theirs = (x.head.state_dict() for x in (distiller.student, distiller.teacher.model))
    equal = {k for k, v in ours.items() if torch.equal(v, theirs[k])}
    assert ("cls_score.weight" in equal) == same and "bbox_pred.weight" in equal


# Entries of one name and shape that mean something else ----------------------------------------

RATIOS = "MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS"
ANCHOR_ROWS = {
    "retinanet": ["head.cls_score", "head.bbox_pred"],
    "faster_rcnn": [
        f"proposal_generator.rpn_head.{x}" for x in ("objectness_logits", "anchor_deltas")
    ],
}


@pytest.mark.parametrize(
    "name, values, layers, reason",
    [
        (name, values, rows, "different anchors")
        for name, rows in ANCHOR_ROWS.items()
        for values in ({RATIOS: [[2.0, 1.0, 0.5]]}, {"MODEL__ANCHOR_GENERATOR__OFFSET": 0.5})
    ]
    + [
        (
            "retinanet",
            {"MODEL__RETINANET__BBOX_REG_WEIGHTS": (10.0, 10.0, 5.0, 5.0)},
            ["head.bbox_pred"],
            "different box coding",
        ),
        (
            "faster_rcnn",
            {"MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS": (1.0, 1.0, 1.0, 1.0)},
            ["roi_heads.box_predictor.bbox_pred"],
            "different box coding",
        ),
        (
            "faster_rcnn",
            {"MODEL__RPN__BBOX_REG_WEIGHTS": (2.0, 2.0, 2.0, 2.0)},
            ["proposal_generator.rpn_head.anchor_deltas"],
            "different box coding",
        ),
    ],
)
def test_rows_that_mean_other_anchors_or_boxes_are_left_alone(
    name: str,
    values: Dict[str, object],
    layers: List[str],
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    student, teacher = build(name, seed=1), build(name, seed=2, **values)
    with caplog.at_level(logging.INFO, logger="d2kd.inherit"):
        copied = inherit(student, teacher, ["head"])
    left = {k for k in snapshot(student) if part_of(k) == "head"} - set(copied)
    assert left == {f"{layer}.{x}" for layer in layers for x in ("weight", "bias")}
    assert all(f"{key} ({reason})" in caplog.text for key in left)


@pytest.mark.parametrize("level", range(5))
def test_anchors_that_differ_on_one_level_are_other_anchors(level: int) -> None:
    sizes = [[2.0 ** (i + 5)] for i in range(5)]  # of P3 to P7
    ours, theirs = ({"MODEL__ANCHOR_GENERATOR__SIZES": copy.deepcopy(sizes)} for _ in range(2))
    theirs["MODEL__ANCHOR_GENERATOR__SIZES"][level] = [100.0]
    student, teacher = build("retinanet", seed=1, **ours), build("retinanet", seed=2, **theirs)
    copied = inherit(student, teacher, ["head"])
    assert copied and not any("cls_score" in k or "bbox_pred" in k for k in copied)


def test_norms_of_another_kind_are_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    student = build("retinanet", seed=1, MODEL__FPN__NORM="GN")
    teacher = build("retinanet", seed=2, MODEL__FPN__NORM="BN")
    with caplog.at_level(logging.INFO, logger="d2kd.inherit"):
        copied = inherit(student, teacher, ["neck"])
    assert copied and not any("norm" in k for k in copied)
    assert (
        "backbone.fpn_lateral3.norm.weight (teacher BatchNorm2d, student GroupNorm)" in caplog.text
    )


def test_coarse_levels_computed_from_another_feature_are_left_alone() -> None:
    student, teacher = build("retinanet", seed=1), build("retinanet", seed=2)
    teacher.backbone.top_block.in_feature = "p5"  # as in FCOS; here both have as many channels
    copied = inherit(student, teacher, ["neck"])
    left = {k for k in snapshot(student) if part_of(k) == "neck"} - set(copied)
    assert left and all(k.startswith("backbone.top_block.") for k in left)


@pytest.mark.skipif(
    "USE_SIGMOID_CE" not in get_cfg().MODEL.ROI_BOX_HEAD, reason="came after Detectron2 0.6"
)
def test_classifier_of_sigmoids_does_not_start_one_of_a_softmax() -> None:
    student = build("faster_rcnn", seed=1)
    teacher = build("faster_rcnn", seed=2, MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE=True)
    copied = inherit(student, teacher, ["head"])
    left = {k for k in snapshot(student) if part_of(k) == "head"} - set(copied)
    assert left == {f"roi_heads.box_predictor.cls_score.{x}" for x in ("weight", "bias")}
