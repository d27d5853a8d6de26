"""Box heads that ask of each class by itself: nothing reads the column that they do not train."""

import math
from pathlib import Path
from typing import Any, Dict, List, Tuple

import pytest
import torch
from torch import Tensor, nn

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from d2kd.distiller import Distiller
from d2kd.heads.registry import head_class, head_names
from d2kd.layers import class_divergence
from d2kd.pairing.pair import TWO_STAGE
from d2kd.views import CommonClassesView, MergeClasses
from d2kd.views.predictions import RoIPredictions
from tests.helpers.logit_references import binary_cross_entropy, sigmoid
from tests.helpers.toys import NUM_CLASSES, batch, distill_config, noise, write_teacher

KEY = "MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE"
needs_the_key = pytest.mark.skipif(
    "USE_SIGMOID_CE" not in get_cfg().MODEL.ROI_BOX_HEAD, reason="came after Detectron2 0.6"
)
HEADS = ["DIST", "MLD", "RoICls", "RoILoc"]


def build(folder: Path, head: str, student: bool = True, teacher: bool = True) -> Distiller:
    opts = write_teacher(folder, "faster_rcnn", **{KEY: teacher})
    values = {KEY: student, "DISTILL__MLD__GUIDE": "logits"}
    return build_model(distill_config("faster_rcnn", opts, [head], **values)).train()


def terms(distiller: Distiller) -> Dict[str, float]:
    torch.manual_seed(1)
    with EventStorage():
        losses = distiller(batch())
    return {k: losses[k].item() for k in distiller.last_step.losses}


def set_background(detector: nn.Module, value: float) -> None:
    layer = detector.roi_heads.box_predictor.cls_score
    layer.weight.data[-1] = value
    layer.bias.data[-1] = value


@needs_the_key
@pytest.mark.parametrize("head", HEADS)
def test_the_column_of_background_changes_nothing(head: str, tmp_path: Path) -> None:
    distiller = build(tmp_path, head)
    before = terms(distiller)
    set_background(distiller.student, 0.7)
    set_background(distiller.teacher.model, -3.0)
    assert terms(distiller) == before and max(before.values()) > 0


@needs_the_key
@pytest.mark.parametrize("head", HEADS)
def test_the_column_of_background_gets_no_gradient_from_a_head(head: str, tmp_path: Path) -> None:
    distiller = build(tmp_path, head)
    with EventStorage():
        losses = distiller(batch())
    sum(losses[k] for k in distiller.last_step.losses).backward()
    predictor = distiller.student.roi_heads.box_predictor
    trained = predictor.bbox_pred if head == "RoILoc" else predictor.cls_score
    assert trained.weight.grad.abs().sum() > 0
    assert predictor.cls_score.weight.grad is None or not predictor.cls_score.weight.grad[-1].any()


@needs_the_key
def test_head_that_is_defined_on_a_softmax_is_refused_by_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE True") as error:
        build(tmp_path, "DKD")
    text = str(error.value)
    assert "DKD takes class probabilities from a softmax" in text
    assert "RoICls" in text.split("Heads that fit")[1]


@needs_the_key
@pytest.mark.parametrize("head", [*HEADS, "DKD"])
@pytest.mark.parametrize("student", [True, False])
def test_softmax_beside_sigmoids_is_refused(head: str, student: bool, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="USE_SIGMOID_CE alike in both"):
        build(tmp_path, head, student, not student)


@needs_the_key
def test_heads_on_features_go_on(tmp_path: Path) -> None:
    assert terms(build(tmp_path, "RoIFI", student=True, teacher=False))


def test_every_head_that_reads_box_classifiers_has_said_of_which_kind() -> None:
    known = {x for x in head_names() if hasattr(head_class(x), "class_activations")}
    reads = {
        x
        for x in head_names()
        if getattr(head_class(x), "requires_logits", False)
        and getattr(head_class(x), "pairs", set()) & TWO_STAGE
    }
    assert known == set(HEADS) and reads == {*HEADS, "DKD", "RoIMask"}  # whose logits are masks


# Arithmetic --------------------------------------------------------------------------------------


def test_divergence_of_sigmoids_is_summed_over_classes() -> None:
    x, target = noise(4, 3, seed=1) * 3, noise(4, 3, seed=2) * 3
    found = class_divergence(x, target, "sigmoid").sum(dim=1)
    for i in range(4):
        # KL(p || q) = BCE(x, p) - BCE(t, p), where p is the sigmoid of t
        expected = sum(
            binary_cross_entropy(a, sigmoid(b)) - binary_cross_entropy(b, sigmoid(b))
            for a, b in zip(x[i].tolist(), target[i].tolist())
        )
        assert found[i].item() == pytest.approx(expected, rel=1e-4)
    assert not class_divergence(x, x, "sigmoid").any()


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
def test_divergence_is_finite_at_any_logits(activation: str) -> None:
    x = torch.tensor([[120.0, -120.0, 120.0]], requires_grad=True)
    loss = class_divergence(x, -x.detach(), activation).sum()
    loss.backward()
    # Of sigmoids each class is wrong by 120 nats; of a softmax -120 has all, half of it or none.
    assert loss.item() == pytest.approx(360 if activation == "sigmoid" else 240, abs=1)
    assert x.grad.isfinite().all() and x.grad.any()


def test_probabilities_are_of_the_kind_of_the_detector() -> None:
    logits = torch.tensor([[0.0, math.log(3)]])
    softmax = RoIPredictions(logits, logits, logits)
    sigmoids = RoIPredictions(logits, logits, logits, "sigmoid")
    torch.testing.assert_close(softmax.probabilities(), torch.tensor([[0.25, 0.75]]))
    torch.testing.assert_close(sigmoids.probabilities(), torch.tensor([[0.5, 0.75]]))
    # log(9) / 2 is log(3).
    torch.testing.assert_close(
        RoIPredictions(logits, 2 * logits, logits, "sigmoid").probabilities(temperature=2.0),
        torch.tensor([[0.5, 0.75]]),
    )


def common_view(logits: Tensor, deltas: Tensor) -> CommonClassesView:
    """Classes 0 and 2 of three are joined; class 1 is left out."""

    class View:
        two_stage = True

        def roi_predictions(self, boxes: Any = None) -> RoIPredictions:
            return RoIPredictions(logits, logits, deltas, "sigmoid")

        def _once(self, question: Any, compute: Any) -> Any:
            return compute()

    merge = MergeClasses([[0, 2]], num_classes=NUM_CLASSES)
    return CommonClassesView(View(), merge, merge)


def test_joined_classes_are_as_likely_as_the_likeliest() -> None:
    logits = torch.tensor([[1.0, 9.0, -2.0], [0.0, 9.0, 3.0]])
    # By class: boxes (0,0,0,0), (5,5,5,5), (8,8,8,8)
    deltas = torch.tensor([0.0, 5.0, 8.0]).repeat_interleave(4).expand(2, 12)
    found = common_view(logits, deltas).roi_predictions()
    assert found.activation == "sigmoid" and found.logits.tolist() == [[1.0], [3.0]]
    shares: List[Tuple[float, float]] = [(sigmoid(a), sigmoid(c)) for a, _, c in logits.tolist()]
    expected = [8 * c / (a + c) for a, c in shares]
    assert found.deltas[:, 0].tolist() == pytest.approx(expected, rel=1e-5)
