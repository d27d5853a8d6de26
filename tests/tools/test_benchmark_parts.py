"""What the benchmark measures: the pairs of detectors, and arms that share them."""

from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Any, Callable, Dict, List

import pytest
import torch
from torch import nn

from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage

from d2kd import load_config
from d2kd.views import Regions, RegionSampler, dense
from d2kd.views.map_tensors import map_tensors


@pytest.fixture
def parts(tool: Callable[[str], ModuleType]) -> ModuleType:
    return tool("benchmark_parts")


def test_one_student_and_one_teacher_for_all_arms(
    parts: ModuleType,
    small_args: Callable[..., Namespace],
    config_file: Callable[[str, str], str],
) -> None:
    cfg = parts.build_config(small_args("--config-file", config_file("retinanet", "retinanet")), "")
    whole = build_model(cfg)
    ones = [parts.with_heads(cfg, whole, [name]) for name in ("MGD", "PKD")]
    assert all(x.student is whole.student and x.teacher is whole.teacher for x in ones)
    assert [list(x.heads) for x in ones] == [["MGD"], ["PKD"]]


def test_student_alone_is_refused(
    parts: ModuleType, small_args: Callable[..., Namespace], tmp_path: Path
) -> None:
    (tmp_path / "alone.yaml").write_text("MODEL: {META_ARCHITECTURE: RetinaNet}\nVERSION: 2\n")
    args = small_args("--config-file", str(tmp_path / "alone.yaml"), "--heads", "PKD")
    with pytest.raises(ValueError, match="alone.yaml trains a student alone"):
        parts.build_config(args, "")


def test_head_alone_reaches_the_head_and_not_the_student(
    parts: ModuleType,
    small_args: Callable[..., Namespace],
    config_file: Callable[[str, str], str],
) -> None:
    args = small_args("--config-file", config_file("retinanet", "retinanet"))
    cfg = parts.build_config(args, "")
    whole = build_model(cfg).train()
    parts.calm(whole)
    with EventStorage():
        distiller = parts.with_heads(cfg, whole, ["MGD"])
        batch = parts.random_batch(whole.student, args)
        parts.HeadAlone(cfg, distiller, batch)()
    assert all(p.grad is not None for p in distiller.heads.parameters())
    assert all(p.grad is None for p in whole.student.parameters())


def test_heads_measured_together_share_what_they_ask_of_the_teacher(
    parts: ModuleType,
    small_args: Callable[..., Namespace],
    config_file: Callable[[str, str], str],
) -> None:
    path = config_file("faster_rcnn", "faster_rcnn")
    args = small_args("--config-file", path, "--heads", "DKD", "DKD+DIST")
    cfg = parts.build_config(args, "")
    assert cfg.DISTILL.HEADS == ["DKD", "DIST"]
    with EventStorage():
        arms = parts.build_arms(cfg, args)
        both = arms["head DKD+DIST"]()
        calls = count_calls({"box head": both.teacher.detector.roi_heads.box_head})
        both()
    assert list(both.heads) == ["DKD", "DIST"] and calls == ["box head"]
    assert {"with DKD", "with DKD+DIST", "head DKD"} < set(arms)


def count_calls(modules: Dict[str, nn.Module]) -> List[str]:
    """Names of modules, one for each call of theirs from now on."""
    calls: List[str] = []
    for name, module in modules.items():
        module.register_forward_hook(lambda *_, name=name: calls.append(name))
    return calls


@pytest.mark.parametrize(
    "student, name, asked",
    [
        ("retinanet", "SGFI", ["pooler"]),
        ("retinanet", "CKD", ["pooler", "box head"]),
        ("faster_rcnn", "SGFI", ["pooler"]),
        ("faster_rcnn", "CKD", ["pooler", "box head"]),
        ("faster_rcnn", "RoIFI", ["pooler"]),
        ("faster_rcnn", "RoICls", ["pooler", "box head"]),
        ("faster_rcnn", "RoILoc", ["pooler", "box head"]),
    ],
)
def test_head_alone_asks_the_teacher_in_every_call(
    head_alone: Callable[..., Any], student: str, name: str, asked: List[str]
) -> None:
    alone = head_alone(student, "faster_rcnn", name)
    teacher = alone.teacher.detector
    roi_heads = teacher.roi_heads
    calls = count_calls(
        {
            "backbone": teacher.backbone,  # features are the teacher's arm
            "pooler": roi_heads.box_pooler,
            "box head": roi_heads.box_head,
            "student": alone.student.detector.backbone,
        }
    )
    alone()
    assert calls == asked
    alone()
    assert calls == 2 * asked


def test_head_alone_keeps_the_regions_of_a_two_stage_student(
    head_alone: Callable[..., Any], parts: ModuleType
) -> None:
    alone = head_alone("faster_rcnn", "faster_rcnn", "RoIFI")
    calls = count_calls({"pooler": alone.student.detector.roi_heads.box_pooler})
    alone()
    views = [parts.detached(alone.student) for _ in range(2)]
    boxes = [view.regions().boxes for view in views]
    pooled = [view.roi_features(x) for view, x in zip(views, boxes)]
    assert calls == []
    assert len(views[0].regions()) == 32 == len(pooled[0])
    assert boxes[0] is boxes[1]
    # Leaves that a gradient reaches, in each step others.
    assert all(x.is_leaf and x.requires_grad and x.grad is None for x in pooled)
    assert pooled[0] is not pooled[1] and torch.equal(*pooled)
    # And they are what the student's own forward pooled.
    fresh = alone.student.detector.roi_heads.box_pooler
    features = [views[0].features[k] for k in ("p2", "p3", "p4", "p5")]
    assert torch.equal(fresh(features, boxes[0]), pooled[0])


