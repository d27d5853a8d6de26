"""What the benchmark measures: the pairs of detectors, and arms that share them."""

from argparse import Namespace
from pathlib import Path
from types import ModuleType
from typing import Callable

import pytest
import torch
from torch import nn

from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.events import EventStorage

from d2kd import load_config


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
    ones = [parts.with_one_head(cfg, whole, name) for name in ("MGD", "PKD")]
    assert all(x.student is whole.student and x.teacher is whole.teacher for x in ones)
    assert [list(x.heads) for x in ones] == [["MGD"], ["PKD"]]


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
        distiller = parts.with_one_head(cfg, whole, "MGD")
        batch = parts.random_batch(whole.student, args)
        parts.HeadAlone(cfg, distiller, batch)()
    assert all(p.grad is not None for p in distiller.heads.parameters())
    assert all(p.grad is None for p in whole.student.parameters())


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
