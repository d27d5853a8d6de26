"""RoIClsHead beside its equation in loops, at its limits, and between real detectors."""

import math
from typing import Any, Callable, Dict, List, Optional, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.structures import Boxes

from d2kd import load_config
from d2kd.heads import RoIClsHead, build_head
from d2kd.views import Regions, RegionSampler
from d2kd.views.predictions import RoIPredictions
from tests.helpers.distillers import DENSE, TWO_STAGE, build_distiller, losses_of, pair_of
from tests.helpers.logit_references import refusal_of
from tests.helpers.toys import FeatureView, batch, noise


class PredictionView(FeatureView):
    """
    A view with logits and deltas of regions, and no detector behind it.

    A student is asked for those of its own pass, a teacher for those of the student's boxes.
    """

    def __init__(self, logits: Tensor, regions: Regions, is_student: bool):
        super().__init__({})
        self.logits, self._regions, self.is_student = logits, regions, is_student

    def regions(self, sampler: Optional[RegionSampler] = None) -> Regions:
        assert self.is_student
        return self._regions

    def roi_predictions(self, boxes: Optional[List[Boxes]] = None) -> RoIPredictions:
        assert boxes is (None if self.is_student else self._regions.boxes)
        return RoIPredictions(self.logits, self.logits, self.logits)


def views(student: Tensor, teacher: Tensor) -> Tuple[PredictionView, PredictionView]:
    """Of logits (R, K+1); half of the regions are in each of two images."""
    boxes = torch.zeros(len(student), 4)
    half = len(student) // 2
    regions = Regions([Boxes(boxes[:half]), Boxes(boxes[half:])])
    return PredictionView(student, regions, True), PredictionView(teacher, regions, False)