def test_gradient_reaches_what_a_two_stage_student_pooled(
    head_alone: Callable[..., Any], parts: ModuleType
) -> None:
    alone = head_alone("faster_rcnn", "faster_rcnn", "RoIFI")
    view = parts.detached(alone.student)
    alone.heads["RoIFI"](view, parts.detached(alone.teacher))["loss_roifi"].backward()
    assert view.roi_features(view.regions().boxes).grad.abs().sum() > 0
    assert all(x.grad is None for x in view.features.values())


def test_head_alone_draws_the_regions_of_a_dense_student_in_every_call(
    head_alone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = head_alone("retinanet", "faster_rcnn", "SGFI")
    drawn: List[Regions] = []
    sample = dense.sample_regions

    def spy(view: Any, sampler: RegionSampler) -> Regions:
        drawn.append(sample(view, sampler))
        return drawn[-1]

    monkeypatch.setattr(dense, "sample_regions", spy)
    for step in (alone, alone, alone.whole_step):
        torch.manual_seed(3)
        step()
    assert len(drawn) == 3
    # Of equal seeds the same ones, also in the whole distillation step.
    for other in drawn[1:]:
        assert all(torch.equal(a.tensor, b.tensor) for a, b in zip(drawn[0].boxes, other.boxes))


def test_regions_are_kept_as_they_are() -> None:
    regions = Regions([Boxes(torch.zeros(3, 4)), Boxes(torch.zeros(0, 4))])
    tensors: List[torch.Tensor] = []
    kept = map_tensors(tensors.append, {"regions": regions})["regions"]
    assert kept.boxes is regions.boxes and tensors == []


def test_queue_is_full_before_the_first_step(
    parts: ModuleType,
    small_args: Callable[..., Namespace],
    config_file: Callable[[str, str], str],
) -> None:
    path = config_file("retinanet", "faster_rcnn")
    words = ["--config-file", path, "--heads", "CKD", "DISTILL.CKD.QUEUE_SIZE", "50"]
    args = small_args(*words)
    with EventStorage():
        alone = parts.build_arms(parts.build_config(args, ""), args)["head CKD"]()
    assert len(alone.heads["CKD"].queue) == 50
    assert torch.allclose(alone.heads["CKD"].queue.norm(dim=1), torch.ones(50))


@pytest.mark.parametrize(
    "student, teacher, name, arm",
    [
        ("retinanet", "retinanet", "CKD", "teacher of CKD"),  # vectors are cut out of a tower
        ("retinanet", "faster_rcnn", "CKD", "teacher"),
        ("retinanet", "retinanet", "SGFI", "teacher"),
        ("faster_rcnn", "retinanet", "SGFI", "teacher"),
    ],
)
def test_what_a_head_reads_of_the_teacher_is_in_its_arm(
    head_alone: Callable[..., Any], student: str, teacher: str, name: str, arm: str
) -> None:
    alone = head_alone(student, teacher, name)
    assert alone.teacher_arm == arm
    assert ("dense" in alone.teacher._recorded) == (arm != "teacher")


@pytest.mark.parametrize(
    "pair, teacher, student",
    [
        ("retinanet_R_101-R_50", "RetinaNet", "RetinaNet"),
        ("faster_rcnn_R_101-R_18", "GeneralizedRCNN", "GeneralizedRCNN"),
        ("faster_rcnn_R_101-retinanet_R_50", "GeneralizedRCNN", "RetinaNet"),
        ("retinanet_R_101-faster_rcnn_R_18", "RetinaNet", "GeneralizedRCNN"),
    ],
)
def test_pairs_have_the_zoos_sizes(
    parts: ModuleType,
    small_args: Callable[..., Namespace],
    pair: str,
    teacher: str,
    student: str,
    tmp_path: Path,
) -> None:
    cfg = parts.build_config(small_args("--pair", pair), str(tmp_path))
    teacher_cfg = load_config(cfg.DISTILL.TEACHER.CONFIG_FILE)
    assert teacher_cfg.MODEL.META_ARCHITECTURE == teacher
    assert cfg.DISTILL.STUDENT_META_ARCHITECTURE == student
    assert (teacher_cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.FPN.OUT_CHANNELS) == (101, 256)
    assert cfg.MODEL.RESNETS.DEPTH == int(pair.split("_")[-1])
    assert cfg.MODEL.RETINANET.NUM_CLASSES == cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80
    assert cfg.DISTILL.HEADS == ["MGD", "PKD"]


def test_calm_shrinks_the_last_norm_of_a_block(parts: ModuleType) -> None:
    block = BasicBlock(8, 8, norm="FrozenBN")
    distiller = nn.Module()
    distiller.student, distiller.teacher = block, None
    parts.calm(distiller)
    assert torch.allclose(block.conv2.norm.weight, torch.tensor(0.1))
    assert torch.allclose(block.conv1.norm.weight, torch.tensor(1.0))
