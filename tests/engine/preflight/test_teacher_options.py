"""Options of the teacher are applied and compared before the first step, or refused."""

from pathlib import Path
from typing import Any, List

import pytest
import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from d2kd.data import register_datasets
from d2kd.engine.preflight import teacher_options
from d2kd.teacher import Teacher, speed_up
from tests.helpers.runs import (
    SHAPES_CLASSES,
    assert_same_checkpoint,
    at,
    build_trainer,
    interrupt,
    run,
    run_config,
    saved,
    scalars,
)
from tests.helpers.toys import write_teacher

FAST = {"FOLD_NORMS": True, "CHANNELS_LAST": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> List[Any]:
    """Of the classes of the built-in data."""
    values = {"MODEL__RETINANET__NUM_CLASSES": SHAPES_CLASSES, "MODEL__RETINANET__NORM": ""}
    return write_teacher(tmp_path_factory.mktemp("teacher"), "retinanet", **values)


def with_options(folder: Path, to: Path, teacher: List[Any], **options: Any) -> CfgNode:
    cfg = at(run_config(folder, teacher, ["PKD", "BCKD"]), to, "run")
    cfg.DISTILL.TEACHER.update(options)
    return cfg


def test_run_learns_what_it_learns_without_them_and_the_log_says_how_near(
    folder: Path, teacher: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = scalars(run(with_options(folder, tmp_path / "plain", teacher)))
    caplog.set_level("INFO", logger="d2kd")
    trainer = run(with_options(folder, tmp_path, teacher, **FAST))
    found = scalars(trainer)
    for name in ("loss_pkd", "loss_bckd_cls"):
        for i in (0, 1):  # later, rounding has grown
            assert found[name][i] == pytest.approx(plain[name][i], rel=1e-3)
    assert "The teacher with DISTILL.TEACHER.FOLD_NORMS True, " in caplog.text
    assert "p3 logits" in caplog.text and "on 3 training images" in caplog.text
    assert not any(p.requires_grad for p in trainer.distiller.teacher.model.parameters())


def test_without_options_nothing_is_compared(
    folder: Path, teacher: List[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(teacher_options, "teacher_answers")
    build_trainer(run_config(folder, teacher, ["PKD"]))


def spoil(teacher: Teacher) -> None:
    teacher.model.backbone.fpn_output4.weight.data[:32] *= 1.5


def raise_error(teacher: Teacher) -> None:
    raise RuntimeError("not implemented for 'BFloat16'")


@pytest.mark.parametrize(
    "step, message",
    [
        (spoil, r"p4 of the teacher is off by 0\.\d.*allowed are 0.001 and 0.99. Set it to False"),
        (raise_error, "does not run with it: RuntimeError: not implemented .* Set it to False"),
    ],
)
def test_option_that_makes_it_another_teacher_is_refused_by_its_key(
    step: Any,
    message: str,
    folder: Path,
    teacher: List[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(speed_up._STEPS, "channels_last", step)
    cfg = with_options(folder, tmp_path, teacher, **FAST)
    with pytest.raises(ValueError, match=f"^DISTILL.TEACHER.CHANNELS_LAST True: .*{message}"):
        build_trainer(cfg)


def test_tower_is_compared_where_a_head_reads_what_it_has_of_a_region(
    folder: Path, teacher: List[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil_tower(teacher: Teacher) -> None:
        teacher.model.head.cls_subnet[0].weight.data *= 1.5

    monkeypatch.setitem(speed_up._STEPS, "channels_last", spoil_tower)
    cfg = with_options(folder, tmp_path, teacher, CHANNELS_LAST=True)
    cfg.DISTILL.HEADS = ["PKD"]  # which reads the pyramid alone
    build_trainer(cfg)
    cfg.DISTILL.HEADS, cfg.DISTILL.CKD.QUEUE_SIZE = ["CKD"], 0
    with pytest.raises(ValueError, match=r"CHANNELS_LAST True: p3 tower of the teacher is off"):
        build_trainer(cfg)


def test_half_precision_has_a_bound_of_its_own(
    folder: Path, teacher: List[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 has 8 bits of mantissa: its rounding, 2^-9, is above 1e-4 whatever the detector."""
    cfg = with_options(folder, tmp_path, teacher, PRECISION="bfloat16")
    monkeypatch.setattr(teacher_options, "FLOAT32_BOUND", 0.0)
    monkeypatch.setattr(teacher_options, "HALF_BOUND", 1.0)
    monkeypatch.setattr(teacher_options, "MIN_COSINE", 0.0)
    build_trainer(cfg)
    monkeypatch.setattr(teacher_options, "HALF_BOUND", 1e-4)
    message = r"PRECISION 'bfloat16': p\d .* off by 0\.\d.* allowed are 0.0001 .* Set it to ''"
    with pytest.raises(ValueError, match=message):
        build_trainer(cfg)


def test_compiler_that_does_nothing_is_said(
    folder: Path,
    teacher: List[Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, backend: function)
    build_trainer(with_options(folder, tmp_path, teacher, COMPILE=True))
    assert "DISTILL.TEACHER.COMPILE: PyTorch compiled nothing" in caplog.text


def test_student_inherits_the_weights_from_before_norms_are_folded(
    folder: Path, teacher: List[Any], tmp_path: Path
) -> None:
    cfg = with_options(folder, tmp_path, teacher, **FAST)
    cfg.DISTILL.INHERIT = ["neck"]
    trainer = build_trainer(cfg)
    weights, key = torch.load(teacher[3])["model"], "fpn_lateral3"
    ours = getattr(trainer.model.student.backbone, key)
    assert torch.equal(ours.weight, weights[f"backbone.{key}.weight"])
    assert isinstance(ours.norm, nn.BatchNorm2d)
    assert getattr(trainer.distiller.teacher.model.backbone, key).norm is None


def test_resumed_run_is_the_same_to_the_bit_and_other_options_are_said(
    folder: Path, teacher: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = with_options(folder, tmp_path, teacher, **FAST)
    run(cfg)
    again = at(cfg, tmp_path, "again")
    interrupt(again, 2)
    run(again, resume=True)
    assert_same_checkpoint(saved(again), saved(cfg))
    again.DISTILL.TEACHER.CHANNELS_LAST = False
    build_trainer(again, resume=True)
    assert "CHANNELS_LAST" in caplog.text and "the same teacher, rounded otherwise" in caplog.text


def test_without_a_training_set_they_are_compared_on_images_without_labels(
    folder: Path, teacher: List[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    register_datasets(run_config(folder), "RetinaNet")
    image, *_ = DatasetCatalog.get("d2kd_shapes_train")
    unlabelled = {"SETS": [str(Path(image["file_name"]).parent)], "SHARE": 1.0}
    cfg = with_options(folder, tmp_path, teacher, **FAST)
    cfg.merge_from_list(["DISTILL.HEADS", ["PKD"], "DATASETS.TRAIN", ()])
    cfg.DISTILL.UNLABELLED.update(unlabelled)
    caplog.set_level("INFO", logger="d2kd")
    build_trainer(cfg)
    assert "on 3 training images" in caplog.text
