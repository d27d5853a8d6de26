"""DKDHead beside its equations in loops, at its limits, and between real detectors."""

import itertools
import math
from typing import Any, Callable, List, Sequence, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.modeling import build_model
from detectron2.structures import pairwise_iou

from d2kd.heads import DKDHead, build_head
from d2kd.lesson import describe_pair
from tests.helpers.distillers import build_distiller, losses_of
from tests.helpers.logit_references import dkd, refusal_of, region_views
from tests.helpers.toys import batch, distill_config, noise

CLASSES = 3
LABELS = [0, 1, 2, CLASSES, CLASSES]  # two of them background


def terms_of(
    student: Tensor, teacher: Tensor, labels: Sequence[int], **values: float
) -> Tuple[Tensor, Tensor]:
    losses = DKDHead(**values)(*region_views(student, teacher, labels))
    assert list(losses) == ["loss_dkd_target", "loss_dkd_non_target"]
    assert all(x.shape == () and x.dtype == torch.float32 for x in losses.values())
    return tuple(losses.values())


def expected_of(
    student: Tensor, teacher: Tensor, labels: Sequence[int], temperature: float = 1.0
) -> Tuple[float, float]:
    """With the published weights, 1 and 1/4."""
    target, others = dkd(student.double(), teacher.double(), labels, temperature)
    return target, others / 4


# The equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_both_terms_are_those_of_the_equations(temperature: float) -> None:
    student, teacher = noise(5, 4, seed=1) * 3, noise(5, 4, seed=2) * 3
    found = terms_of(student, teacher, LABELS, temperature=temperature)
    expected = expected_of(student, teacher, LABELS, temperature)
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-5) and min(expected) > 0.01


def test_target_term_is_the_divergence_of_the_true_class_from_all_others() -> None:
    # Teacher (1/2, 1/4, 1/4), student (1/4, 3/8, 3/8), class 0: log(2) / 2 + log(2/3) / 2, which is
    # log(4/3) / 2 = 0.1438; the other way log(1/2) / 4 + 3 log(3/2) / 4 = 0.1308. The rest is
    # shared out alike.
    student = torch.tensor([[1 / 4, 3 / 8, 3 / 8]]).log()
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log()
    target, others = terms_of(student, teacher, [0])
    assert target.item() == pytest.approx(math.log(4 / 3) / 2, rel=1e-5)
    assert others.item() == pytest.approx(0, abs=1e-6)


def test_non_target_term_is_the_divergence_among_the_others() -> None:
    # p_0 = 1/2 in both. Among the others: teacher (1/2, 1/2), student (1/4, 3/4).
    student = torch.tensor([[1 / 2, 1 / 8, 3 / 8]]).log()
    teacher = torch.tensor([[1 / 2, 1 / 4, 1 / 4]]).log()
    target, others = terms_of(student, teacher, [0])
    assert target.item() == pytest.approx(0, abs=1e-6)
    assert others.item() == pytest.approx(0.25 * math.log(4 / 3) / 2, rel=1e-5)


def test_parts_add_up_to_the_divergence_of_all_classes() -> None:
    # KL(p || q) = TCKD + (1 - p_y) NCKD, of one region, the paper's equation 6.
    student, teacher = noise(1, 4, seed=1) * 2, noise(1, 4, seed=2) * 2
    for label in range(4):
        target, others = terms_of(student, teacher, [label], non_target_weight=1.0)
        p, q = teacher.softmax(dim=1), student.softmax(dim=1)
        whole = (p * (p / q).log()).sum().item()
        rest = 1 - p[0, label].item()
        assert (target + rest * others).item() == pytest.approx(whole, rel=1e-4)


def test_background_is_a_class_like_any_other() -> None:
    student, teacher = noise(1, 4, seed=1), noise(1, 4, seed=2)
    order = [3, 1, 2, 0]
    moved = terms_of(student[:, order], teacher[:, order], [0])
    torch.testing.assert_close(terms_of(student, teacher, [CLASSES]), moved)


@pytest.mark.parametrize("label", [0, 1])
def test_with_one_class_and_background_there_is_nothing_to_share_out(label: int) -> None:
    student, teacher = noise(1, 2, seed=1), noise(1, 2, seed=2)
    target, others = terms_of(student, teacher, [label])
    assert target.item() == pytest.approx(expected_of(student, teacher, [label])[0], rel=1e-5)
    assert others.item() == 0


