"""DISTHead beside its equations in loops, at its limits, and between real detectors."""

import math
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling

from d2kd.heads import DISTHead, build_head
from d2kd.lesson import describe_pair
from d2kd.views.predictions import RoIPredictions
from tests.helpers.distillers import build_distiller, losses_of
from tests.helpers.logit_references import (
    CellView,
    dist,
    region_views,
    sigmoid_rows,
    softmax_rows,
    total,
)
from tests.helpers.toys import batch, distill_config, level_pairs, noise

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)


def of_regions(student: Tensor, teacher: Tensor, **values: float) -> Tuple[Tensor, Tensor]:
    losses = DISTHead(levels=(), two_stage=True, **values)(*region_views(student, teacher))
    assert list(losses) == ["loss_dist_inter", "loss_dist_intra"]
    assert all(x.shape == () and x.dtype == torch.float32 for x in losses.values())
    return tuple(losses.values())


def of_cells(
    student: Dict[str, Tensor], teacher: Dict[str, Tensor], **values: float
) -> Dict[str, Dict[str, Tensor]]:
    """Of logits per level, (N, A*K, H, W)."""
    head = DISTHead(levels=level_pairs(**{k: (4, 4) for k in student}), two_stage=False, **values)
    losses = head(CellView(student, student), CellView(teacher, teacher))
    assert list(losses) == ["loss_dist_inter", "loss_dist_intra"]
    assert all(list(x) == list(student) for x in losses.values())
    return losses


def cells(seed: int) -> Dict[str, Tensor]:
    return {"p3": noise(2, 6, 3, 4, seed=seed) * 2, "p4": noise(2, 6, 1, 2, seed=seed + 1) * 2}


# The equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_regions_have_the_loss_of_the_equations(temperature: float) -> None:
    student, teacher = noise(6, 4, seed=1) * 2, noise(6, 4, seed=2) * 2
    found = of_regions(student, teacher, temperature=temperature)
    expected = dist(*(softmax_rows(x, temperature) for x in (student, teacher)), temperature)
    assert [x.item() for x in found] == pytest.approx(expected, rel=1e-5)
    assert abs(expected[0] - expected[1]) > 1e-3, "rows and columns are told apart"


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_cells_have_the_loss_of_the_equations_level_by_level(temperature: float) -> None:
    student, teacher = cells(1), cells(5)
    losses = of_cells(student, teacher, temperature=temperature)
    for level in student:
        rows = (sigmoid_rows(x[level], temperature) for x in (student, teacher))
        found = [losses[f"loss_dist_{k}"][level].item() for k in ("inter", "intra")]
        assert found == pytest.approx(dist(*rows, temperature), rel=1e-5)


def test_two_regions_of_opposite_order_are_twice_as_far_as_uncorrelated_ones() -> None:
    # Rows: of two classes p and 1 - p, the correlation of two regions is 1 or -1. Student
    # (0.9, 0.1), (0.8, 0.2); teacher (0.7, 0.3), (0.4, 0.6): rows agree, then disagree, so
    # 1 - (1 - 1) / 2 = 1. Columns: both fall from the first region to the second, 1 - 1 = 0.
    student = torch.tensor([[0.9, 0.1], [0.8, 0.2]]).log()
    teacher = torch.tensor([[0.7, 0.3], [0.4, 0.6]]).log()
    assert [x.item() for x in of_regions(student, teacher)] == pytest.approx([1, 0], abs=1e-5)


def test_weights_multiply_their_own_terms() -> None:
    student, teacher = noise(6, 4, seed=1), noise(6, 4, seed=2)
    once = of_regions(student, teacher)
    more = of_regions(student, teacher, inter_weight=2.0, intra_weight=0.5)
    torch.testing.assert_close(more, (2 * once[0], once[1] / 2))
    x, y = cells(1), cells(5)
    once, more = of_cells(x, y), of_cells(x, y, inter_weight=2.0, intra_weight=0.5)
    for key, weight in (("loss_dist_inter", 2.0), ("loss_dist_intra", 0.5)):
        torch.testing.assert_close(more[key]["p4"], weight * once[key]["p4"])


# Limits ------------------------------------------------------------------------------------------


def test_equal_logits_give_zero() -> None:
    x = noise(6, 4) * 2
    assert [v.item() for v in of_regions(x, x)] == pytest.approx([0, 0], abs=1e-6)
    assert total(of_cells(cells(1), cells(1))).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("spread", [0.1, 0.01])
def test_equal_logits_that_hardly_vary_leave_what_the_published_epsilon_makes_of_them(
    spread: float,
) -> None:
    # RetinaNet and FCOS begin with p = 0.01 for every class, sigmoid(-4.6). Of equal predictions of
    # norm n, 1 - n^2 / (n^2 + 1e-8) = 1e-8 / (n^2 + 1e-8) is left: no promise of zero_at_equal.
    x = {k: -4.6 + spread * v for k, v in cells(1).items()}
    expected = 0.0
    for logits in x.values():
        p = logits.double().sigmoid()
        for dims in ((1,), (0, 2, 3)):
            n = (p - p.mean(dim=dims, keepdim=True)).square().sum(dim=dims)
            expected += (1e-8 / (n + 1e-8)).mean().item()
    assert total(of_cells(x, x)).item() == pytest.approx(expected, rel=1e-3, abs=1e-5) and expected


