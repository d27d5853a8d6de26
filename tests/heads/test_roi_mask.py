"""RoIMask: the teacher's masks of the student's proposals, pixel by pixel."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd.conformance.case import MASK_PAIRS, find_case
from d2kd.conformance.detectors import write_teacher
from d2kd.heads import RoIMaskHead
from d2kd.views import CommonClassesView, MergeClasses, Regions, find_view
from tests.helpers.toys import batch, detector_config, distill_config


def view(logits: Tensor, classes: Sequence[Sequence[int]] = (), num_classes: int = 3) -> Any:
    """A student with these classes of its proposals, image by image; without any, a teacher."""
    proposals = [
        Instances(
            (64, 64),
            proposal_boxes=Boxes(torch.zeros(len(x), 4)),
            gt_classes=torch.tensor(x, dtype=torch.int64),
        )
        for x in classes
    ]
    return SimpleNamespace(
        mask_logits=lambda boxes=None: logits,
        mask_proposals=proposals,
        mask_regions=Regions([x.proposal_boxes for x in proposals]),
        num_classes=num_classes,
    )


def reference(ours: Tensor, theirs: Tensor, classes: List[int], num_classes: int = 3) -> float:
    """Pixel by pixel, in Python's floats."""
    total = 0.0
    for r, k in enumerate(classes):
        if k >= num_classes:
            continue
        a = ours[r, k if ours.shape[1] > 1 else 0].flatten().double().tolist()
        b = theirs[r, k if theirs.shape[1] > 1 else 0].flatten().double().tolist()
        for x, t in zip(a, b):
            p, q = 1 / (1 + math.exp(-t)), 1 / (1 + math.exp(-x))
            total += (p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))) / len(a)
    return total / max(len(classes), 1)


def loss(student: Any, teacher: Any) -> Tensor:
    return RoIMaskHead()(student, teacher)["loss_roimask"]


@pytest.mark.parametrize("ours, theirs", [(3, 3), (1, 3), (3, 1), (1, 1)])
def test_as_written_in_the_docstring(ours: int, theirs: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(5, k, 4, 4, generator=generator) * 3 for k in (ours, theirs))
    classes = [[2, 0], [], [1, 1, 2]]
    found = loss(view(a, classes), view(b))
    assert found.item() == pytest.approx(reference(a, b, [2, 0, 1, 1, 2]), rel=1e-5)


def test_gradient_is_the_difference_of_the_probabilities() -> None:
    a = torch.randn(2, 3, 4, 4, requires_grad=True)
    b = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss(view(a, [[1], [2]]), view(b)).backward()
    expected = torch.zeros_like(a)
    for r, k in enumerate((1, 2)):
        expected[r, k] = (a[r, k].sigmoid() - b[r, k].sigmoid()) / 16 / 2
    torch.testing.assert_close(a.grad, expected.detach())
    assert b.grad is None


def test_equal_masks_have_no_loss_and_unknown_classes_count_as_0() -> None:
    a = torch.randn(2, 3, 4, 4)
    assert loss(view(a, [[1, 2]]), view(a.clone())).abs() < 1e-6
    b = torch.randn(2, 3, 4, 4)
    found = loss(view(a, [[1, 3]]), view(b))  # 3: none of the common classes
    assert found.item() == pytest.approx(reference(a, b, [1, 3]), rel=1e-5)


def test_teacher_of_another_resolution_is_interpolated() -> None:
    # A mask that is a half plane: at twice the resolution the same one, but for the border.
    fine, coarse = torch.full((1, 1, 8, 8), -20.0), torch.full((1, 1, 4, 4), -20.0)
    fine[..., 4:], coarse[..., 2:] = 20.0, 20.0
    assert loss(view(coarse, [[0]], 1), view(fine)) < 1e-3
    assert loss(view(coarse.transpose(2, 3), [[0]], 1), view(fine)) > 5
    # The centre of a cell of half the resolution is where four of the others meet.
    a, b = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 8, 8)
    expected = reference(a, F.avg_pool2d(b, 2), [1, 2])
    assert loss(view(a, [[1, 2]]), view(b)).item() == pytest.approx(expected, rel=1e-5)


def test_no_object_gives_a_zero_that_reaches_the_student() -> None:
    a = torch.zeros(0, 3, 4, 4, requires_grad=True)
    found = loss(view(a, [[], []]), view(torch.zeros(0, 3, 8, 8)))
    found.backward()
    assert found == 0 and a.grad is not None