def test_weights_multiply_their_own_terms() -> None:
    student, teacher = noise(5, 4, seed=1), noise(5, 4, seed=2)
    once = terms_of(student, teacher, LABELS, target_weight=1.0, non_target_weight=1.0)
    more = terms_of(student, teacher, LABELS, target_weight=3.0, non_target_weight=0.5)
    torch.testing.assert_close(more, (3 * once[0], once[1] / 2))


@pytest.mark.parametrize("label", range(4))
def test_gradient_is_that_of_float64(label: int) -> None:
    student, teacher = noise(1, 4, seed=1) * 2, noise(1, 4, seed=2) * 2
    x = student.clone().requires_grad_()
    sum(terms_of(x, teacher, [label], temperature=2.0)).backward()
    step = 1e-6
    for c in range(4):
        up, down = student.clone(), student.clone()
        up[0, c] += step
        down[0, c] -= step
        both = [sum(expected_of(z, teacher, [label], 2.0)) for z in (up, down)]
        slope = (both[0] - both[1]) / (2 * step)
        assert x.grad[0, c].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


# Limits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_equal_logits_give_exactly_zero_and_no_gradient(temperature: float) -> None:
    student = noise(5, 4).float().requires_grad_()
    terms = terms_of(student, student.detach().clone(), LABELS, temperature=temperature)
    sum(terms).backward()
    assert [x.item() for x in terms] == [0.0, 0.0]
    torch.testing.assert_close(student.grad, torch.zeros(5, 4), rtol=0, atol=1e-6)
    apart = terms_of(student.detach() + 5, student.detach(), LABELS)
    assert [x.item() for x in apart] == pytest.approx([0.0, 0.0], abs=1e-5)


@pytest.mark.parametrize("ours, theirs", itertools.product([-120.0, 120.0], repeat=2))
@pytest.mark.parametrize("where", itertools.product([0, 2], repeat=2))
def test_sure_logits_of_either_give_a_finite_loss_and_gradient(
    ours: float, theirs: float, where: Tuple[int, int]
) -> None:
    # Class 0 is the true one, of the student's and of the teacher's sure logit, or not.
    student, teacher = noise(1, 4, seed=1).float(), noise(1, 4, seed=2).float()
    student[0, where[0]], teacher[0, where[1]] = ours, theirs
    x = student.clone().requires_grad_()
    terms = terms_of(x, teacher, [0])
    expected = expected_of(student, teacher, [0])
    assert [t.item() for t in terms] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    sum(terms).backward()
    assert x.grad.isfinite().all()


def test_half_precision_does_not_overflow() -> None:
    # 60000 is near the largest number of float16; the sum of two is none.
    for dtype in (torch.float16, torch.bfloat16):
        student = torch.tensor([[60000.0, -60000.0, 1.0]], dtype=dtype, requires_grad=True)
        terms = terms_of(student, -student.detach(), [0])
        sum(terms).backward()
        assert all(t.isfinite() for t in terms) and student.grad.isfinite().all()


