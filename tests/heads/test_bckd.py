"""BCKDHead beside its equations, one anchor at a time, at its limits, and between detectors."""

import copy
import math
import pickle
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.modeling import build_model

from d2kd.heads import BCKDHead, build_head
from d2kd.lesson import describe_pair
from tests.helpers.distillers import losses_of
from tests.helpers.logit_references import (
    ANCHORS,
    SIZES,
    CellView,
    bckd_sums,
    cell_view,
    decode_map,
    positives,
    total,
)
from tests.helpers.toys import batch, distill_config, level_pairs, write_teacher

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
DENSE = ["retinanet", pytest.param("fcos", marks=needs_fcos)]


def head_for(view: CellView, **values: float) -> BCKDHead:
    levels = level_pairs(**{k: (4, 4) for k in view.logits})
    return BCKDHead(levels=levels, num_anchors=ANCHORS, **values)


def losses_between(
    student: CellView, teacher: CellView, **values: float
) -> Dict[str, Dict[str, Tensor]]:
    losses = head_for(student, **values)(student, teacher)
    assert list(losses) == ["loss_bckd_cls", "loss_bckd_box"]
    assert all(x.dtype == torch.float32 for v in losses.values() for x in v.values())
    return losses


def expected_of(student: CellView, teacher: CellView, level: str) -> Tuple[float, float]:
    """With the published weight of the boxes, 4."""
    logits, boxes = (
        tuple(maps[level].double() for maps in both)
        for both in ((student.logits, teacher.logits), (student.decoded, teacher.decoded))
    )
    stride = student.strides[level]
    cls, box = bckd_sums(logits, boxes, ANCHORS, student._image_sizes, stride)
    count = max(positives(student), 1)
    return cls / count, 4 * box / count


# The equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], SIZES])
def test_both_terms_are_those_of_the_equations_level_by_level(sizes: List[Any]) -> None:
    student, teacher = cell_view(0, sizes), cell_view(5, sizes)
    losses = losses_between(student, teacher)
    assert positives(student) > 3
    for level in ("p3", "p4"):
        found = losses["loss_bckd_cls"][level].item(), losses["loss_bckd_box"][level].item()
        assert found == pytest.approx(expected_of(student, teacher, level), rel=1e-4)


def test_a_single_anchor_in_closed_form() -> None:
    # p_s = (1/2, 1/2, 1/2), p_t = (1/4, 1/2, 7/8): |p_t - p_s| = (1/4, 0, 3/8); BCE of p_s = 1/2 is
    # log 2 whatever p_t, so cls = 5/8 log 2. The left half of the teacher's box: 1 - GIoU = 1/2, so
    # box = 4 * 3/8 * 1/2 = 3/4. There are 2 positives: half of both.
    student = CellView(
        {"p3": torch.zeros(1, 3, 1, 1)},
        {"p3": torch.tensor([0.0, 0.0, 4.0, 8.0]).view(1, 4, 1, 1)},
        {"p3": torch.tensor([[[[0, 1]]]])},
    )
    teacher = CellView(
        {"p3": torch.tensor([1 / 4, 1 / 2, 7 / 8]).logit().view(1, 3, 1, 1)},
        {"p3": torch.tensor([0.0, 0.0, 8.0, 8.0]).view(1, 4, 1, 1)},
    )
    losses = BCKDHead(levels=level_pairs(p3=(4, 4)), num_anchors=1)(student, teacher)
    assert losses["loss_bckd_cls"]["p3"].item() == pytest.approx(5 / 16 * math.log(2), rel=1e-5)
    assert losses["loss_bckd_box"]["p3"].item() == pytest.approx(3 / 8, rel=1e-5)


def test_box_term_has_no_gradient_for_the_classes_and_the_weight_multiplies_it() -> None:
    student, teacher = cell_view(0), cell_view(5)
    for x in [*student.logits.values(), *student.decoded.values()]:
        x.requires_grad_()
    losses = losses_between(student, teacher)
    total({"box": losses["loss_bckd_box"]}).backward(retain_graph=True)
    assert all(x.grad is None for x in student.logits.values())
    assert all(x.grad.abs().sum() > 0 for x in student.decoded.values())
    student.decoded["p3"].grad = student.decoded["p4"].grad = None
    total({"cls": losses["loss_bckd_cls"]}).backward()
    assert all(x.grad.abs().sum() > 0 for x in student.logits.values())
    assert all(x.grad is None for x in student.decoded.values())
    once = losses_between(student, teacher, box_weight=1.0)
    for level, x in losses["loss_bckd_box"].items():
        torch.testing.assert_close(4 * once["loss_bckd_box"][level], x)
    assert torch.equal(once["loss_bckd_cls"]["p3"], losses["loss_bckd_cls"]["p3"])


