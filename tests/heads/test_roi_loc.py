"""RoILocHead beside its equation in loops, at its limits, and between real detectors."""

import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.heads import RoILocHead, build_head
from d2kd.views import Regions, RegionSampler
from d2kd.views.predictions import RoIPredictions
from tests.helpers.distillers import DENSE, TWO_STAGE, build_distiller, pair_of
from tests.helpers.logit_references import refusal_of
from tests.helpers.toys import FeatureView, batch, noise

REGIONS, CLASSES = 5, 3


class PredictionView(FeatureView):
    """
    A view with logits and deltas of regions, and no detector behind it.

    A student is asked for those of its own pass, a teacher for those of the student's boxes.
    """

    def __init__(self, logits: Tensor, deltas: Tensor, regions: Regions, is_student: bool):
        super().__init__({})
        self.predictions = RoIPredictions(logits, logits, deltas)
        self._regions, self.is_student = regions, is_student

    def regions(self, sampler: Optional[RegionSampler] = None) -> Regions:
        assert self.is_student
        return self._regions

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        assert boxes is (None if self.is_student else self._regions.boxes)
        return self.predictions


def loss_of(
    student: Tensor, teacher: Tensor, logits: Tensor, own_logits: Optional[Tensor] = None
) -> Tensor:
    """
    Args:
        student, teacher: deltas (R, 4*K) or (R, 4)
        logits: the teacher's, (R, K+1)
        own_logits: the student's; None: random ones
    """
    own_logits = noise(*logits.shape, seed=99) if own_logits is None else own_logits
    boxes, half = torch.zeros(len(student), 4), len(student) // 2
    regions = Regions([Boxes(boxes[:half]), Boxes(boxes[half:])])
    losses = RoILocHead()(
        PredictionView(own_logits, student, regions, True),
        PredictionView(logits, teacher, regions, False),
    )
    assert list(losses) == ["loss_roiloc"] and losses["loss_roiloc"].shape == ()
    return losses["loss_roiloc"]


