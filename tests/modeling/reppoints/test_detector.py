"""RepPoints from YAML: built, trained, tested, refused."""

import math
from typing import Any, Dict, List

import pytest
import torch
from torch import nn

from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.detectors import enliven
from d2kd.conformance.half_precision import runs_in_float16
from d2kd.conformance.suite import has_gloo
from d2kd.conformance.two_processes import check_processes
from d2kd.modeling.reppoints.cells import cells_of
from d2kd.modeling.reppoints.inference import detect
from d2kd.modeling.reppoints.targets import init_targets
from tests.helpers.runs import (
    SHAPES_CLASSES,
    assert_same_tensors,
    interrupt,
    run,
    run_config,
    saved,
)
from tests.helpers.toys import batch, detector_config, noise

LOSSES = {"loss_cls", "loss_box_init", "loss_box_refine"}


def build(**overrides: Any) -> nn.Module:
    torch.manual_seed(0)
    return build_model(detector_config("reppoints", **overrides)).train()


def losses_of(model: nn.Module, inputs: List[Dict[str, Any]]) -> Dict[str, torch.Tensor]:
    with EventStorage():
        return model(inputs)


def test_yaml_decides() -> None:
    model = build(
        MODEL__REPPOINTS__NUM_CONVS=2,
        MODEL__REPPOINTS__PRIOR_PROB=0.2,
        MODEL__REPPOINTS__NMS_THRESH_TEST=0.3,
    )
    assert (model.num_classes, model.test_nms_thresh, model.device.type) == (3, 0.3, "cpu")
    assert torch.allclose(model.head.cls_score.bias.sigmoid(), torch.tensor(0.2))
    towers = [*model.head.cls_subnet, *model.head.bbox_subnet]
    kinds = [type(x) for x in towers]
    assert kinds == [nn.Conv2d, nn.GroupNorm, nn.ReLU] * 4
    assert all(x.bias is None for x in towers[::3])


