"""RoI features of the mask head in place of the box head's: RoIFI's and SGFI's key POOLER."""

from typing import Any, List

import pytest
import torch

from d2kd.conformance.case import MASK_PAIRS, Case, Pair, find_case
from d2kd.views import find_view

MASK_PAIR = MASK_PAIRS[0]


def case_of(name: str, *opts: Any) -> Case:
    return find_case(name, MASK_PAIR, [f"DISTILL.{name}.POOLER", "mask", *opts])


@pytest.mark.parametrize("name", ["RoIFI", "SGFI"])
def test_regions_are_the_proposals_of_objects_and_pooled_once_by_each(name: str) -> None:
    case = case_of(name)
    distiller = case.fresh()
    calls: List[str] = []
    for side, detector in (("ours", distiller.student), ("theirs", distiller.teacher.model)):
        pooler = detector.roi_heads.mask_pooler
        pooler.register_forward_hook(lambda *_, side=side: calls.append(side))
    loss = sum(case.terms(distiller).values())
    assert sorted(calls) == ["ours", "theirs"] and loss > 0
    loss.backward()
    assert all(p.grad is not None for p in distiller.heads[name].adapter.parameters())
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
    student, teacher = distiller.last_step.student, distiller.last_step.teacher
    regions = student.mask_regions
    assert regions is student.mask_regions and len(regions) > 2
    for boxes, proposals in zip(regions.boxes, student.mask_proposals):
        assert boxes is proposals.proposal_boxes
        assert (proposals.gt_classes < student.num_classes).all()
    assert student.mask_features(regions.boxes) is student.mask_features()
    assert teacher.mask_features(regions.boxes).shape == (len(regions), 32, 14, 14)


def test_roi_fi_is_the_mean_squared_difference_of_these_features() -> None:
    case = case_of("RoIFI")
    distiller = case.fresh()
    (loss,) = case.terms(distiller).values()
    head, step = distiller.heads["RoIFI"], distiller.last_step
    regions = step.student.mask_regions
    x = head.adapter(step.student.mask_features()).double()
    target = step.teacher.mask_features(regions.boxes).double()
    total = 0.0
    for ours, theirs in zip(x, target):
        total += ((ours - theirs) ** 2).sum().item() / ours.numel()
    assert loss.item() == pytest.approx(total / len(regions), rel=1e-5)


def test_student_pools_these_boxes_as_it_did_in_training() -> None:
    distiller = case_of("RoIFI").fresh()
    case_of("RoIFI").terms(distiller)
    student = distiller.last_step.student
    again = find_view(distiller.student, "teacher")(distiller.student, student.batched_inputs)
    found = again.mask_features(student.mask_regions.boxes)
    torch.testing.assert_close(found, student.mask_features().detach(), rtol=1e-4, atol=1e-5)


def test_sizes_may_differ_where_the_student_s_are_pooled_anew() -> None:
    smaller = ["MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 10]
    refusal = case_of("RoIFI", *smaller).refusal
    assert "10 cells a side and the teacher's 14 (MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION)" in refusal
    case = case_of("SGFI", *smaller)
    assert sum(case.terms(case.fresh()).values()) > 0


@pytest.mark.parametrize("name", ["RoIFI", "SGFI"])
def test_detectors_without_masks_and_other_poolers_are_refused(name: str) -> None:
    key, pair = f"DISTILL.{name}.POOLER", Pair("faster_rcnn", "faster_rcnn")
    refusal = find_case(name, pair, [key, "mask"]).refusal
    assert f"{name} needs mask_features; the student GeneralizedRCNN has none" in refusal
    refusal = find_case(name, MASK_PAIR, [key, "masks"]).refusal
    assert f"{key} must be one of box, mask, got 'masks'" in refusal