def test_batch_without_regions_gives_a_connected_zero() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    terms = terms_of(student, torch.zeros(0, 4), [])
    sum(terms).backward()
    assert [t.item() for t in terms] == [0.0, 0.0] and student.grad.shape == (0, 4)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = (noise(5, 4, seed=s).requires_grad_() for s in (1, 2))
    sum(terms_of(student, teacher, LABELS)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0


# Between real detectors --------------------------------------------------------------------------


def true_classes(view: Any) -> List[int]:
    """The class of the object that a region overlaps by at least half; else background."""
    labels = []
    for boxes, objects in zip(view.regions().boxes, view.gt_instances):
        for row in pairwise_iou(boxes, objects.gt_boxes):
            best = int(row.argmax())
            labels.append(int(objects.gt_classes[best]) if row[best] >= 0.5 else CLASSES)
    return labels


@pytest.mark.parametrize(
    "student, teacher",
    [
        ("faster_rcnn", "faster_rcnn"),
        ("faster_rcnn", "cascade_rcnn"),
        ("cascade_rcnn", "faster_rcnn"),
    ],
)
def test_step_trains_any_two_stage_pair_with_the_losses_of_the_equations(
    student: str, teacher: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build_distiller(
        student, teacher_of(teacher), ["DKD"], DISTILL__DKD__TEMPERATURE=2.0
    )
    losses = losses_of(distiller, batch())
    own = [losses[f"loss_dkd_{x}"] for x in ("target", "non_target")]
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    logits = ours.roi_predictions().logits, theirs.roi_predictions(ours.regions().boxes).logits
    labels = true_classes(ours)
    assert len(set(labels)) > 1 and CLASSES in labels
    expected = expected_of(*logits, labels, 2.0)
    assert [x.item() for x in own] == pytest.approx(expected, rel=1e-3) and min(expected) > 0
    sum(own).backward()
    predictor = distiller.student.roi_heads.box_predictor
    first = predictor[0] if isinstance(predictor, nn.ModuleList) else predictor
    assert first.cls_score.weight.grad.abs().sum() > 0 and first.bbox_pred.weight.grad is None
    assert distiller.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


def test_heads_on_probabilities_share_one_pass_of_each_box_head(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    heads = ["DKD", "DIST", "RoICls"]
    distiller = build_distiller("faster_rcnn", teacher_of("faster_rcnn"), heads)
    calls: List[str] = []
    for side, detector in (("student", distiller.student), ("teacher", distiller.teacher.model)):
        for part in ("box_pooler", "box_head", "box_predictor"):
            getattr(detector.roi_heads, part).register_forward_hook(
                lambda *_, name=f"{side}'s {part}": calls.append(name)
            )
    losses = losses_of(distiller, batch())
    assert {"loss_dkd_target", "loss_dist_inter", "loss_roicls"} <= set(losses)
    sum(losses.values()).backward()
    parts = ("box_head", "box_pooler", "box_predictor")
    assert sorted(calls) == [f"{side}'s {x}" for side in ("student", "teacher") for x in parts]


def test_images_without_objects_train_with_background_alone(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build_distiller("faster_rcnn", teacher_of("faster_rcnn"), ["DKD"])
    losses = losses_of(distiller, batch(boxes=0))
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    logits = ours.roi_predictions().logits, theirs.roi_predictions(ours.regions().boxes).logits
    expected = expected_of(*logits, [CLASSES] * len(logits[0]))
    own = [losses[f"loss_dkd_{x}"] for x in ("target", "non_target")]
    assert [x.item() for x in own] == pytest.approx(expected, rel=1e-3)


# Config ------------------------------------------------------------------------------------------


def test_defaults_are_the_published_ones(teacher_of: Callable[[str], List[Any]]) -> None:
    distiller = build_distiller("faster_rcnn", teacher_of("faster_rcnn"), ["DKD"])
    head = distiller.heads["DKD"]
    assert (head.target_weight, head.non_target_weight, head.temperature) == (1.0, 0.25, 1.0)
    assert not list(head.parameters())
    cfg = distill_config("faster_rcnn", teacher_of("faster_rcnn"), ["DKD"])
    assert cfg.DISTILL.DKD.LOSS_WEIGHT == 1.0
    cfg.merge_from_list(["DISTILL.DKD.TARGET_WEIGHT", 2.0, "DISTILL.DKD.NON_TARGET_WEIGHT", 3.0])
    cfg.merge_from_list(["DISTILL.DKD.TEMPERATURE", 4.0])
    pair = describe_pair(cfg, distiller.student, distiller.teacher.model)
    head = build_head("DKD", cfg, pair)
    assert (head.target_weight, head.non_target_weight, head.temperature) == (2.0, 3.0, 4.0)
    for value in (0.0, -1.0, math.nan):
        cfg.DISTILL.DKD.TEMPERATURE = value
        with pytest.raises(ValueError, match=rf"DISTILL\.DKD\.TEMPERATURE .* got {value}"):
            build_head("DKD", cfg, pair)


def test_unequal_classes_are_refused_with_the_heads_that_fit(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build_distiller("faster_rcnn", teacher_of("faster_rcnn"), ["DKD"])
    cfg = distill_config("faster_rcnn", teacher_of("faster_rcnn"), ["DKD"])
    other = build_model(
        distill_config("faster_rcnn", [], MODEL__ROI_HEADS__NUM_CLASSES=5, DISTILL__ENABLED=False)
    ).student
    pair = describe_pair(cfg, distiller.student, other)
    text = refusal_of("DKD", cfg, pair)
    assert "DKD compares class logits, but the student has 3 classes and the teacher 5" in text
