"""CrossKDHead beside its equations, the rest of the teacher's head by hand, and its limits."""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.modeling import build_model

from d2kd.heads import CrossKDHead, build_head
from d2kd.lesson import describe_pair
from tests.helpers.distillers import losses_of
from tests.helpers.logit_references import (
    ANCHORS,
    SIZES,
    CellView,
    align,
    cell_view,
    conv3x3,
    crosskd_sums,
    decode_map,
    positives,
    refusal_of,
    total,
    tower_by_hand,
)
from tests.helpers.toys import batch, distill_config, level_pairs, noise, write_teacher

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
DENSE = ["retinanet", pytest.param("fcos", marks=needs_fcos)]


def losses_between(
    student: CellView, teacher: CellView, **values: Any
) -> Dict[str, Dict[str, Tensor]]:
    levels = level_pairs(**{k: (4, 4) for k in student.logits})
    losses = CrossKDHead(levels=levels, num_anchors=ANCHORS, **values)(student, teacher)
    assert list(losses) == ["loss_crosskd_cls", "loss_crosskd_box"]
    assert all(x.dtype == torch.float32 for v in losses.values() for x in v.values())
    return losses


def expected_of(
    student: CellView, teacher: CellView, box_loss: str = "giou"
) -> Dict[str, List[float]]:
    """Per level. The rest of such a teacher's head changes nothing: what is crossed is aligned."""
    terms = []
    for level in student.logits:
        logits, boxes = (
            (align(ours[level].detach(), theirs[level]), theirs[level].double())
            for ours, theirs in (
                (student.logits, teacher.logits),
                (student.decoded, teacher.decoded),
            )
        )
        where = student._image_sizes, student.strides[level]
        terms.append(crosskd_sums(logits, boxes, student.labels[level], box_loss, *where))
    names = ("loss_crosskd_cls", "loss_crosskd_box")
    count = max(positives(student), 1)
    return {name: [x / count for x in sums] for name, sums in zip(names, zip(*terms))}


# The equations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("box_loss", ["giou", "log_iou"])
@pytest.mark.parametrize("sizes", [[], SIZES])
def test_both_terms_are_those_of_the_equations_level_by_level(
    sizes: List[Any], box_loss: str
) -> None:
    student, teacher = cell_view(0, sizes), cell_view(5, sizes)
    assert positives(student) > 3 and (student.labels["p3"] == -1).any()
    losses = losses_between(student, teacher, box_loss=box_loss)
    for key, expected in expected_of(student, teacher, box_loss).items():
        found = [x.item() for x in losses[key].values()]
        assert found == pytest.approx(expected, rel=1e-3) and min(expected) > 0


def test_weight_multiplies_the_boxes_alone() -> None:
    student, teacher = cell_view(0), cell_view(5)
    once, more = losses_between(student, teacher), losses_between(student, teacher, box_weight=2.5)
    for level, x in once["loss_crosskd_box"].items():
        torch.testing.assert_close(more["loss_crosskd_box"][level], 2.5 * x)
    assert once["loss_crosskd_cls"] == more["loss_crosskd_cls"]


def test_scale_and_shift_of_a_student_s_channels_do_not_matter() -> None:
    student, teacher = cell_view(0), cell_view(5)
    expected = total(losses_between(student, teacher))
    student.logits = {k: 3 * x - 7 for k, x in student.logits.items()}
    torch.testing.assert_close(total(losses_between(student, teacher)), expected)


def test_a_level_of_a_single_cell_is_put_to_the_teacher_s_value() -> None:
    # One value per channel has no deviation: aligned, it is the teacher's mean, its own value.
    views = [cell_view(s) for s in (0, 5)]
    for view in views:
        for maps in (view.logits, view.decoded, view.labels):
            del maps["p4"]
            maps["p3"] = maps["p3"][:1, ..., :1, :1]
        view._features = view.logits
        view.logits["p3"].requires_grad_()
    loss = total(losses_between(*views))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert views[0].logits["p3"].grad.isfinite().all()


# Limits ------------------------------------------------------------------------------------------


def test_equal_detectors_give_zero() -> None:
    losses = losses_between(cell_view(0), cell_view(0))
    assert total(losses).item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("theirs", [-120.0, 120.0])
@pytest.mark.parametrize("ours", [-120.0, 120.0])
def test_sure_logits_give_the_finite_loss_of_float64_and_a_finite_gradient(
    ours: float, theirs: float
) -> None:
    student, teacher = cell_view(0), cell_view(5)
    for level in ("p3", "p4"):
        student.logits[level][:, ::2] = ours  # a constant channel
        student.logits[level][0, 1, 0] = -ours
        teacher.logits[level][0] = theirs
        student.logits[level].requires_grad_()
    losses = losses_between(student, teacher)
    for key, expected in expected_of(student, teacher).items():
        assert [x.item() for x in losses[key].values()] == pytest.approx(expected, rel=1e-3)
    total(losses).backward()
    assert all(not x.grad.isnan().any() for x in student.logits.values())