def loss_of(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    losses = RoIClsHead(temperature=temperature)(*views(student, teacher))
    assert list(losses) == ["loss_roicls"] and losses["loss_roicls"].shape == ()
    return losses["loss_roicls"]


def softmax(values: List[float]) -> List[float]:
    powers = [math.exp(v) for v in values]
    return [p / sum(powers) for p in powers]


def cls_in_loops(student: Tensor, teacher: Tensor, temperature: float) -> float:
    """temperature^2 mean_r sum_c p_c log(p_c / q_c), p and q of logits / temperature."""
    total = 0.0
    for s, t in zip(student.tolist(), teacher.tolist()):
        q, p = (softmax([z / temperature for z in x]) for x in (s, t))
        for ours, theirs in zip(q, p):
            total += theirs * math.log(theirs / ours)
    return temperature**2 * total / len(student)


# The equation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_and_gradient_are_those_of_the_equation(temperature: float) -> None:
    # d/dz of temperature^2 KL is temperature (q - p), here divided by 5 regions.
    student, teacher = noise(5, 4, seed=1) * 3, noise(5, 4, seed=2) * 3
    student.requires_grad_()
    loss = loss_of(student, teacher, temperature)
    expected = cls_in_loops(student, teacher, temperature)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and expected > 0.1
    loss.backward()
    q, p = ((x.detach() / temperature).softmax(dim=1) for x in (student, teacher))
    torch.testing.assert_close(student.grad, temperature * (q - p) / 5, rtol=1e-4, atol=1e-6)


def test_divergence_is_the_teacher_s_from_the_student_s() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): log(4/3) / 2 this way, (3 log 3 - 4 log 2) / 4 the other.
    student, teacher = torch.tensor([[0.0, math.log(3)]]), torch.zeros(1, 2)
    there, back = math.log(4 / 3) / 2, (3 * math.log(3) - 4 * math.log(2)) / 4
    assert back < 0.95 * there
    assert loss_of(student, teacher).item() == pytest.approx(there, rel=1e-5)
    assert loss_of(teacher, student).item() == pytest.approx(back, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_logits_give_exactly_zero_and_a_constant_does_not_matter(temperature: float) -> None:
    student = noise(6, 4).float().requires_grad_()
    loss = loss_of(student, student.detach().clone(), temperature)
    loss.backward()
    assert loss.item() == 0.0
    torch.testing.assert_close(student.grad, torch.zeros(6, 4), rtol=0.0, atol=1e-6)
    assert loss_of(student, student.detach() + 5, temperature).item() == pytest.approx(0, abs=1e-5)


def test_background_counts_like_any_class() -> None:
    # The logits of one region with the last class exchanged for the first.
    student, teacher = noise(1, 4, seed=1).float(), noise(1, 4, seed=2).float()
    expected = loss_of(student, teacher)
    order = torch.tensor([3, 1, 2, 0])
    torch.testing.assert_close(loss_of(student[:, order], teacher[:, order]), expected)


# The temperature ---------------------------------------------------------------------------------


def gradient_size(temperature: float) -> float:
    student, teacher = noise(8, 5, seed=1).requires_grad_(), noise(8, 5, seed=2)
    loss_of(student, teacher, temperature).backward()
    return student.grad.norm().item()


def test_size_of_the_gradient_hardly_depends_on_the_temperature() -> None:
    # Without temperature^2 the last would be 64 times smaller than with it.
    sizes = [gradient_size(t) for t in (1.0, 2.0, 4.0, 8.0)]
    assert max(sizes) < 2 * min(sizes)
    assert sizes[-1] / 64 < 0.1 * min(sizes), "the mistake itself"


def test_at_high_temperature_the_logits_themselves_are_compared() -> None:
    # softmax(z / tau) ~ (1 + (z - mean z) / tau) / C, so the gradient tends to
    # ((z_S - mean z_S) - (z_T - mean z_T)) / C / R.
    student, teacher = noise(3, 5, seed=1), noise(3, 5, seed=2)
    student.requires_grad_()
    loss_of(student, teacher, 200.0).backward()
    difference = (student - teacher).detach()
    expected = (difference - difference.mean(dim=1, keepdim=True)) / 5 / 3
    torch.testing.assert_close(student.grad, expected, rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_that_is_not_positive_is_refused_by_its_key(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"DISTILL\.RoICls\.TEMPERATURE .* got {temperature}"):
        head_for(TWO_STAGE, TWO_STAGE, "DISTILL.RoICls.TEMPERATURE", temperature)


def test_temperature_reaches_the_head() -> None:
    assert head_for(TWO_STAGE, TWO_STAGE, "DISTILL.RoICls.TEMPERATURE", 2.5).temperature == 2.5
    assert head_for(TWO_STAGE, TWO_STAGE).temperature == 1.0


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("z", [120.0, -120.0])
@pytest.mark.parametrize("target", [120.0, -120.0])
def test_extreme_logits_are_finite(z: float, target: float) -> None:
    # Both are sure. Where they differ, KL = 240 and the gradient q - p is 1 and -1; exp(120) alone
    # is beyond float32.
    student = torch.tensor([[z, -z]], requires_grad=True)
    loss = loss_of(student, torch.tensor([[target, -target]]))
    loss.backward()
    sign = (z > target) - (z < target)
    assert loss.item() == pytest.approx(240.0 * abs(sign))
    assert student.grad.tolist() == [[float(sign), -float(sign)]]


def test_half_precision_logits_are_compared_in_float32() -> None:
    # R sums of thousandths are more than half precision can add up.
    student, teacher = (noise(64, 81, seed=s).bfloat16() for s in (1, 2))
    loss = loss_of(student, teacher)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(cls_in_loops(student, teacher, 1.0), rel=1e-4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(loss_of(student, teacher), loss)


def test_gradient_reaches_the_student_alone() -> None:
    student, teacher = (noise(4, 3, seed=s).requires_grad_() for s in (1, 2))
    loss_of(student, teacher).backward()
    assert teacher.grad is None and (student.grad.abs().sum(dim=1) > 0).all()


def test_batch_without_regions_gives_a_connected_zero() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    loss = loss_of(student, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0.0 and student.grad.shape == (0, 4)


# Which pairs -------------------------------------------------------------------------------------


def head_for(student: Dict[str, Any], teacher: Dict[str, Any], *opts: Any) -> nn.Module:
    return build_head("RoICls", load_config(opts=list(opts)), pair_of(student, teacher))


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_detector_without_a_head_on_regions_is_refused(side: str) -> None:
    sides = (DENSE, TWO_STAGE) if side == "student" else (TWO_STAGE, DENSE)
    text = refusal_of("RoICls", load_config(), pair_of(*sides))
    kind = "two-stage -> dense" if side == "student" else "dense -> two-stage"
    assert f"RoICls takes two-stage -> two-stage; this is {kind} (" in text


def test_two_stage_detector_without_a_box_head_is_refused_by_what_it_lacks() -> None:
    c4 = {**TWO_STAGE, "provides": frozenset({"features", "dense"})}
    text = refusal_of("RoICls", load_config(), pair_of(TWO_STAGE, c4))
    assert "RoICls needs regions, roi_predictions; the teacher GeneralizedRCNN has none" in text


def test_different_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="RoICls .* student has 3 classes and the teacher 80"):
        head_for(TWO_STAGE, {**TWO_STAGE, "num_classes": 80})


# Between real detectors --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("faster_rcnn", "faster_rcnn"),
        ("faster_rcnn", "cascade_rcnn"),
        ("cascade_rcnn", "faster_rcnn"),
    ],
)
def test_step_trains_any_two_stage_pair_with_the_loss_of_the_equation(
    student: str, teacher: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build_distiller(
        student, teacher_of(teacher), ["RoICls"], DISTILL__RoICls__TEMPERATURE=2.0
    )
    loss = losses_of(distiller, batch())["loss_roicls"]
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    logits = ours.roi_predictions().logits, theirs.roi_predictions(ours.regions().boxes).logits
    assert logits[0].shape == logits[1].shape == (len(ours.regions()), 4)
    # Between new detectors it is a small difference of logarithms, each rounded to 1e-7.
    expected = cls_in_loops(*logits, 2.0)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=2e-7) and expected > 1e-4
    loss.backward()
    predictor = distiller.student.roi_heads.box_predictor
    first = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    assert first.cls_score.weight.grad.abs().sum() > 0 and first.bbox_pred.weight.grad is None
    assert distiller.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


def test_all_heads_on_regions_share_one_pass_of_each_box_head(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    heads = ["SGFI", "CKD", "RoICls", "RoILoc"]
    distiller = build_distiller("faster_rcnn", teacher_of("faster_rcnn"), heads)
    calls: List[str] = []
    for side, detector in (("student", distiller.student), ("teacher", distiller.teacher.model)):
        for part in ("box_pooler", "box_head", "box_predictor"):
            getattr(detector.roi_heads, part).register_forward_hook(
                lambda *_, name=f"{side}'s {part}": calls.append(name)
            )
    losses = losses_of(distiller, batch())
    assert {f"loss_{x.lower()}" for x in heads} <= set(losses)
    parts = ("box_head", "box_pooler", "box_predictor")
    assert sorted(calls) == [f"{side}'s {x}" for side in ("student", "teacher") for x in parts]
    sum(losses.values()).backward()
    assert len(calls) == 6, "nor in the backward"
    trained = [*distiller.student.parameters(), *distiller.heads.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)


def test_images_without_objects_train_too(teacher_of: Callable[[str], List[Any]]) -> None:
    distiller = build_distiller("faster_rcnn", teacher_of("faster_rcnn"), ["RoICls", "RoILoc"])
    losses = losses_of(distiller, batch(boxes=0))
    sum(losses.values()).backward()
    assert losses["loss_roicls"] > 0 and losses["loss_roiloc"].isfinite()
