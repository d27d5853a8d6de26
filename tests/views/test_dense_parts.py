"""What a view of a dense detector says of its anchors, its boxes and the inside of its head."""

import math
from typing import Any, Dict, List

import pytest
import torch
from torch import Tensor, nn

import detectron2.modeling
from detectron2.modeling import build_model
from detectron2.structures import Boxes, pairwise_iou

from d2kd import DetectorView
from d2kd.views import find_view
from d2kd.views.anchor_labels import AnchorLabels
from d2kd.views.layout import map_of_rows, rows_of_map
from d2kd.views.recording import Listener
from d2kd.views.towers import depth_of
from tests.helpers.logit_references import decode_map
from tests.helpers.toys import GROUP_NORM, batch, detector_config, noise

needs_fcos = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "FCOS"), reason="this Detectron2 has no FCOS"
)
DENSE = ["retinanet", pytest.param("fcos", marks=needs_fcos)]
CLASSES = 3
EXACT = "donot_use_mm_for_euclid_dist"


def build(name: str, norm: str = "", **overrides: Any) -> nn.Module:
    """Three convolutions in each tower; it predicts boxes of many sizes and many scores."""
    torch.manual_seed(0)
    of_head = {
        f"MODEL__{x}__{key}": value
        for x in ("RETINANET", "FCOS")
        for key, value in (("NUM_CONVS", 3), ("NORM", norm))
    }
    detector = build_model(detector_config(name, **of_head, **overrides)).train()
    for conv in (m for m in detector.head.modules() if isinstance(m, nn.Conv2d)):
        nn.init.normal_(conv.weight, std=0.08)
    # FCOS: the distances from the centre to the four sides, in strides.
    nn.init.constant_(detector.head.bbox_pred.bias, 1.0 if name == "fcos" else 0.0)
    return detector


def build_teacher(name: str, norm: str = "") -> nn.Module:
    return build(name, norm, **GROUP_NORM).eval().requires_grad_(False)


def record(detector: nn.Module, inputs: List[Dict[str, Any]], *requires: str) -> DetectorView:
    view = find_view(detector, "student")(detector, inputs)
    with view.record(frozenset(requires)):
        detector(inputs)
    return view


def view_of_teacher(detector: nn.Module, *requires: str) -> DetectorView:
    return find_view(detector, "teacher")(detector, batch(), frozenset(requires))


# The order of anchors ----------------------------------------------------------------------------


@pytest.mark.parametrize("entries", [1, 3, 4])
def test_rows_are_in_detectron2_s_order_row_column_anchor(entries: int) -> None:
    x = noise(2, 2 * entries, 3, 4)
    rows = rows_of_map(x, entries)
    assert rows.shape == (2, 3 * 4 * 2, entries)
    for n in range(2):
        listed = [
            x[n, a * entries : (a + 1) * entries, i, j]
            for i in range(3)
            for j in range(4)
            for a in range(2)
        ]
        assert torch.equal(rows[n], torch.stack(listed))
    assert torch.equal(map_of_rows(rows, x), x)


def test_labels_are_put_where_detectron2_s_order_has_them() -> None:
    # Two levels, 2 x 3 and 1 x 2 cells, 2 anchors: 16 anchors per image, numbered as they come.
    like = [torch.zeros(2, 8, 2, 3), torch.zeros(2, 8, 1, 2)]
    labels = AnchorLabels.from_lists([torch.arange(16), torch.arange(16) + 100], like, 3)
    assert [tuple(x.shape) for x in labels.maps] == [(2, 2, 2, 3), (2, 2, 1, 2)]
    count = 0
    for maps in labels.maps:
        for i in range(maps.shape[2]):
            for j in range(maps.shape[3]):
                for a in range(2):
                    assert maps[:, a, i, j].tolist() == [count, count + 100]
                    count += 1


def labels_of(*images: List[int], **values: Any) -> AnchorLabels:
    """Of each image 6 anchors of one level and 1 of another; 3 is background."""
    rows = [torch.tensor(x) for x in images]
    like = [torch.zeros(len(images), 1, 2, 3), torch.zeros(len(images), 1, 1, 1)]
    return AnchorLabels.from_lists(rows, like, 3, **values)