def filled(at: str, where: Tensor, value: float) -> Callable[[str, Tensor], Tensor]:
    return lambda level, x: x.masked_fill(where, value) if level == at else x


@pytest.mark.parametrize("level", ["p3", "p4"])
def test_ignored_anchors_have_no_part(level: str) -> None:
    student, teacher = cell_view(0), cell_view(5)
    expected = {k: sum(v.values()) for k, v in losses_between(student, teacher).items()}
    own = teacher.predict_from
    ignored = student.labels[level] == -1  # (N, A, H, W)
    of_classes, of_sides = (ignored.repeat_interleave(count, dim=1) for count in (3, 4))

    def with_garbage(depth: int, towers: Any) -> Any:
        predictions = own(depth, towers)
        predictions = predictions.map(filled(level, of_classes, 50.0), ("logits",))
        return predictions.map(filled(level, of_sides, 100.0), ("deltas",))

    assert ignored.any()
    teacher.predict_from = with_garbage
    found = {k: sum(v.values()) for k, v in losses_between(student, teacher).items()}
    assert found == expected
    student.labels[level] = student.labels[level].masked_fill(ignored, 3)
    counted = sum(losses_between(student, teacher)["loss_crosskd_cls"].values())
    assert counted > 1.5 * expected["loss_crosskd_cls"]


def test_cells_of_padding_have_no_part() -> None:
    student, teacher = cell_view(0, SIZES), cell_view(5, SIZES)
    expected = total(losses_between(student, teacher))
    own, theirs = teacher.predict_from, teacher.dense()
    outside = torch.ones(2, 1, 3, 4, dtype=torch.bool)
    outside[0] = outside[1, :, :2, :3] = False  # 9 x 17 pixels are 2 x 3 cells of p3

    def with_garbage(depth: int, towers: Any) -> Any:
        predictions = own(depth, towers).map(filled("p3", outside, 50.0), ("logits",))
        return predictions.map(filled("p3", outside, 1000.0), ("deltas",))

    teacher.predict_from = with_garbage
    theirs = theirs.map(filled("p3", outside, 9.0), ("logits",))
    theirs = theirs.map(filled("p3", outside, -5.0), ("deltas",))
    towers = teacher.towers(1)
    teacher.dense, teacher.towers = lambda: theirs, lambda depth: towers
    assert total(losses_between(student, teacher)) == expected


def test_of_fcos_padding_counts_and_the_centerness_of_objects_divides() -> None:
    student, teacher = cell_view(0, SIZES), cell_view(5, SIZES)
    labels = student.anchor_labels()
    centerness = [noise(*x.shape).sigmoid() for x in labels.maps]
    student.anchor_labels = lambda: replace(labels, centerness=centerness)
    divisor = sum(x[on].sum().item() for x, on in zip(centerness, labels.on_objects))
    assert 1 < divisor < 0.9 * positives(student)
    losses = losses_between(student, teacher)
    for key, expected in expected_of(cell_view(0), cell_view(5)).items():
        expected = [x * positives(student) / divisor for x in expected]
        assert [x.item() for x in losses[key].values()] == pytest.approx(expected, rel=1e-3)


def test_teacher_gets_no_gradient() -> None:
    student, teacher = cell_view(0), cell_view(5)
    leaves = [*teacher.logits.values(), *teacher.decoded.values()]
    for x in [*leaves, *student.logits.values(), *student.decoded.values()]:
        x.requires_grad_()
    total(losses_between(student, teacher)).backward()
    assert all(x.grad is None for x in leaves)
    assert all(x.grad.abs().sum() > 0 for x in student.logits.values())


# Between real detectors --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher_of(folder: Path) -> Callable[[str], List[Any]]:
    """DISTILL.TEACHER.* of a toy detector by name, with three convolutions in each tower."""
    return lru_cache(maxsize=None)(lambda name: write_teacher(folder, name, **CONVS))


CONVS = {
    "MODEL__RETINANET__NORM": "",
    "MODEL__RETINANET__NUM_CONVS": 3,
    "MODEL__FCOS__NUM_CONVS": 3,
    "MODEL__FCOS__NORM": "",
}


