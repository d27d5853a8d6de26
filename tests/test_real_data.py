"""A short run on photographs (blood cells) where that data set is at hand."""

import os
from pathlib import Path

import pytest
import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model

from d2kd import student_config
from d2kd.engine import train
from tests.helpers.toys import ROOT, distill_config, write_teacher

BCCD = os.path.join(ROOT, "..", "shared", "data", "bccd")


@pytest.mark.skipif(not os.path.isdir(BCCD), reason="the BCCD images are not here")
@pytest.mark.parametrize("student", ["retinanet", "faster_rcnn"])
def test_student_is_distilled_on_real_images(student: str, tmp_path: Path) -> None:
    teacher = write_teacher(tmp_path, "retinanet", MODEL__FPN__OUT_CHANNELS=64)
    cfg = distill_config(
        student,
        teacher,
        ["MGD", "PKD"],
        OUTPUT_DIR=str(tmp_path / "run"),
        DATASETS__TRAIN=("bccd_train",),
        DATASETS__TEST=(),
        DATALOADER__NUM_WORKERS=0,
        INPUT__MIN_SIZE_TRAIN=(160, 192),
        SOLVER__IMS_PER_BATCH=2,
        SOLVER__BASE_LR=0.002,
        SOLVER__STEPS=(),
        SOLVER__MAX_ITER=3,
    )
    entry = {"NAME": "bccd_train", "JSON": f"{BCCD}/train.json", "IMAGES": f"{BCCD}/images"}
    cfg.DATASETS.COCO_FORMAT = [entry]
    train(cfg)
    path = tmp_path / "run" / "model_final.pth"
    weights = torch.load(path, weights_only=True)["model"]
    assert all(x.isfinite().all() for x in weights.values())
    detector = build_model(student_config(cfg))
    DetectionCheckpointer(detector).load(str(path))
    detector.load_state_dict(weights, strict=True)
