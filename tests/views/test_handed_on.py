"""What a teacher of another device or format says arrives as the student's own would be."""

import gc
import weakref
from dataclasses import fields, is_dataclass
from typing import Any, Callable, Iterator

import pytest
import torch
from torch import Tensor

from d2kd.views import DensePredictions, DetectorView, HandedOnView, Regions
from d2kd.views.regions import Source
from tests.helpers.toys import batch
from tests.helpers.view_toys import build_teacher, some_boxes, view_of_teacher

ASKED = {
    "features": ("retinanet", lambda view: dict(view.features)),
    "dense": ("retinanet", lambda view: view.dense()),
    "towers": ("retinanet", lambda view: view.towers(1)),
    "rest of the head": ("retinanet", lambda view: view.predict_from(1, view.towers(1))),
    "boxes": ("retinanet", lambda view: view.boxes(view.dense().deltas)),
    "RoI features": ("faster_rcnn", lambda view: view.roi_features(some_boxes())),
    "RoI predictions": ("faster_rcnn", lambda view: view.roi_predictions(some_boxes())),
    "vectors": ("faster_rcnn", lambda view: view.region_vectors(Regions(some_boxes()))),
    "vectors of cells": ("retinanet", lambda view: view.region_vectors(some_cells())),
    "mask logits": ("mask_rcnn", lambda view: view.mask_logits(some_boxes())),
    "mask features": ("mask_rcnn", lambda view: view.mask_features(some_boxes())),
}


def some_cells() -> Regions:
    """Regions that a dense student predicted on p3 and p4 of a 64 x 64 image."""
    source = Source(*torch.tensor([[8, 8, 16, 8, 16], [0, 7, 1, 2, 3], [5, 0, 3, 2, 1], [0] * 5]))
    return Regions(some_boxes(), source)


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, dict):
        yield from tensors(list(x.values()))
    elif isinstance(x, (list, tuple)):
        for y in x:
            yield from tensors(y)
    elif isinstance(x, DensePredictions):
        yield from tensors([x.logits, x.deltas, x.tower])
    elif is_dataclass(x):
        yield from tensors([getattr(x, f.name) for f in fields(x)])


def handed_on(name: str, to: str = "cpu", half: bool = True) -> HandedOnView:
    """Of a teacher with the channels last, in bfloat16."""
    detector = build_teacher(name).to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        view = view_of_teacher(detector, batch())
    return HandedOnView(view, torch.device(to), torch.float32)


def mixed(name: str) -> DetectorView:
    """Of a teacher that runs in the student's bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        return view_of_teacher(build_teacher(name), batch())


@pytest.mark.parametrize("name, ask", ASKED.values(), ids=ASKED)
def test_answers_are_contiguous_and_those_of_the_plain_teacher(
    name: str, ask: Callable[[DetectorView], Any]
) -> None:
    plain = view_of_teacher(build_teacher(name), batch())
    found, expected = (list(tensors(ask(x))) for x in (handed_on(name, half=False), plain))
    assert len(found) == len(expected) > 0
    for x, y in zip(found, expected):
        assert x.is_contiguous() and not x.requires_grad
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    "name, ask", [ASKED[x] for x in ("features", "dense", "towers", "vectors")]
)
def test_answers_are_float32_on_the_student_s_device(name: str, ask: Callable) -> None:
    found = list(tensors(ask(handed_on(name, to="meta"))))
    assert found and all(x.device.type == "meta" and x.dtype == torch.float32 for x in found)


def test_answers_are_given_once() -> None:
    view, boxes = handed_on("faster_rcnn"), some_boxes()
    assert view.features["p3"] is view.features["p3"]
    assert view.dense() is view.dense()
    assert view.roi_predictions(boxes) is view.roi_predictions(boxes)
    assert view.roi_predictions(boxes) is not view.roi_predictions(some_boxes())


def test_towers_of_each_depth_are_given_as_what_they_are() -> None:
    detector = build_teacher("retinanet", MODEL__RETINANET__NUM_CONVS=2)
    plain = view_of_teacher(detector, batch())
    view = HandedOnView(view_of_teacher(detector, batch()), torch.device("cpu"), torch.float32)
    for depth in (1, 2):
        for x, y in zip(tensors(view.towers(depth)), tensors(plain.towers(depth))):
            assert torch.equal(x, y), depth


def test_boxes_and_cells_inside_an_image_are_on_the_student_s_device() -> None:
    inputs = batch(1) + batch(1, width=96)
    detector = build_teacher("retinanet", MODEL__RETINANET__SCORE_THRESH_TEST=0.0)
    view = HandedOnView(view_of_teacher(detector, inputs), torch.device("meta"), None)
    assert view.inside_image("p3").device.type == "meta"
    assert all(x.gt_boxes.device.type == "meta" for x in view.gt_instances)
    assert all(x.pred_boxes.device.type == "meta" for x in view.detections())


def test_maps_are_freed_with_the_view_also_where_a_level_was_not_read() -> None:
    # Not by the garbage collector, which would find them some steps later.
    gc.disable()
    try:
        view = handed_on("retinanet")
        read = weakref.ref(view.features["p3"])
        assert read() is not None
        del view
        assert read() is None
    finally:
        gc.enable()


def test_student_s_towers_get_a_gradient_through_the_teacher_s_head_and_it_gets_none() -> None:
    view = handed_on("retinanet")
    towers = view.towers(1)
    for x in towers.classes + towers.boxes:
        x.requires_grad_()
    out = view.predict_from(1, towers)
    (sum(x.sum() for x in out.logits) + sum(x.sum() for x in out.deltas)).backward()
    assert all(x.grad.dtype == torch.float32 and x.grad.any() for x in towers.classes)
    assert all(p.grad is None for p in view.detector.parameters())


@pytest.mark.parametrize("name, ask", ASKED.values(), ids=ASKED)
@pytest.mark.parametrize("view", [handed_on, mixed], ids=["own precision", "the student's"])
def test_precision_is_that_of_the_step_whoever_asks(
    view: Callable[[str], DetectorView], name: str, ask: Callable[[DetectorView], Any]
) -> None:
    # A head may ask where it has switched autocast off, to compute its loss in float32.
    inside = view(name)
    with torch.autocast("cpu", enabled=False):
        found = list(tensors(ask(inside)))
    expected = list(tensors(ask(view(name))))
    assert [x.dtype for x in found] == [x.dtype for x in expected]
    assert all(torch.equal(x, y) for x, y in zip(found, expected))