@pytest.mark.parametrize("boxes", [2, 0])
def test_every_parameter_learns_whether_or_not_there_are_boxes(boxes: int) -> None:
    model = build()
    losses = losses_of(model, batch(boxes=boxes))
    assert set(losses) == LOSSES and all(x.isfinite() for x in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    if not boxes:
        assert losses["loss_box_init"] == losses["loss_box_refine"] == 0 < losses["loss_cls"]


def test_losses_are_the_weighted_sums_of_their_cells() -> None:
    """Against one cell and one coordinate at a time, in float64."""
    model = build(MODEL__REPPOINTS__INIT_LOSS_WEIGHT=0.3, MODEL__REPPOINTS__REFINE_LOSS_WEIGHT=0.7)
    anchors = model.anchor_generator([torch.zeros(1, 1, v, v) for v in (8, 4, 2, 1, 1)])
    cells = cells_of(anchors, [(64, 32), (64, 64)], 32)
    gt = [x["instances"] for x in batch(2)]
    gt[1] = gt[1][:0]  # an image without boxes
    corners = cells.corners.double().repeat(1, 2)
    logits, boxes, init = (noise(2, 86, k, seed=i) for i, k in enumerate((3, 4, 4)))
    boxes, init = (corners + 8 * x.abs() * torch.tensor([-1, -1, 1, 1]) for x in (boxes, init))
    found = model.losses([logits], [boxes], [init], cells, gt)

    labels, gt_boxes = model.label_anchors(init, cells, gt)
    on_init, init_gt = init_targets(cells, gt, 4.0)
    assert on_init[0].any() and not on_init[1].any() and (labels[0] < 0).any()
    on_objects = torch.stack([(x >= 0) & (x < 3) for x in labels])
    expected = {"loss_cls": 0.0, "loss_box_init": 0.0, "loss_box_refine": 0.0}
    for image in range(2):
        for cell in range(86):
            label, unit = int(labels[image][cell]), 4 * float(cells.strides[cell])
            for k, x in enumerate(logits[image, cell].tolist() if label >= 0 else []):
                p = 1 / (1 + math.exp(-x))
                expected["loss_cls"] -= (
                    0.25 * (1 - p) ** 2 * math.log(p)
                    if k == label
                    else 0.75 * p**2 * math.log(1 - p)
                )
            for name, weight, on, ours, wanted in (
                ("loss_box_init", 0.3, on_init, init, init_gt),
                ("loss_box_refine", 0.7, on_objects, boxes, gt_boxes),
            ):
                if on[image, cell]:
                    for d in ((ours - wanted)[image, cell].abs() / unit).tolist():
                        expected[name] += weight * (d**2 / 0.22 if d < 0.11 else d - 0.055)
    positives = int(on_objects[0].sum()) + 1
    expected["loss_cls"] /= positives
    expected["loss_box_refine"] /= positives
    expected["loss_box_init"] /= int(on_init[0].sum()) + 1
    assert {k: float(v) for k, v in found.items()} == pytest.approx(expected, rel=1e-6)


def test_classes_and_refined_boxes_move_the_initial_points_by_a_tenth_and_not_at_all() -> None:
    head, found = build(MODEL__REPPOINTS__NORM="").head, []
    x = torch.rand(1, 32, 6, 6)
    for loss in (0, 1):  # of the classes, of the refined boxes
        bias = head.init_points[-1].bias
        points = head.init_points(x).detach()
        free = points.clone().requires_grad_()
        values = head.cls_conv if loss == 0 else head.refine_conv
        last = head.cls_score if loss == 0 else head.refine_points
        wanted = last(values(x, free))
        direct = wanted if loss == 0 else head.to_box(points + wanted)
        direct.square().sum().backward()
        bias.grad = None
        head.predict(x, x)[loss].square().sum().backward()
        found.append(bias.grad)
        assert torch.allclose(bias.grad, 0.1 * free.grad.sum(dim=(0, 2, 3)), rtol=1e-3, atol=1e-9)
    assert all(x.abs().max() > 0 for x in found)


class Alone:
    """A detector without a teacher in the place of a pair of two."""

    def __init__(self, detector: nn.Module):
        self.distiller = detector
        detector.heads = nn.ModuleDict()  # for distillation


@pytest.mark.skipif(not has_gloo, reason="this torch has no gloo")
def test_two_processes_one_without_boxes_stay_equal() -> None:
    model = build()
    enliven(model)
    check_processes(Alone(model))


@pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
@pytest.mark.parametrize("boxes", [2, 0])
def test_trains_under_float16_autocast(boxes: int) -> None:
    model = build()
    with cuda_autocast():
        losses = losses_of(model, batch(boxes=boxes))
    assert all(x.dtype == torch.float32 and x.isfinite() for x in losses.values()), losses
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_detects_inside_the_image_at_the_size_that_is_asked() -> None:
    model = build(MODEL__REPPOINTS__SCORE_THRESH_TEST=0.0).eval()
    inputs = [{**x, "height": 128, "width": 96} for x in batch()]
    for found in model(inputs):
        found = found["instances"]
        assert found.image_size == (128, 96) and 0 < len(found) <= 100
        assert (found.pred_boxes.tensor <= torch.tensor([96, 128] * 2)).all()
        assert set(found.get_fields()) == {"pred_boxes", "scores", "pred_classes"}


def test_detections_are_the_best_without_duplicates_of_their_class() -> None:
    boxes = torch.tensor([[0.0, 0, 10, 10], [0.0, 0, 10, 11], [20.0, 20, 90, 30], [1.0, 1, 2, 2]])
    scores = torch.tensor([[0.9, 0.0], [0.8, 0.7], [0.0, 0.6], [0.04, 0.04]])
    found = detect([scores], [boxes], (40, 50), 0.05, 1000, 0.5, 100)
    assert torch.equal(found.scores, torch.tensor([0.9, 0.7, 0.6]))
    assert found.pred_classes.tolist() == [0, 1, 1]
    assert found.pred_boxes.tensor[2].tolist() == [20, 20, 50, 30]  # clipped
    assert len(detect([scores], [boxes], (40, 50), 0.05, 1, 0.5, 100)) == 1
    assert len(detect([scores], [boxes], (40, 50), 0.05, 1000, 0.5, 2)) == 2
    assert len(detect([scores * 0], [boxes], (40, 50), 0.05, 1000, 0.5, 2)) == 0


def test_padding_of_a_batch_changes_nothing_of_what_a_small_image_learns() -> None:
    """Cells beyond an image are labelled -1, those on it as if it were alone."""
    model = build()
    small, large = batch(2)
    small["image"] = small["image"][:, :32, :32]
    small["instances"] = Instances((32, 32))
    small["instances"].gt_boxes = Boxes(torch.tensor([[4.0, 4.0, 28.0, 28.0]]))
    small["instances"].gt_classes = torch.tensor([1])
    answers: List[Any] = []
    original = model.label_anchors
    model.label_anchors = lambda *args: answers.append(original(*args)) or answers[-1]
    losses_of(model, [small, large])
    labels = answers[0][0][0][:64].view(8, 8)  # of p3
    assert (labels[4:] == -1).all() and (labels[:, 4:] == -1).all()
    assert not (answers[0][0][1] == -1).all()


def test_run_is_the_same_when_it_is_interrupted_and_resumed(tmp_path: Any) -> None:
    opts = {"MODEL__REPPOINTS__NUM_CLASSES": SHAPES_CLASSES, "MODEL__REPPOINTS__NORM": ""}
    opts["VIS_PERIOD"] = 2
    whole = run_config(tmp_path, student="reppoints", **opts, OUTPUT_DIR=f"{tmp_path}/whole")
    trainer = run(whole)
    assert LOSSES <= set(trainer.storage.histories())
    parts = run_config(tmp_path, student="reppoints", **opts, OUTPUT_DIR=f"{tmp_path}/parts")
    interrupt(parts, 2)
    run(parts, resume=True)
    assert_same_tensors(saved(parts)["model"], saved(whole)["model"])


@pytest.mark.parametrize(
    "key, value, why",
    [
        ("NUM_CLASSES", 0, r"NUM_CLASSES must be in \[1, 1000000\], got 0"),
        ("SMOOTH_L1_LOSS_BETA", -1.0, "SMOOTH_L1_LOSS_BETA must be 0 or above, got -1"),
        ("IN_FEATURES", ["p9"], r"IN_FEATURES must name levels of .*p3.*, got \['p9'\]"),
        ("IN_FEATURES", ["p3", "p5"], r"IN_FEATURES is \['p3', 'p5'\], with strides \[8, 32\]"),
    ],
)
def test_wrong_value_is_refused(key: str, value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=f"MODEL.REPPOINTS.{why}"):
        build(**{f"MODEL__REPPOINTS__{key}": value})