def config(student: str, teacher: List[Any], *opts: Any) -> Any:
    cfg = distill_config(student, teacher, ["CrossKD"], **CONVS)
    cfg.DISTILL.CrossKD.DEPTH = 2
    cfg.merge_from_list([f"DISTILL.CrossKD.{x}" if i % 2 == 0 else x for i, x in enumerate(opts)])
    return cfg


def build(student: str, teacher: List[Any], *opts: Any) -> nn.Module:
    """Both detectors predict boxes of many sizes and many scores."""
    torch.manual_seed(0)
    distiller = build_model(config(student, teacher, *opts)).train()
    for detector in (distiller.student, distiller.teacher.model):
        for conv in (m for m in detector.head.modules() if isinstance(m, nn.Conv2d)):
            nn.init.normal_(conv.weight, std=0.08)
        # FCOS: the distances from the centre to the four sides, in strides.
        nn.init.constant_(detector.head.bbox_pred.bias, 1.0 if student == "fcos" else 0.0)
    return distiller


def crossed_by_hand(
    student: nn.Module, teacher: nn.Module, ours: Tensor, theirs: Tensor, depth: int
) -> Tuple[Tensor, ...]:
    """Logits and deltas of one level, crossed, then the teacher's own."""
    crossed, own = [], []
    for subnet, predictor in (("cls_subnet", "cls_score"), ("bbox_subnet", "bbox_pred")):
        nets, predict = [getattr(x, subnet) for x in (student, teacher)], getattr(
            teacher, predictor
        )
        x, y = (tower_by_hand(n, z.double(), 1, depth) for n, z in zip(nets, (ours, theirs)))
        for tower, into in ((align(x, y), crossed), (y, own)):
            last = tower_by_hand(nets[1], tower, depth + 1, 3)
            into.append(conv3x3(last.clamp(min=0), predict))
    return (*crossed, *own)


def divisor(view: Any) -> float:
    """RetinaNet: the number of positives; FCOS: the sum of their centerness, which is smaller."""
    labels = view.anchor_labels()
    if labels.centerness is None:
        return positives(view)
    pairs = zip(labels.centerness, labels.on_objects)
    total = sum(x[on].sum().item() for x, on in pairs)
    assert 0 < total < 0.9 * positives(view)
    return total


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", DENSE)
def test_step_has_the_losses_of_the_equations(
    name: str, depth: int, teacher_of: Callable[[str], List[Any]]
) -> None:
    of_fcos, box_loss = name == "fcos", "log_iou" if name == "fcos" else "giou"
    distiller = build(name, teacher_of(name), "DEPTH", depth, "BOX_LOSS", box_loss)
    inputs = batch(1, boxes=6) + batch(1, height=40, width=50, seed=3)  # the second one is padded
    losses = losses_of(distiller, inputs)
    views = distiller.last_step.student, distiller.last_step.teacher
    labels, terms = views[0].anchor_labels().maps, []
    for i, level in enumerate(range(3, 8)):
        ratios = [1.0] if of_fcos else [0.5, 1.0, 2.0]
        sizes = [(2**level / r**0.5, 2**level * r**0.5) for r in ratios]
        features = [x.features[f"p{level}"].detach() for x in views]
        with torch.no_grad():
            logits, deltas, own_logits, own_deltas = crossed_by_hand(
                *(x.detector.head for x in views), *features, depth
            )
        torch.testing.assert_close(own_logits, views[1].dense().logits[i].double(), **CLOSE)
        boxes = [decode_map(x, 2**level, sizes, of_fcos) for x in (deltas, own_deltas)]
        # FCOS's padding counts: no sizes are told.
        where = ([] if of_fcos else [(64, 64), (40, 50)]), 2**level
        terms.append(crosskd_sums((logits, own_logits), tuple(boxes), labels[i], box_loss, *where))
    cls, box = (sum(x) for x in zip(*terms))
    count = divisor(views[0])
    assert count > 1 and min(cls, box) > 0.01
    if not of_fcos:
        assert any((x == -1).any() for x in labels)
    assert losses["loss_crosskd_cls"].item() == pytest.approx(cls / count, rel=1e-3)
    assert losses["loss_crosskd_box"].item() == pytest.approx(box / count, rel=1e-3)


