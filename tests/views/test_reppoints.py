"""What a view says of RepPoints."""

from typing import Any

import pytest
import torch
from torch import nn

import detectron2.modeling
from detectron2.modeling import build_model

from d2kd.conformance.case import Case, Pair
from d2kd.conformance.detectors import enliven
from d2kd.conformance.gradients import check_gradients
from d2kd.views import describe_detector
from tests.helpers.toys import batch, detector_config
from tests.helpers.view_toys import OF_DENSE, record, view_of_teacher

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)


def build(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    overrides = {"MODEL__REPPOINTS__NUM_CONVS": 3, "MODEL__REPPOINTS__NORM": "", **overrides}
    detector = build_model(detector_config("reppoints", **overrides)).train()
    enliven(detector)
    return detector


def test_info() -> None:
    detector = build()
    info = describe_detector(detector, "student")
    assert info.name == "RepPoints" and not info.two_stage and info.box_weights == ()
    assert info.provides == OF_DENSE | {"tower_1", "tower_2", "tower_3"}
    assert (info.num_anchors, info.num_classes, info.vector_channels) == (1, 3, 32)
    assert info.anchor_free and info.anchors["p4"] == ((-8.0, -8.0, 8.0, 8.0),)


def test_dense_predictions_are_those_of_the_losses() -> None:
    detector = build()
    seen = []
    original = detector.losses
    detector.losses = lambda *args: seen.append(args) or original(*args)
    view = record(detector, batch())
    logits, boxes, _, _, _ = seen[0]
    dense = view.dense()
    for level, found in enumerate(view.boxes(dense.deltas)):
        assert torch.equal(found.flatten(2).transpose(1, 2), boxes[level])
        assert torch.equal(dense.logits[level].flatten(2).transpose(1, 2), logits[level])
        assert found.requires_grad and found.amax() > found.amin()


def test_a_teacher_says_what_the_student_says() -> None:
    detector = build().eval()
    ours, theirs = record(detector, batch()).dense(), view_of_teacher(detector, batch()).dense()
    for key in ("logits", "deltas", "tower"):
        for a, b in zip(getattr(ours, key), getattr(theirs, key)):
            assert torch.equal(a, b)


def test_labels_are_those_of_its_own_refine_loss() -> None:
    detector = build()
    answers = []
    original = detector.label_anchors
    detector.label_anchors = lambda *args: answers.append(original(*args)) or answers[-1]
    labels = record(detector, batch()).anchor_labels()
    assert labels.centerness is None
    rows = torch.cat([x.flatten(1) for x in labels.maps], dim=1)
    assert torch.equal(rows, torch.stack(answers[0][0]))
    assert sum(x.sum() for x in labels.on_objects) > 0


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_rest_of_the_head_predicts_the_same_from_its_own_towers(depth: int) -> None:
    view = view_of_teacher(build().eval(), batch())
    again = view.predict_from(depth, view.towers(depth))
    dense = view.dense()
    for key in ("logits", "deltas"):
        for a, b in zip(getattr(again, key), getattr(dense, key)):
            assert torch.equal(a, b)


def test_regions_are_predicted_boxes_and_their_vectors_what_the_classifier_reads() -> None:
    view = record(build(), batch())
    regions = view.regions()
    vectors, dense, source = view.region_vectors(regions), view.dense(), regions.source
    assert len(regions) == len(vectors) > 20
    boxes, level_of = view.boxes(dense.deltas), {
        view.strides[k]: i for i, k in enumerate(dense.levels)
    }
    for i in range(0, len(regions), 7):
        level, image = level_of[int(source.stride[i])], int(regions.image[i])
        cell = (image, slice(None), int(source.y[i]), int(source.x[i]))
        assert torch.equal(regions.rois[i, 1:], boxes[level][cell].clamp(0, 64))
        logits = view.detector.head.cls_score(vectors[i, :, None, None]).flatten()
        assert torch.allclose(logits, dense.logits[level][cell], atol=1e-5)


@pytest.mark.parametrize("name", ["AMD", "CrossKD"])
def test_heads_that_read_inside_learn_between_two(name: str) -> None:
    case = Case(name, Pair("reppoints", "reppoints"))
    distiller = case.fresh()
    losses = case.terms(distiller)
    assert not case.refusal and all(x.isfinite() and x > 0 for x in losses.values())
    sum(losses.values()).backward()
    assert sum(float(p.grad.abs().sum()) for p in distiller.student.backbone.parameters()) > 0


@pytest.mark.parametrize(
    "teacher, student",
    [
        ("reppoints", "retinanet"),
        ("retinanet", "reppoints"),
        ("faster_rcnn", "reppoints"),
        pytest.param("fcos", "reppoints", marks=needs_fcos),
    ],
)
@pytest.mark.parametrize("name", ["CKD", "MAR"])  # on vectors of regions, and on class heads
def test_heads_on_regions_learn_between_unlike_detectors(
    name: str, teacher: str, student: str
) -> None:
    case = Case(name, Pair(teacher, student))
    assert not case.refusal
    check_gradients(case)