def test_gradient_of_the_classes_is_that_of_float64() -> None:
    student, teacher = cell_view(0), cell_view(5)
    student.logits["p4"].requires_grad_()
    total(losses_between(student, teacher)).backward()
    step = 1e-6
    for index in [(0, 0, 0, 0), (0, 4, 1, 1), (1, 5, 0, 1), (1, 2, 1, 0)]:
        both = []
        for sign in (1, -1):
            moved = CellView({"p4": student.logits["p4"].detach().double().clone()}, {"p4": 0})
            moved.logits["p4"][index] += sign * step
            boxes = student.decoded["p4"].double(), student.decoded["p4"].double()
            both.append(bckd_sums((moved.logits["p4"], teacher.logits["p4"]), boxes, ANCHORS)[0])
        slope = (both[0] - both[1]) / (2 * step) / positives(student)
        assert student.logits["p4"].grad[index].item() == pytest.approx(slope, rel=1e-3, abs=1e-6)


# Limits ------------------------------------------------------------------------------------------


def test_equal_predictions_give_exactly_zero() -> None:
    student, teacher = cell_view(0), cell_view(0)
    losses = losses_between(student, teacher)
    assert total(losses).item() == 0


@pytest.mark.parametrize("theirs", [-120.0, 120.0])
@pytest.mark.parametrize("ours", [-120.0, 120.0])
def test_sure_logits_give_the_finite_loss_of_float64_and_a_finite_gradient(
    ours: float, theirs: float
) -> None:
    student, teacher = cell_view(0), cell_view(5)
    for level in ("p3", "p4"):
        student.logits[level][:, ::2] = ours
        teacher.logits[level][0] = theirs
        student.logits[level].requires_grad_()
    losses = losses_between(student, teacher)
    for level in ("p3", "p4"):
        found = losses["loss_bckd_cls"][level].item(), losses["loss_bckd_box"][level].item()
        assert found == pytest.approx(expected_of(student, teacher, level), rel=1e-4)
    total(losses).backward()
    assert all(x.grad.isfinite().all() for x in student.logits.values())


@pytest.mark.parametrize("empty", [["p3"], ["p4"], ["p3", "p4"]])
def test_levels_without_a_positive_anchor_have_a_zero_that_is_connected(empty: List[str]) -> None:
    student, teacher = cell_view(0), cell_view(5)
    for level in empty:
        labels = student.labels[level]
        student.labels[level] = labels.where(labels < 0, torch.tensor(3))
    for x in [*student.logits.values(), *student.decoded.values()]:
        x.requires_grad_()
    losses = losses_between(student, teacher)
    total(losses).backward()
    for level in ("p3", "p4"):
        found = losses["loss_bckd_cls"][level].item(), losses["loss_bckd_box"][level].item()
        if level in empty:
            assert found == (0, 0) and (student.logits[level].grad == 0).all()
        else:
            expected = expected_of(student, teacher, level)
            assert found == pytest.approx(expected, rel=1e-4) and min(found) > 0


@pytest.mark.parametrize("side", [0, 1])
def test_cells_of_padding_have_no_part(side: int) -> None:
    views = cell_view(0, SIZES), cell_view(5, SIZES)
    expected = total(losses_between(*views))
    # Of the second image, 9 x 17 pixels are 2 x 3 cells of p3.
    views[side].logits["p3"][1, :, 2:] = 50
    views[side].logits["p3"][1, :, :, 3:] = -70
    views[side].decoded["p3"][1, :, 2:] += 100
    views[side].decoded["p3"][1, :, :, 3:] -= 100
    assert total(losses_between(*views)) == expected
    views[side].logits["p3"][1, 0, 1, 2] = 50
    assert total(losses_between(*views)) != expected


def test_ignored_anchors_count_as_all_anchors_do() -> None:
    student, teacher = cell_view(0), cell_view(5)
    expected = total(losses_between(student, teacher))
    student.labels = {k: x.where(x != -1, torch.tensor(3)) for k, x in student.labels.items()}
    assert total(losses_between(student, teacher)) == expected


def test_teacher_gets_no_gradient() -> None:
    student, teacher = cell_view(0), cell_view(5)
    leaves = [*teacher.logits.values(), *teacher.decoded.values()]
    for x in [*leaves, *student.logits.values()]:
        x.requires_grad_()
    total(losses_between(student, teacher)).backward()
    assert all(x.grad is None for x in leaves)


# Between real detectors --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_of(folder: Path) -> Callable[[str], List[Any]]:
    """DISTILL.TEACHER.* of a toy detector by name, with wider levels than the students have."""
    wide = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__RETINANET__NORM": ""}
    return lru_cache(maxsize=None)(lambda name: write_teacher(folder, name, **wide))