CLOSE = {"rtol": 1e-3, "atol": 1e-3}


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("name", DENSE)
def test_gradient_reaches_the_student_up_to_the_cross_point_and_nothing_of_the_teacher(
    name: str, depth: int, teacher_of: Callable[[str], List[Any]]
) -> None:
    distiller = build(name, teacher_of(name), "DEPTH", depth)
    teacher = distiller.teacher.model
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    losses = losses_of(distiller, batch())
    (losses["loss_crosskd_cls"] + losses["loss_crosskd_box"]).backward()
    head = distiller.student.head
    for subnet in (head.cls_subnet, head.bbox_subnet):
        convs = [m for m in subnet if isinstance(m, nn.Conv2d)]
        for number, conv in enumerate(convs, start=1):
            reached = conv.weight.grad is not None and conv.weight.grad.abs().sum() > 0
            assert reached == (number <= depth), number
    rest = [head.cls_score, head.bbox_pred] + ([head.ctrness] if name == "fcos" else [])
    assert all(m.weight.grad is None for m in rest)
    backbone = distiller.student.backbone
    assert backbone.bottom_up.stem.conv1.weight.grad.abs().sum() > 0
    assert backbone.fpn_output3.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in teacher.parameters())
    assert not any(m.training for m in teacher.modules())
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())


def test_a_student_that_is_its_teacher_has_no_loss(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet"))
    distiller.student.load_state_dict(distiller.teacher.model.state_dict())
    distiller.student.eval()
    distiller.student.training = True  # so that it has losses; BatchNorm keeps its averages
    losses = losses_of(distiller, batch())
    assert losses["loss_crosskd_cls"] + losses["loss_crosskd_box"] < 1e-3


def test_images_without_objects_give_a_connected_loss(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet"))
    losses = losses_of(distiller, batch(boxes=0))
    own = losses["loss_crosskd_cls"] + losses["loss_crosskd_box"]
    own.backward()
    assert own.isfinite() and positives(distiller.last_step.student) == 0
    assert distiller.student.head.cls_subnet[0].weight.grad.isfinite().all()


# Config ------------------------------------------------------------------------------------------


def test_keys_reach_the_head_and_defaults_are_the_published_ones(
    teacher_of: Callable[[str], List[Any]],
) -> None:
    distiller = build("retinanet", teacher_of("retinanet"))
    pair = describe_pair(
        config("retinanet", teacher_of("retinanet")), distiller.student, distiller.teacher.model
    )

    def values(*opts: Any) -> Tuple[Any, ...]:
        head = build_head("CrossKD", config("retinanet", teacher_of("retinanet"), *opts), pair)
        return head.depth, head.box_loss, head.box_weight

    defaults = distill_config("retinanet", teacher_of("retinanet"), ["CrossKD"]).DISTILL.CrossKD
    assert (defaults.LOSS_WEIGHT, defaults.BOX_WEIGHT) == (1.0, 1.0)
    assert (defaults.DEPTH, defaults.BOX_LOSS) == (3, "giou")
    assert values("DEPTH", 3) == (3, "giou", 1.0)
    keys = ("DEPTH", 1, "BOX_LOSS", "log_iou", "BOX_WEIGHT", 1.875)
    assert values(*keys) == (1, "log_iou", 1.875)
    with pytest.raises(ValueError, match=r"DISTILL\.CrossKD\.BOX_LOSS must be .* got 'l1'"):
        values("BOX_LOSS", "l1")
    for depth in (0, 4, -1):
        cfg = config("retinanet", teacher_of("retinanet"), "DEPTH", depth)
        text = refusal_of("CrossKD", cfg, pair)
        needed = f"CrossKD needs tower_{depth} (DISTILL.CrossKD.DEPTH); the student RetinaNet has"
        assert f"{needed} none. It has " in text
        assert "tower_1, tower_2, tower_3." in text


@pytest.mark.parametrize(
    "values, message",
    [
        ({"MODEL__FPN__OUT_CHANNELS": 64}, "32 channels and the teacher's 64"),
        (
            {
                "MODEL__RETINANET__IN_FEATURES": ["p4", "p5", "p6", "p7"],
                "MODEL__ANCHOR_GENERATOR__SIZES": [[16], [32], [64], [128]],
            },
            r"strides \[8, 16, 32, 64, 128\] and the teacher at \[16, 32, 64, 128\]",
        ),
        ({"MODEL__ANCHOR_GENERATOR__ASPECT_RATIOS": [[1.0]]}, "3 anchors .* the teacher 1"),
        ({"MODEL__RETINANET__NUM_CLASSES": 5}, "student has 3 classes and the teacher 5"),
        (
            {"MODEL__RETINANET__NUM_CONVS": 1},
            "needs tower_2 .*DEPTH.*; the teacher RetinaNet has none",
        ),
    ],
)
def test_teacher_whose_head_cannot_go_on_is_refused(
    values: Dict[str, Any], message: str, tmp_path: Path
) -> None:
    teacher = write_teacher(tmp_path, "retinanet", **{**CONVS, **values})
    with pytest.raises(ValueError, match=rf"DISTILL\.HEADS: CrossKD .*{message}"):
        build_model(config("retinanet", teacher))