@pytest.mark.parametrize("scale, shift", [(0.5, 0.3), (0.9, 0.0), (0.2, 0.8)])
def test_probabilities_may_be_scaled_and_shifted(scale: float, shift: float) -> None:
    # p -> scale p + shift keeps the order and the ratios of all differences.
    x, y = cells(1), cells(5)
    probabilities = {k: scale * v.sigmoid() + shift for k, v in x.items()}
    moved = {k: p.logit() for k, p in probabilities.items()}
    torch.testing.assert_close(total(of_cells(moved, y)), total(of_cells(x, y)))
    # Of a softmax, whose sum stays 1: shift = (1 - scale) / 4.
    x, y = noise(6, 4, seed=1), noise(6, 4, seed=2)
    moved = (scale * x.softmax(dim=1) + (1 - scale) / 4).log()
    torch.testing.assert_close(of_regions(moved, y), of_regions(x, y))


@pytest.mark.parametrize("theirs", [-120.0, 120.0])
@pytest.mark.parametrize("ours", [-120.0, 120.0])
def test_sure_logits_give_the_finite_loss_of_float64_and_a_finite_gradient(
    ours: float, theirs: float
) -> None:
    student, teacher = noise(3, 4, seed=1).float(), noise(3, 4, seed=2).float()
    student[0, 0], teacher[0, 1], teacher[1, 0] = ours, theirs, theirs
    x = student.clone().requires_grad_()
    found = of_regions(x, teacher)
    expected = dist(*(softmax_rows(z.double()) for z in (student, teacher)))
    assert [v.item() for v in found] == pytest.approx(expected, rel=1e-4)
    maps = {"p3": student.clone()[:, :, None, None].requires_grad_()}
    losses = of_cells(maps, {"p3": teacher[:, :, None, None]})
    expected = dist(*(sigmoid_rows(z.double()[:, :, None, None]) for z in (student, teacher)))
    assert total(losses).item() == pytest.approx(sum(expected), rel=1e-4)
    (sum(found) + total(losses)).backward()
    assert x.grad.isfinite().all() and maps["p3"].grad.isfinite().all()


@pytest.mark.parametrize("value", [-120.0, 0.0, 120.0])
def test_predictions_that_do_not_vary_correlate_with_nothing(value: float) -> None:
    # Correlation 0: the loss is 1 for rows and 1 for columns.
    x = torch.full((2, 6, 3, 4), value, requires_grad=True)
    losses = of_cells({"p3": x}, {"p3": cells(1)["p3"].float()})
    total(losses).backward()
    assert total(losses).item() == pytest.approx(2) and x.grad.isfinite().all()


def test_a_single_class_has_no_classes_to_correlate() -> None:
    # As of FCOS or RepPoints, or of a box head with a sigmoid: a connected 0, no constant.
    student, teacher = ({"p3": noise(2, 1, 3, 4, seed=s).float()} for s in (1, 2))
    student["p3"].requires_grad_()
    inter, intra = (x["p3"] for x in of_cells(student, teacher).values())
    expected = dist(*(sigmoid_rows(x["p3"].double()) for x in (student, teacher)))
    assert inter.item() == 0 and intra.item() == pytest.approx(expected[1], rel=1e-5)
    inter.backward(retain_graph=True)
    assert not student["p3"].grad.any()
    intra.backward()
    assert student["p3"].grad.abs().sum() > 0
    rows = [noise(5, 1, seed=s).float() for s in (1, 2)]
    views = region_views(*rows)
    for view, x in zip(views, rows):
        answer = RoIPredictions(x, x, x, "sigmoid")
        view.roi_predictions = lambda *_, answer=answer: answer
    losses = DISTHead(levels=(), two_stage=True)(*views)
    assert losses["loss_dist_inter"].item() == 0 and losses["loss_dist_intra"].item() > 0


def test_a_single_region_has_no_columns_to_correlate() -> None:
    student, teacher = noise(1, 4, seed=1).requires_grad_(), noise(1, 4, seed=2)
    inter, intra = of_regions(student, teacher)
    expected = dist(softmax_rows(student), softmax_rows(teacher))
    assert (inter.item(), intra.item()) == pytest.approx(expected, rel=1e-5)
    assert intra.item() == 1, "one value has no correlation"
    (inter + intra).backward()
    assert student.grad.isfinite().all()


def test_batch_without_regions_gives_a_connected_zero() -> None:
    student = torch.zeros(0, 4, requires_grad=True)
    terms = of_regions(student, torch.zeros(0, 4))
    sum(terms).backward()
    assert [x.item() for x in terms] == [0.0, 0.0] and student.grad.shape == (0, 4)