def build(student: str, opts: List[Any], *heads: str) -> nn.Module:
    """Both detectors predict boxes of many sizes and many scores."""
    torch.manual_seed(0)
    cfg = distill_config(student, opts, heads or ["BCKD"], MODEL__RETINANET__NORM="")
    cfg.DISTILL.CrossKD.DEPTH = 1
    distiller = build_model(cfg).train()
    for detector in (distiller.student, distiller.teacher.model):
        nn.init.normal_(detector.head.bbox_pred.weight, std=0.03)
        nn.init.normal_(detector.head.cls_score.weight, std=0.1)
        # FCOS: the distances from the centre to the four sides, in strides.
        nn.init.constant_(detector.head.bbox_pred.bias, 1.0 if student == "fcos" else 0.0)
    return distiller


def anchor_sizes(name: str, level: int) -> List[Tuple[float, float]]:
    """(width, height) by the config: RetinaNet's of aspect ratios 1/2, 1 and 2."""
    ratios, size = [1.0] if name == "fcos" else [0.5, 1.0, 2.0], 2**level
    return [(size / ratio**0.5, size * ratio**0.5) for ratio in ratios]


@pytest.mark.parametrize("name", DENSE)
def test_step_trains_a_dense_pair_with_the_losses_of_the_equations(
    name: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(name, teacher_of(name))
    inputs = batch(1) + batch(1, height=40, width=50, seed=3)  # the second one is padded
    losses = losses_of(distiller, inputs)
    views = distiller.last_step.student, distiller.last_step.teacher
    dense, count, cls, box = [x.dense() for x in views], positives(views[0]), 0.0, 0.0
    on_objects = [bool(x.any()) for x in views[0].anchor_labels().on_objects]
    assert set(on_objects) == {True, False}, "the released loss is 0 on the others"
    for i, level in enumerate(range(3, 8)):
        if not on_objects[i]:
            continue
        maps = [
            decode_map(x.deltas[i].detach(), 2**level, anchor_sizes(name, level), name == "fcos")
            for x in dense
        ]
        logits = tuple(x.logits[i] for x in dense)
        num_anchors = 1 if name == "fcos" else 3
        terms = bckd_sums(logits, tuple(maps), num_anchors, [(64, 64), (40, 50)], 2**level)
        cls, box = cls + terms[0] / count, box + 4 * terms[1] / count
    assert count > 1 and min(cls, box) > 0.01
    assert losses["loss_bckd_cls"].item() == pytest.approx(cls, rel=1e-3)
    assert losses["loss_bckd_box"].item() == pytest.approx(box, rel=1e-3)
    (losses["loss_bckd_cls"] + losses["loss_bckd_box"]).backward()
    head = distiller.student.head
    assert all(p.grad is not None for k, p in head.named_parameters() if "ctrness" not in k)
    assert distiller.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


def test_heads_on_cells_share_one_pass_of_each_head_and_one_labelling(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = write_teacher(folder, "retinanet", MODEL__RETINANET__NORM="")
    distiller = build("retinanet", teacher, "BCKD", "CrossKD", "DIST")
    student, calls = distiller.student, []
    label_anchors, before = type(student).label_anchors, set(vars(student))

    def counted(*args: Any) -> Any:
        calls.append("labels")
        return label_anchors(*args)

    monkeypatch.setattr(type(student), "label_anchors", counted)
    sides = (("student", student), ("teacher", distiller.teacher.model))
    hooks = [
        detector.head.register_forward_hook(lambda *_, name=side: calls.append(name))
        for side, detector in sides
    ]
    losses = losses_of(distiller, batch())
    assert {"loss_bckd_cls", "loss_crosskd_cls", "loss_dist_inter"} <= set(losses)
    sum(losses.values()).backward()
    assert sorted(calls) == ["labels", "student", "teacher"]
    assert set(vars(student)) - before <= {"loss_normalizer"}, "Detectron2's own"
    for hook in hooks:
        hook.remove()
    for copied in (copy.deepcopy(student), pickle.loads(pickle.dumps(student))):
        for key, value in student.state_dict().items():
            assert torch.equal(copied.state_dict()[key], value), key


def test_images_without_objects_give_a_connected_loss(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet"))
    losses = losses_of(distiller, batch(boxes=0))
    own = losses["loss_bckd_cls"] + losses["loss_bckd_box"]
    own.backward()
    assert own.isfinite() and positives(distiller.last_step.student) == 0
    assert distiller.student.head.bbox_pred.weight.grad.isfinite().all()


def test_keys_reach_the_head_and_defaults_are_the_published_ones(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet"))
    head = distiller.heads["BCKD"]
    assert (head.box_weight, head.num_anchors) == (4.0, 3) and not list(head.parameters())
    assert [x.student for x in head.levels] == ["p3", "p4", "p5", "p6", "p7"]
    cfg = distill_config("retinanet", teacher_of("retinanet"), ["BCKD"])
    assert cfg.DISTILL.BCKD.LOSS_WEIGHT == 1.0
    cfg.DISTILL.BCKD.BOX_WEIGHT = 2.5
    pair = describe_pair(cfg, distiller.student, distiller.teacher.model)
    assert build_head("BCKD", cfg, pair).box_weight == 2.5
