"""A teacher with its options says what it says without them, in losses and in gradients."""

import logging
from typing import Dict, List

import pytest
import torch
from torch import Tensor, nn

from detectron2.structures import Boxes

from d2kd import Distiller
from d2kd.conformance.case import PAIRS, Case, find_case
from d2kd.conformance.cuda_autocast import cuda_autocast
from d2kd.conformance.half_precision import relative_error, runs_in_float16
from d2kd.teacher import TeacherOptions, compiled
from d2kd.teacher.speed_up import with_options
from tests.helpers.toys import batch

RETINANETS, RCNNS, TO_DENSE, TO_RCNN = PAIRS[:4]
# Options to how far gradients may be off, of their norm
OPTIONS = {
    "fold_norms": (TeacherOptions(fold_norms=True), 1e-3),
    "channels_last": (TeacherOptions(channels_last=True), 1e-3),
    "both": (TeacherOptions(fold_norms=True, channels_last=True), 1e-3),
    "float32": (TeacherOptions(precision="float32"), 0),
    "bfloat16": (TeacherOptions(fold_norms=True, precision="bfloat16"), 0.1),
    "device": (TeacherOptions(device="cpu"), 0),
}


def with_teacher(case: Case, options: TeacherOptions) -> Distiller:
    distiller = case.fresh()
    lesson = distiller.lessons[0]
    object.__setattr__(lesson, "teacher", with_options(lesson.teacher, options))
    return distiller


def gradients(case: Case, distiller: Distiller) -> List[Tensor]:
    """Of the head's terms alone, in the student's pyramid."""
    terms: Dict[str, Tensor] = case.terms(distiller)
    features = list(distiller.last_step.student.features.values())
    found = torch.autograd.grad(sum(terms.values()), features, allow_unused=True)
    return [*terms.values(), *(x for x in found if x is not None)]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    "name, pair", [("PKD", TO_DENSE), ("CrossKD", RETINANETS), ("DKD", RCNNS), ("SGFI", TO_RCNN)]
)
def test_head_learns_the_same(name: str, pair: object, options: str) -> None:
    case, (chosen, bound) = find_case(name, pair), OPTIONS[options]
    distiller = with_teacher(case, chosen)
    expected, found = (gradients(case, x) for x in (case.fresh(), distiller))
    assert len(found) == len(expected) > 1
    assert relative_error(expected, found) <= bound
    teacher = distiller.teacher.model
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())


def test_teacher_with_a_device_of_its_own_stays_there() -> None:
    distiller = with_teacher(find_case("PKD", RETINANETS), TeacherOptions(device="cpu"))
    distiller.to("meta")  # a second device that every machine has
    assert {p.device.type for p in distiller.student.parameters()} == {"meta"}
    assert {p.device.type for p in distiller.teacher.model.parameters()} == {"cpu"}


def test_own_detections_are_of_the_boxes_and_not_of_rounded_ones() -> None:
    # bfloat16 knows no number between 1008 and 1012.
    boxes = [Boxes(torch.tensor([[1010.0, 10.0, 1034.0, 30.0]]))]
    plain = find_case("DKD", RCNNS).fresh().teacher
    teacher = with_options(plain, TeacherOptions(precision="bfloat16"))
    pooler = teacher.model.roi_heads.box_pooler
    maps = [torch.rand(1, 2, 64, 300).bfloat16() for _ in pooler.level_poolers]
    with teacher.autocast():
        assert torch.equal(pooler(maps, boxes), pooler([x.float() for x in maps], boxes))


def test_teacher_of_the_copy_is_another() -> None:
    case = find_case("PKD", RETINANETS)
    plain = case.fresh().teacher
    before = {k: v.clone() for k, v in plain.model.state_dict().items()}
    with_options(plain, TeacherOptions(fold_norms=True, precision="bfloat16"))
    after = plain.model.state_dict()
    assert list(after) == list(before) and plain.dtype is None
    assert all(torch.equal(v, before[k]) for k, v in after.items())


def test_nothing_to_fold_is_said(caplog: pytest.LogCaptureFixture) -> None:
    folded = with_options(find_case("PKD", RETINANETS).fresh().teacher, OPTIONS["fold_norms"][0])
    assert "no norm" not in caplog.text
    with_options(folded, OPTIONS["fold_norms"][0])
    assert "FOLD_NORMS: the teacher has no norm that can be folded" in caplog.text


@pytest.mark.skipif(not runs_in_float16(), reason="this PyTorch has no float16 on CPUs")
@pytest.mark.parametrize("precision", ["", "float32"])
def test_own_precision_counts_under_the_student_s_mixed_precision(precision: str) -> None:
    case = find_case("PKD", RETINANETS)
    distiller = with_teacher(case, TeacherOptions(precision=precision))
    with torch.no_grad():
        plain = case.fresh().view_of_teacher(batch()).features["p4"]
        with cuda_autocast():
            found = distiller.view_of_teacher(batch()).features["p4"]
    assert found.dtype == (torch.float32 if precision else torch.float16)
    assert torch.equal(found, plain) == bool(precision)


@pytest.mark.parametrize("precision", ["", "float32", "bfloat16"])
def test_maps_are_float32_of_a_precision_of_its_own_and_else_as_they_are(precision: str) -> None:
    options = TeacherOptions(channels_last=True, precision=precision)
    distiller = with_teacher(find_case("PKD", RETINANETS), options)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = distiller.view_of_teacher(batch()).features["p4"]
    assert found.dtype == (torch.float32 if precision else torch.bfloat16)


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Conv2d(3, 4, 3)


def test_graphs_are_counted_and_one_for_each_size_is_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")  # traced, and run as it is
    caplog.set_level("INFO", logger="d2kd")
    detector, x = Detector().requires_grad_(False), torch.ones(2, 3, 8, 8)
    expected, names = detector.backbone(x), list(detector.state_dict())
    backbone = compiled.CompiledBackbone(detector)
    assert torch.equal(detector.backbone(x), expected) and backbone.graphs == 1
    assert list(detector.state_dict()) == names
    graph = torch.fx.symbolic_trace(nn.Identity())
    for size in range(compiled.EXPECTED_GRAPHS):
        backbone._compile(graph, [torch.zeros(2, 3, 64, 32 * size)])
    levels = [x.levelno for x in caplog.records]
    assert levels == [logging.INFO] * compiled.EXPECTED_GRAPHS + [logging.WARNING]
    assert "graph 4, for (2, 3, 64, 64). If this goes on" in caplog.text


class Tokens(nn.Module):
    """Of what comes behind the break, which has no map of four dimensions, a graph of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.norm = nn.Conv2d(3, 8, 4, 4), nn.BatchNorm2d(8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.patches(x)).flatten(2).transpose(1, 2)
        torch._dynamo.graph_break()
        return self.linear(x)


def test_graph_is_told_by_what_it_is_given_and_not_by_a_weight(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "eager")
    caplog.set_level("INFO", logger="d2kd")
    detector, x = Detector(), torch.rand(2, 3, 8, 12)
    detector.backbone = Tokens().eval().requires_grad_(False)
    expected = detector.backbone(x)
    backbone = compiled.CompiledBackbone(detector)
    assert torch.equal(detector.backbone(x), expected) and backbone.graphs == 2
    assert "graph 1, for (2, 3, 8, 12)." in caplog.text
    assert "graph 2, for (2, 6, 8)." in caplog.text