def test_half_precision_is_compared_in_float32() -> None:
    student, teacher = noise(6, 4, seed=1).bfloat16(), noise(6, 4, seed=2).bfloat16()
    expected = of_regions(student.float(), teacher.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert of_regions(student, teacher) == expected
    large = torch.tensor([[6e4, -6e4, 1.0]], dtype=torch.float16)
    assert all(x.isfinite() for x in of_regions(large, -large))


def test_teacher_gets_no_gradient() -> None:
    student, teacher = (noise(5, 4, seed=s).requires_grad_() for s in (1, 2))
    sum(of_regions(student, teacher)).backward()
    assert teacher.grad is None and student.grad.abs().sum() > 0
    student, teacher = ({"p3": noise(2, 6, 3, 4, seed=s).requires_grad_()} for s in (1, 2))
    total(of_cells(student, teacher)).backward()
    assert teacher["p3"].grad is None and student["p3"].grad.abs().sum() > 0


# Between real detectors --------------------------------------------------------------------------


def build(student: str, opts: List[Any], **values: Any) -> nn.Module:
    distiller = build_distiller(student, opts, ["DIST"], **values)
    for detector in (distiller.student, distiller.teacher.model):
        if hasattr(detector, "head"):  # new ones say nearly the same of all classes
            torch.nn.init.normal_(detector.head.cls_score.weight, std=0.1)
    return distiller


@pytest.mark.parametrize("name", ["retinanet", pytest.param("fcos", marks=needs_fcos)])
def test_step_of_a_dense_pair_has_the_loss_of_the_equations_summed_over_levels(
    name: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(name, teacher_of(name), DISTILL__DIST__TEMPERATURE=2.0)
    losses = losses_of(distiller, batch())
    ours, theirs = (x.dense() for x in (distiller.last_step.student, distiller.last_step.teacher))
    assert ours.logits[0].shape[1] == (9 if name == "retinanet" else 3), "A * K"
    levels = [
        dist(*(sigmoid_rows(z.double(), 2.0) for z in pair), 2.0)
        for pair in zip(ours.logits, theirs.logits)
    ]
    found = [losses[f"loss_dist_{k}"].item() for k in ("inter", "intra")]
    assert len(levels) == 5
    assert found == pytest.approx([sum(x) for x in zip(*levels)], rel=1e-3)
    (losses["loss_dist_inter"] + losses["loss_dist_intra"]).backward()
    head = distiller.student.head
    assert head.cls_score.weight.grad.abs().sum() > 0 and head.bbox_pred.weight.grad is None
    assert distiller.student.backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


@pytest.mark.parametrize("teacher", ["faster_rcnn", "cascade_rcnn"])
def test_step_of_a_two_stage_pair_has_the_loss_of_the_equations(
    teacher: str, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build("faster_rcnn", teacher_of(teacher), DISTILL__DIST__TEMPERATURE=0.5)
    losses = losses_of(distiller, batch())
    ours, theirs = distiller.last_step.student, distiller.last_step.teacher
    logits = ours.roi_predictions().logits, theirs.roi_predictions(ours.regions().boxes).logits
    expected = dist(*(softmax_rows(x.double(), 0.5) for x in logits), 0.5)
    found = [losses[f"loss_dist_{k}"].item() for k in ("inter", "intra")]
    assert found == pytest.approx(expected, rel=1e-3)
    (losses["loss_dist_inter"] + losses["loss_dist_intra"]).backward()
    predictor = distiller.student.roi_heads.box_predictor
    assert predictor.cls_score.weight.grad.abs().sum() > 0
    assert predictor.bbox_pred.weight.grad is None
    assert all(p.grad is None for p in distiller.teacher.model.parameters())


def test_keys_reach_the_head_and_defaults_are_the_published_ones(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet"))
    cfg = distill_config("retinanet", teacher_of("retinanet"), ["DIST"])
    pair = describe_pair(cfg, distiller.student, distiller.teacher.model)

    def values(head: nn.Module) -> List[float]:
        return [head.inter_weight, head.intra_weight, head.temperature]

    head = distiller.heads["DIST"]
    assert cfg.DISTILL.DIST.LOSS_WEIGHT == 1.0 and values(head) == [1.0, 1.0, 1.0]
    assert not head.two_stage and [x.student for x in head.levels] == list(pair.student.shapes)
    keys = ("INTER_WEIGHT", 2.0, "INTRA_WEIGHT", 3.0, "TEMPERATURE", 4.0)
    cfg.merge_from_list([f"DISTILL.DIST.{x}" if isinstance(x, str) else x for x in keys])
    assert values(build_head("DIST", cfg, pair)) == [2.0, 3.0, 4.0]
    for value in (0.0, -1.0, math.nan):
        cfg.DISTILL.DIST.TEMPERATURE = value
        with pytest.raises(ValueError, match=rf"DISTILL\.DIST\.TEMPERATURE .* got {value}"):
            build_head("DIST", cfg, pair)
