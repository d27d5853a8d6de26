"""DFMSD between detectors of different families, which is what it is made for: one step each."""

from pathlib import Path

import pytest
import torch

import detectron2.modeling
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage

from tests.helpers.toys import batch, distill_config, write_teacher

SWIN = {
    "MODEL__BACKBONE__NAME": "build_swin_fpn_backbone",
    "MODEL__SWIN__EMBED_DIM": 8,
    "MODEL__SWIN__DEPTHS": [1, 1, 1, 1],
    "MODEL__SWIN__NUM_HEADS": [1, 1, 2, 2],
    "MODEL__SWIN__WINDOW_SIZE": 2,
    "MODEL__SWIN__DROP_PATH_RATE": 0.0,
}
needs_swin = pytest.mark.skipif(
    not hasattr(detectron2.modeling, "SwinTransformer"), reason="this Detectron2 has no Swin"
)


@pytest.mark.parametrize(
    "student, teacher, backbone, levels",
    [
        ("retinanet", "faster_rcnn", {}, ["p3", "p4", "p5", "p6"]),
        ("retinanet", "cascade_rcnn", {}, ["p3", "p4", "p5", "p6"]),
        ("faster_rcnn", "retinanet", {}, ["p3", "p4", "p5", "p6"]),
        pytest.param(
            "faster_rcnn", "faster_rcnn", SWIN, ["p2", "p3", "p4", "p5", "p6"], marks=needs_swin
        ),
    ],
    ids=["faster-retinanet", "cascade-retinanet", "retinanet-faster", "swin-resnet"],
)
def test_step_trains_student_and_head_on_the_levels_in_common(
    student: str, teacher: str, backbone: dict, levels: list, tmp_path: Path
) -> None:
    opts = write_teacher(tmp_path, teacher, MODEL__FPN__OUT_CHANNELS=64, **backbone)
    torch.manual_seed(0)
    distiller = build_model(distill_config(student, opts, ["DFMSD"])).train()
    with EventStorage():
        losses = distiller(batch(height=64, width=96))
    terms = distiller.last_step.losses
    assert {k: list(v) for k, v in terms.items()} == {
        "loss_dfmsd_rebuild": levels,
        "loss_dfmsd_semantic": levels,
    }
    sum(losses[k] for k in terms).backward()
    trained = [*distiller.heads.parameters(), *distiller.student.backbone.bottom_up.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert sum(p.grad.abs().sum() for p in trained) > 0
    assert all(p.grad is None for p in distiller.teacher.model.parameters())