def test_positives_are_anchors_on_objects_at_least_one_of_each_image() -> None:
    labels = labels_of([-1, 0, 2, 3, 3, 1, 3], [0, 3, 3, 3, 3, 3, 3])
    assert labels.mean_positives.item() == 4 and labels.level_positives.tolist() == [4, 0]
    labels = labels_of([-1, 0, 2, 3, 3, 1, 2], [-1, 3, 3, 3, 3, 3, 3], [3] * 7)
    assert labels.mean_positives.item() == 6 and labels.level_positives.tolist() == [3, 1]


def test_centerness_is_summed_over_anchors_on_objects_to_at_least_one() -> None:
    nothing = float("nan")  # Detectron2's, outside of objects
    centerness = torch.tensor([[nothing, 0.5, 0.25, nothing, nothing, 0.75, 1.0]])
    on_objects, away = [3, 0, 2, 3, 3, 1, 1], [3] * 7
    assert labels_of(on_objects, centerness=centerness).mean_centerness.item() == 2.5
    assert labels_of(away, centerness=centerness).mean_centerness.item() == 1
    assert labels_of(on_objects).centerness is None


@needs_fcos
def test_centerness_is_what_fcos_tells_its_own_loss() -> None:
    # The square root of how much shorter the near side is than the far one, of both directions.
    view = record(build("fcos"), batch(1, boxes=1), "anchor_labels")
    labels, (box,) = view.anchor_labels(), view.gt_instances[0].gt_boxes.tensor.tolist()
    total = 0.0
    for level, on in zip(range(3, 8), labels.on_objects):
        for _, _, i, j in on.nonzero().tolist():
            x, y = (2**level * (v + 0.5) for v in (j, i))
            sides = (x - box[0], box[2] - x), (y - box[1], box[3] - y)
            total += math.prod(min(pair) / max(pair) for pair in sides) ** 0.5
    assert labels.mean_centerness.item() == pytest.approx(max(total, 1.0), rel=1e-5)
    assert total > 0


# What the student's own loss was told ------------------------------------------------------------


def test_anchor_labels_are_those_of_the_overlap_with_objects() -> None:
    # RetinaNet: from 0.5 on the object's class, below 0.4 background, ignored between them; each
    # object has the anchors that overlap it most, in any case.
    student, inputs = build("retinanet"), batch(boxes=6)
    view = record(student, inputs, "anchor_labels")
    seen = set()
    for n, objects in enumerate(view.gt_instances):
        best = torch.zeros(len(objects))
        overlaps = []
        for level, maps in zip(range(3, 8), view.anchor_labels().maps):
            for i in range(maps.shape[2]):
                for j in range(maps.shape[3]):
                    for a, ratio in enumerate((0.5, 1.0, 2.0)):
                        w, h = 2**level / ratio**0.5, 2**level * ratio**0.5
                        x, y = j * 2**level, i * 2**level
                        anchor = torch.tensor([[x - w / 2, y - h / 2, x + w / 2, y + h / 2]])
                        iou = pairwise_iou(objects.gt_boxes, Boxes(anchor))[:, 0]
                        best = torch.maximum(best, iou)
                        overlaps.append((iou, int(maps[n, a, i, j])))
        for iou, label in overlaps:
            if (iou >= best - 1e-5).any() or (
                iou.max() - torch.tensor([0.4, 0.5])
            ).abs().min() < 1e-4:
                continue  # the best of an object, or too near a threshold to tell
            own = int(objects.gt_classes[iou.argmax()])
            assert label == (own if iou.max() > 0.5 else -1 if iou.max() > 0.4 else CLASSES)
            seen.add(label)
    assert {-1, CLASSES} < seen