def softmax(values: List[float]) -> List[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def loc_in_loops(
    student: Tensor, teacher: Tensor, logits: Tensor, abs_inside: bool = False
) -> float:
    """
    mean_r sum_d |sum_c p_c (t_cd - s_cd)| over foreground classes c and coordinates d

    Args:
        abs_inside: True: a known mistake, sum_c p_c |t_cd - s_cd|
    """
    total = 0.0
    for s, t, answers in zip(student.tolist(), teacher.tolist(), logits.tolist()):
        confidence = softmax(answers)[:-1]
        for d in range(4):
            terms = []
            for c, p in enumerate(confidence):
                ours = s[d] if len(s) == 4 else s[4 * c + d]
                theirs = t[d] if len(t) == 4 else t[4 * c + d]
                terms.append(p * (theirs - ours))
            total += sum(map(abs, terms)) if abs_inside else abs(sum(terms))
    return total / len(student)


def some_deltas(seed: int, classes: int = CLASSES) -> Tensor:
    return noise(REGIONS, 4 * classes, seed=seed)


def some_logits(seed: int = 5) -> Tensor:
    return noise(REGIONS, CLASSES + 1, seed=seed) * 2


# The equation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("theirs", [CLASSES, 1], ids=["specific", "agnostic"])
@pytest.mark.parametrize("ours", [CLASSES, 1], ids=["specific", "agnostic"])
def test_loss_is_that_of_the_equation(ours: int, theirs: int) -> None:
    student, teacher, logits = some_deltas(1, ours), some_deltas(2, theirs), some_logits()
    loss, expected = loss_of(student, teacher, logits), loc_in_loops(student, teacher, logits)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0.1
    # Class-agnostic deltas are those of every class.
    repeated = [x.repeat(1, CLASSES) if x.shape[1] == 4 else x for x in (student, teacher)]
    torch.testing.assert_close(loss_of(*repeated, logits), loss)


def test_gradient_is_the_sign_times_the_teacher_s_confidence() -> None:
    # d/ds_cd = -p_c sign(sum_c p_c (t_cd - s_cd)) / R
    student, teacher, logits = some_deltas(1).requires_grad_(), some_deltas(2), some_logits()
    loss_of(student, teacher, logits).backward()
    p = logits.softmax(dim=1)[:, :-1, None]
    difference = (teacher - student.detach()).view(REGIONS, CLASSES, 4)
    expected = -p * (p * difference).sum(dim=1, keepdim=True).sign() / REGIONS
    torch.testing.assert_close(student.grad, expected.flatten(1), rtol=1e-5, atol=1e-7)


def test_equal_deltas_give_exactly_zero() -> None:
    student = some_deltas(1).requires_grad_()
    loss = loss_of(student, student.detach().clone(), some_logits())
    loss.backward()
    assert loss.item() == 0.0 and (student.grad == 0).all()


def test_errors_of_classes_may_cancel() -> None:
    # Two classes of confidence 1/2 each, off by +1 and -1: the expected box is right. With the
    # absolute value inside the sum: 1/2 + 1/2 for each of 4 coordinates.
    logits = torch.tensor([[0.0, 0.0, -1000.0]])
    student, teacher = torch.zeros(1, 8), torch.tensor([[1.0] * 4 + [-1.0] * 4])
    assert loc_in_loops(student, teacher, logits.clamp(min=-700), abs_inside=True) == 4.0
    assert loss_of(student, teacher, logits).item() == 0.0
    assert loss_of(student, teacher.abs(), logits).item() == pytest.approx(4.0)


def test_deltas_are_four_numbers_of_a_class_after_those_of_another() -> None:
    # The teacher is sure of the second class, whose four numbers are off by 1, 2, 3 and 4.
    logits = torch.tensor([[0.0, 50.0, 0.0, 0.0]])
    teacher = torch.tensor([[9.0] * 4 + [1.0, 2.0, 3.0, 4.0] + [9.0] * 4])
    assert loss_of(torch.zeros(1, 12), teacher, logits).item() == pytest.approx(10.0)


def test_regions_that_the_teacher_takes_for_background_hardly_count() -> None:
    student, teacher = some_deltas(1).requires_grad_(), some_deltas(2)
    logits = some_logits()
    logits[:, -1] = 120.0
    loss = loss_of(student, teacher, logits)
    loss.backward()
    assert loss.item() == 0.0 and (student.grad == 0).all()
    # One region of foreground among them: its own error, over the number of all regions.
    logits[3] = torch.tensor([-120.0, 120.0, -120.0, -120.0])
    expected = (teacher - student.detach())[3, 4:8].abs().sum().item() / REGIONS
    assert loss_of(student, teacher, logits).item() == pytest.approx(expected, rel=1e-5)
    # Background of probability 9 / 12 leaves a quarter of an error of 1 in each of 4 coordinates.
    logits = torch.tensor([[0.0, 0.0, 0.0, math.log(9.0)]])
    assert loss_of(torch.zeros(1, 4), torch.ones(1, 4), logits).item() == pytest.approx(4 / 4)


def test_confidence_is_the_teacher_s_and_gets_no_gradient() -> None:
    student, teacher, logits, own = (
        x.requires_grad_()
        for x in (some_deltas(1), some_deltas(2), some_logits(), some_logits(seed=6))
    )
    loss = loss_of(student, teacher, logits, own)
    torch.testing.assert_close(loss_of(student, teacher, logits, own.detach() * -3), loss)
    loss.backward()
    assert (student.grad.abs().sum(dim=1) > 0).all()
    assert all(x.grad is None for x in (teacher, logits, own))


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sure", range(CLASSES + 1))
def test_extreme_logits_are_finite(sure: int) -> None:
    logits = torch.full((1, CLASSES + 1), -120.0)
    logits[0, sure] = 120.0
    student = torch.zeros(1, 12, requires_grad=True)
    loss = loss_of(student, torch.arange(12.0)[None], logits)
    loss.backward()
    # The sum of four neighbours from 4 * sure; background has none.
    expected = 16.0 * sure + 6 if sure < CLASSES else 0.0
    assert loss.item() == pytest.approx(expected) and student.grad.isfinite().all()


def test_half_precision_is_compared_in_float32() -> None:
    student, teacher = (some_deltas(seed).bfloat16() for seed in (1, 2))
    logits = some_logits().bfloat16()
    loss = loss_of(student, teacher, logits)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(loc_in_loops(student, teacher, logits), rel=1e-5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss_of(student, teacher, logits), loss)


@pytest.mark.parametrize("theirs", [CLASSES, 1])
@pytest.mark.parametrize("ours", [CLASSES, 1])
def test_batch_without_regions_gives_a_connected_zero(ours: int, theirs: int) -> None:
    student = torch.zeros(0, 4 * ours, requires_grad=True)
    loss = loss_of(student, torch.zeros(0, 4 * theirs), torch.zeros(0, CLASSES + 1))
    loss.backward()
    assert loss.item() == 0.0 and student.grad is not None


# Which pairs -------------------------------------------------------------------------------------


def head_for(student: Dict[str, Any], teacher: Dict[str, Any]) -> nn.Module:
    return build_head("RoILoc", load_config(), pair_of(student, teacher))


def test_head_has_nothing_to_train() -> None:
    assert list(head_for(TWO_STAGE, TWO_STAGE).parameters()) == []


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_detector_without_a_head_on_regions_is_refused(side: str) -> None:
    sides = (DENSE, TWO_STAGE) if side == "student" else (TWO_STAGE, DENSE)
    text = refusal_of("RoILoc", load_config(), pair_of(*sides))
    kind = "two-stage -> dense" if side == "student" else "dense -> two-stage"
    assert f"RoILoc takes two-stage -> two-stage; this is {kind} (" in text


def test_two_stage_detector_without_a_box_head_is_refused_by_what_it_lacks() -> None:
    c4 = {**TWO_STAGE, "provides": frozenset({"features", "dense"})}
    text = refusal_of("RoILoc", load_config(), pair_of(TWO_STAGE, c4))
    assert "RoILoc needs regions, roi_predictions; the teacher GeneralizedRCNN has none" in text


def test_different_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="RoILoc .* student has 3 classes and the teacher 80"):
        head_for(TWO_STAGE, {**TWO_STAGE, "num_classes": 80})


