"""A run between detectors with masks: they are learnt, evaluated, told, and choose a checkpoint."""

from pathlib import Path
from typing import Any

import pytest

from d2kd.engine import train
from tests.helpers.runs import SHAPES_CLASSES, assert_same_checkpoint, interrupt, run_config, saved
from tests.helpers.toys import write_teacher

KEYS = {
    "DATASETS__SHAPES__MASKS": True,
    "DATASETS__TEST": ("d2kd_shapes_val",),
    "INPUT__MASK_FORMAT": "bitmask",
    "TEST__BEST_METRIC": "segm/AP",
    "DISTILL__TEACHER__EVAL_IMAGES": 2,
    "DISTILL__TEACHER__MIN_AP": 0.0,
    # What is detected, so that there is something to evaluate.
    "MODEL__ROI_HEADS__SCORE_THRESH_TEST": 0.0,
}


def config(folder: Path) -> Any:
    opts = write_teacher(folder, "mask_rcnn", MODEL__ROI_HEADS__NUM_CLASSES=SHAPES_CLASSES)
    return run_config(folder, opts, ["RoIMask", "PKD"], student="mask_rcnn", **KEYS)


def test_masks_are_told_and_choose_the_best_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = config(tmp_path)
    with caplog.at_level("INFO", logger="d2kd"):
        results = train(cfg)
    assert set(results) == {"bbox", "segm"}
    assert " of masks, on 2 images of d2kd_shapes_val" in caplog.text
    assert "Best segm/AP so far" in caplog.text and (tmp_path / "run" / "model_best.pth").is_file()
    assert (
        "loss_roimask" in caplog.text and "loss_mask" in (tmp_path / "run/metrics.json").read_text()
    )


def test_resumed_run_has_the_same_weights(tmp_path: Path) -> None:
    cfg = config(tmp_path)
    cfg.DATASETS.TEST = ()
    train(cfg)
    expected = saved(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "again")
    interrupt(cfg, 2)
    train(cfg, resume=True)
    assert_same_checkpoint(saved(cfg), expected)