@pytest.mark.parametrize("name", DENSE)
def test_student_is_asked_for_its_labels_once_and_is_left_as_it_was(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, answers = build(name), []
    own = type(student).label_anchors

    def counted(*args: Any) -> Any:
        answers.append(own(*args))
        return answers[-1]

    monkeypatch.setattr(type(student), "label_anchors", counted)
    view = record(student, batch(), "anchor_labels")
    assert view.anchor_labels() is view.anchor_labels() and len(answers) == 1
    assert "label_anchors" not in vars(student) and student.label_anchors.__func__ is counted
    rows = torch.cat([rows_of_map(x, 1) for x in view.anchor_labels().maps], dim=1)
    assert torch.equal(rows[..., 0], torch.stack(answers[0][0]))
    assert view.anchor_labels().num_classes == CLASSES


def test_listener_hands_on_every_answer_until_removed() -> None:
    class Owner(nn.Module):
        def double(self, x: int, more: int = 0) -> int:
            return 2 * x + more

    owner, heard = Owner(), []
    listener = Listener(owner, "double", heard.append)
    assert (owner.double(2), owner.double(3, more=1)) == (4, 7) and heard == [4, 7]
    listener.remove()
    assert owner.double(5) == 10 and heard == [4, 7] and "double" not in vars(owner)


def test_labels_that_nobody_asked_to_record_are_refused() -> None:
    view = record(build("retinanet"), batch(), "dense")
    with pytest.raises(RuntimeError, match="student's 'anchor_labels' was not recorded"):
        view.anchor_labels()


# Boxes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", DENSE)
def test_boxes_are_decoded_as_the_equations_say(name: str) -> None:
    view = view_of_teacher(build_teacher(name))
    deltas = [x * 2 for x in view.dense().deltas]
    for level, x, found in zip(range(3, 8), deltas, view.boxes(deltas)):
        ratios = [1.0] if name == "fcos" else [0.5, 1.0, 2.0]
        sizes = [(2**level / r**0.5, 2**level * r**0.5) for r in ratios]
        expected = decode_map(x, 2**level, sizes, name == "fcos")
        assert found.shape == x.shape
        torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", DENSE)
def test_every_detection_is_a_decoded_box_cut_to_its_image(name: str) -> None:
    detector = build_teacher(name)
    detector.test_score_thresh, detector.test_nms_thresh = 0.0, 1.0
    view = view_of_teacher(detector)
    boxes = torch.cat([rows_of_map(x, 4) for x in view.boxes(view.dense().deltas)], dim=1)
    for image, found in zip(boxes, detector(batch())):
        detections = found["instances"].pred_boxes.tensor
        assert len(detections) > 20
        nearest = torch.cdist(detections, image.clamp(0, 64), compute_mode=EXACT).min(dim=1).values
        assert nearest.max() < 1e-3


@pytest.mark.parametrize("name", DENSE)
def test_boxes_are_float32_under_autocast_and_carry_a_gradient(name: str) -> None:
    view = view_of_teacher(build_teacher(name))
    deltas = [x.bfloat16().requires_grad_() for x in view.dense().deltas]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        boxes = view.boxes(deltas)
    assert all(x.dtype == torch.float32 for x in boxes)
    sum(x.sum() for x in boxes).backward()
    assert all(x.grad.abs().sum() > 0 for x in deltas)


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_detections_in_half_precision_are_not_rounded(name: str) -> None:
    # bfloat16 knows no number between 1008 and 1012.
    detector, limits = build_teacher(name), torch.tensor([1088.0, 64.0]).repeat(2)
    detector.test_score_thresh, detector.test_nms_thresh = 0.0, 1.0
    inputs = batch(num_images=1, height=64, width=1088)
    view = find_view(detector, "teacher")(detector, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        detections = view.detections()[0].pred_boxes.tensor
        boxes = view.boxes(view.dense().deltas)
    boxes = torch.cat([rows_of_map(x, 4)[0] for x in boxes]).clamp(min=0).minimum(limits)
    assert len(detections) > 20 and detections[:, 0].max() > 512
    assert torch.cdist(detections, boxes, compute_mode=EXACT).min(dim=1).values.max() < 1e-3
    assert not detector.head._forward_hooks, "the detector is left as it was"


# Towers ------------------------------------------------------------------------------------------


def tower_by_hand(subnet: nn.Sequential, x: Tensor, depth: int) -> Tensor:
    """Convolution, norm, ReLU, ... up to the convolution number `depth` and its norm."""
    done = 0
    for module in subnet:
        if isinstance(module, nn.ReLU):
            done += 1
            if done == depth:
                return x
            x = x.clamp(min=0)
        else:
            x = module(x)
    raise AssertionError(f"only {done} convolutions")


@pytest.mark.parametrize("norm", ["", "GN"])
@pytest.mark.parametrize("name", DENSE)
def test_towers_are_those_of_a_pass_by_hand(name: str, norm: str) -> None:
    inputs = batch()
    student, teacher = build(name, norm), build_teacher(name, norm)
    assert depth_of(student.head) == 3
    names = [f"tower_{depth}" for depth in (1, 2, 3)]
    for view in record(student, inputs, *names), view_of_teacher(teacher, *names):
        for depth in (1, 2, 3):
            towers, head = view.towers(depth), view.detector.head
            for subnet, found in (
                (head.cls_subnet, towers.classes),
                (head.bbox_subnet, towers.boxes),
            ):
                assert len(found) == 5
                for x, level in zip(found, view.features.values()):
                    assert torch.equal(x, tower_by_hand(subnet, level, depth))
                    assert x.requires_grad == (view.detector is student)
    assert any((x < 0).any() for x in view.towers(1).classes), "before the activation"


@pytest.mark.parametrize("norm", ["", "GN", "BN"])
@pytest.mark.parametrize("name", DENSE)
def test_rest_of_a_head_makes_its_own_predictions_of_its_own_towers(name: str, norm: str) -> None:
    view = view_of_teacher(build_teacher(name, norm), "dense", "tower_1", "tower_2", "tower_3")
    dense = view.dense()
    for depth in (1, 2, 3):
        found = view.predict_from(depth, view.towers(depth))
        assert found.levels == dense.levels and found.tower == []
        for key in ("logits", "deltas") + (("centerness",) if name == "fcos" else ()):
            for x, expected in zip(getattr(found, key), getattr(dense, key)):
                assert torch.equal(x, expected), (depth, key)
        assert (found.centerness is None) == (name == "retinanet")


@pytest.mark.parametrize("name", DENSE)
def test_rest_of_a_frozen_head_hands_the_gradient_on(name: str) -> None:
    view = view_of_teacher(build_teacher(name), "tower_2")
    towers = view.towers(2)
    for x in towers.classes + towers.boxes:
        x.requires_grad_()
    found = view.predict_from(2, towers)
    sum(x.sum() for x in found.logits + found.deltas).backward()
    assert all(x.grad.abs().sum() > 0 for x in towers.classes + towers.boxes)
    assert all(p.grad is None for p in view.detector.parameters())


def test_teacher_that_was_told_runs_its_head_once_and_one_that_was_not_again() -> None:
    detector, calls = build_teacher("retinanet"), []
    detector.head.register_forward_hook(lambda *_: calls.append(1))
    told, untold = view_of_teacher(detector, "dense", "tower_2"), view_of_teacher(detector, "dense")
    told.dense()
    expected = told.towers(2)
    assert len(calls) == 1
    logits = untold.dense().logits
    found = untold.towers(2)
    assert len(calls) == 3 and untold.towers(2) is found and len(calls) == 3
    for x, y in zip(found.classes + found.boxes, expected.classes + expected.boxes):
        assert torch.equal(x, y)
    assert all(torch.equal(x, y) for x, y in zip(untold.dense().logits, logits))
    assert not any(m._forward_pre_hooks for m in detector.modules())


def test_tower_that_was_not_recorded_of_a_student_is_refused() -> None:
    view = record(build("retinanet"), batch(), "tower_1")
    assert len(view.towers(1).classes) == 5 and len(view.dense().logits) == 5
    with pytest.raises(RuntimeError, match="student's 'tower_2' was not recorded .*`requires`"):
        view.towers(2)


def test_head_without_towers_has_none_and_its_detector_can_still_be_distilled() -> None:
    student = build_model(detector_config("retinanet"))
    student.head = torch.nn.Module()
    student.head.cls_score = torch.nn.Conv2d(32, 9, 1)
    assert depth_of(student.head) == 0
    provides = find_view(student, "student")(student).provides
    assert "features" in provides and not any(x.startswith("tower") for x in provides)