def test_deltas_of_another_scale_are_refused_by_their_key() -> None:
    other = {**TWO_STAGE, "box_weights": (20.0, 20.0, 10.0, 10.0)}
    with pytest.raises(ValueError, match=r"RoILoc .*MODEL\.ROI_BOX_HEAD\.BBOX_REG_WEIGHTS") as info:
        head_for(TWO_STAGE, other)
    assert "(10.0, 10.0, 5.0, 5.0) and (20.0, 20.0, 10.0, 10.0)" in str(info.value)
    assert head_for(other, other), "the same for both"


# Between real detectors --------------------------------------------------------------------------


def build(student: str, opts: List[Any], **values: Any) -> nn.Module:
    return build_distiller(student, opts, ["RoILoc"], **values)


PAIRS: List[Tuple[str, str, Dict[str, Any]]] = [
    ("faster_rcnn", "faster_rcnn", {}),
    ("faster_rcnn", "cascade_rcnn", {}),
    ("cascade_rcnn", "faster_rcnn", {}),
    ("faster_rcnn", "faster_rcnn", {"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}),
]


@pytest.mark.parametrize("student, teacher, values", PAIRS)
def test_step_trains_any_two_stage_pair_with_the_loss_of_the_equation(
    student: str, teacher: str, values: Dict[str, Any], teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(student, teacher_of(teacher), **values)
    torch.manual_seed(1)  # which proposals are sampled
    with EventStorage():
        loss = distiller(batch())["loss_roiloc"]
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    answer = theirs.roi_predictions(ours.regions().boxes)
    expected = loc_in_loops(ours.roi_predictions().deltas, answer.deltas, answer.logits)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and expected > 0
    loss.backward()
    predictor = distiller.student.roi_heads.box_predictor
    first = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    assert first.bbox_pred.weight.grad.abs().sum() > 0 and first.cls_score.weight.grad is None
    assert distiller.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


def test_scale_of_the_deltas_is_that_of_the_detectors(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    weights = (5.0, 5.0, 2.5, 2.5)
    with pytest.raises(ValueError, match=r"BBOX_REG_WEIGHTS \(5.0, 5.0, 2.5, 2.5\) and \(10.0"):
        build(
            "faster_rcnn", teacher_of("cascade_rcnn"), MODEL__ROI_BOX_HEAD__BBOX_REG_WEIGHTS=weights
        )