@pytest.mark.parametrize("scale", [1e3, 1e30])
def test_certain_masks_leave_it_finite(scale: float) -> None:
    a = (torch.randn(2, 3, 4, 4) * scale).requires_grad_()
    found = loss(view(a, [[1, 2]]), view(torch.randn(2, 3, 4, 4) * scale))
    found.backward()
    assert found.isfinite() and a.grad.isfinite().all()


# Between real detectors ---------------------------------------------------------------------------


def steps() -> Any:
    case = find_case("RoIMask", MASK_PAIRS[0])
    return case, case.fresh()


def test_student_s_masks_are_those_of_its_own_pass_and_teacher_s_of_its_proposals() -> None:
    case, distiller = steps()
    calls: List[str] = []
    for name, detector in (("ours", distiller.student), ("theirs", distiller.teacher.model)):
        predictor = detector.roi_heads.mask_head.predictor
        predictor.register_forward_hook(lambda *_, name=name: calls.append(name))
    losses = case.losses(distiller)
    assert sorted(calls) == ["ours", "theirs"] and losses["loss_roimask"] > 0
    student, teacher = distiller.last_step.student, distiller.last_step.teacher
    proposals = student.mask_proposals
    assert all((x.gt_classes < student.num_classes).all() for x in proposals)
    count = sum(len(x) for x in proposals)
    boxes = [x.proposal_boxes for x in proposals]
    assert count > 2
    assert student.mask_logits().shape == teacher.mask_logits(boxes).shape == (count, 3, 28, 28)
    # Asked as a teacher for these boxes, the student says the same.
    again = find_view(distiller.student, "teacher")(distiller.student, student.batched_inputs)
    distiller.student.eval()
    with torch.no_grad():
        assert again.mask_logits(boxes).shape == student.mask_logits().shape
    assert "layers" not in vars(distiller.student.roi_heads.mask_head), "a stock detector again"


@pytest.mark.parametrize("agnostic", [False, True])
def test_common_classes_have_the_masks_of_their_classes(agnostic: bool) -> None:
    model = build_model(
        detector_config("mask_rcnn", MODEL__ROI_MASK_HEAD__CLS_AGNOSTIC_MASK=agnostic)
    ).eval()
    plain = find_view(model, "teacher")(model, batch())
    boxes = [Boxes(torch.tensor([[4.0, 4.0, 40.0, 50.0]]))] * 2
    merge = MergeClasses([[2], [0, 1]], num_classes=3)
    with torch.no_grad():
        logits = plain.mask_logits(boxes)
        common = CommonClassesView(plain, merge, merge).mask_logits(boxes)
    if agnostic:
        assert torch.equal(common, logits) and logits.shape[1] == 1
        return
    expected = torch.stack([logits[:, 2], logits[:, :2].amax(dim=1)], dim=1)
    assert torch.equal(common, expected)


@pytest.mark.parametrize("without", ["student", "teacher"])
def test_detector_without_masks_is_refused(without: str, tmp_path: Path) -> None:
    names = {"student": "mask_rcnn", "teacher": "mask_rcnn", without: "faster_rcnn"}
    opts = write_teacher(tmp_path, names["teacher"])
    cfg = distill_config(names["student"], opts, ["RoIMask"])
    with pytest.raises(ValueError, match=f"RoIMask needs mask_logits; the {without} General"):
        build_model(cfg)


def test_cascade_teaches_its_masks(tmp_path: Path) -> None:
    masks = {
        "MODEL__MASK_ON": True,
        "MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead",
        "MODEL__ROI_MASK_HEAD__NUM_CONV": 1,
        "MODEL__ROI_MASK_HEAD__CONV_DIM": 16,
        "MODEL__ROI_MASK_HEAD__POOLER_RESOLUTION": 7,
    }
    opts = write_teacher(tmp_path, "cascade_rcnn", **masks)
    distiller = build_model(distill_config("mask_rcnn", opts, ["RoIMask"])).train()
    with EventStorage():
        losses = distiller(batch())
    assert losses["loss_roimask"] > 0
    losses["loss_roimask"].backward()
    assert distiller.student.roi_heads.mask_head.predictor.weight.grad.any()
