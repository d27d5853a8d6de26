"""Each mistake that a config can hold is found before a model is built."""

import math
import os
import pickle
from pathlib import Path
from typing import Any, Dict, List

import numpy as np
import pytest
import torch

from detectron2.config import CfgNode

from d2kd import student_config
from d2kd.data import register_datasets
from d2kd.engine.preflight.check_config import PARTS_OF_DETECTOR, check_config
from d2kd.heads.registry import head_names
from tests.helpers.toys import detector_config, distill_config


@pytest.fixture
def teacher_opts(tmp_path: Path) -> List[Any]:
    """Files that exist: that they are a detector's is found when they are loaded."""
    for name in ("teacher.yaml", "teacher.pth"):
        (tmp_path / name).write_text("VERSION: 2\n")
    config_file, weights = str(tmp_path / "teacher.yaml"), str(tmp_path / "teacher.pth")
    return ["DISTILL.TEACHER.CONFIG_FILE", config_file, "DISTILL.TEACHER.WEIGHTS", weights]


def test_sound_configs_pass(teacher_opts: List[Any]) -> None:
    check_config(detector_config("retinanet"))
    check_config(distill_config("retinanet", teacher_opts, head_names()))


MISTAKES = [
    ({"DISTILL.HEADS": []}, "DISTILL.HEADS is empty"),
    ({"DISTILL.HEADS": ["MGDD"]}, "unknown head 'MGDD'. Did you mean .*'MGD'"),
    ({"DISTILL.HEADS": ["MGD", "MGD"]}, "DISTILL.HEADS names a head twice"),
    ({"DISTILL.HEADS": [1]}, "unknown head 1"),
    ({"DISTILL.INHERIT": ["tail"]}, "DISTILL.INHERIT has 'tail'; it may list neck, head"),
    ({"DISTILL.MGD.LOSS_WEIGHT": 0.0}, "DISTILL.MGD.LOSS_WEIGHT must be above 0"),
    ({"DISTILL.MGD.SCHEDULE.DECAY": "step"}, "DISTILL.MGD.SCHEDULE.DECAY must be one of"),
    ({"DISTILL.MGD.LOSS_WEIGHT": math.inf}, "DISTILL.MGD.LOSS_WEIGHT must be above 0, got inf"),
    ({"DISTILL.STAGE_LR": "again"}, "STAGE_LR must be one of restart, continue, got 'again'"),
    ({"DISTILL.LIVENESS.FIRST_STEPS": 1}, "LIVENESS.FIRST_STEPS must be 2 or more, got 1"),
    ({"DISTILL.LIVENESS.PERIOD": -1}, "LIVENESS.PERIOD must be 0 or more, got -1"),
    ({"DISTILL.LIVENESS.WANTED_SHARE": 0.0}, r"LIVENESS.WANTED_SHARE must be in \(0, 1\), got 0.0"),
    ({"DISTILL.LIVENESS.WANTED_SHARE": 1.0}, r"LIVENESS.WANTED_SHARE must be in \(0, 1\), got 1.0"),
    ({"DISTILL.TEACHER.EVAL_IMAGES": -1}, "TEACHER.EVAL_IMAGES must be 0 or more, got -1"),
    ({"DISTILL.TEACHER.MIN_AP": math.nan}, r"TEACHER.MIN_AP must be in \[0, 100\], got nan"),
    ({"SEED": 2**32}, "SEED must be in .*, got 4294967296"),
    ({"VIS_PERIOD": -1}, "VIS_PERIOD must be 0 or more, got -1"),
    ({"SOLVER.MAX_ITER": -1}, "SOLVER.MAX_ITER must be in .*, got -1"),
    ({"SOLVER.IMS_PER_BATCH": 0}, "SOLVER.IMS_PER_BATCH must be 1 or more, got 0"),
    ({"SOLVER.CHECKPOINT_PERIOD": 0}, "SOLVER.CHECKPOINT_PERIOD must be 1 or more, got 0"),
    ({"SOLVER.OPTIMIZER": "Adam"}, "SOLVER.OPTIMIZER must be one of SGD, ADAMW, got 'Adam'"),
    (
        {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "all"},
        "CLIP_TYPE must be one of value, norm, full_model, got 'all'",
    ),
    (
        {"SOLVER.CLIP_GRADIENTS.ENABLED": True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": -1.0},
        "CLIP_VALUE must be above 0, got -1.0",
    ),
    ({"DISTILL.STUDENT_META_ARCHITECTURE": ""}, "DISTILL.STUDENT_META_ARCHITECTURE is ''"),
    (
        {"DISTILL.STUDENT_META_ARCHITECTURE": "Distiller"},
        "DISTILL.STUDENT_META_ARCHITECTURE is 'Distiller'; registered are .*RetinaNet",
    ),
    (
        {"DISTILL.STUDENT_META_ARCHITECTURE": "retinanet"},
        r"is 'retinanet'; registered are .*\. Did you mean RetinaNet\?",
    ),
    (
        {"MODEL.BACKBONE.NAME": "build_retinanet_resnet_bakbone"},
        r"MODEL.BACKBONE.NAME is .*; registered are .*Did you mean build_retinanet_resnet_fpn_back",
    ),
    ({"DISTILL.TEACHER.CONFIG_FILE": ""}, "DISTILL.TEACHER.CONFIG_FILE is empty"),
    ({"DISTILL.TEACHER.WEIGHTS": ""}, "DISTILL.TEACHER.WEIGHTS is empty"),
    ({"DISTILL.TEACHER.WEIGHTS": "no.pth"}, "DISTILL.TEACHER.WEIGHTS: there is no file 'no.pth'"),
    ({"DISTILL.TEACHER.CONFIG_FILE": "no.yaml"}, "'no.yaml' is neither a file nor a config of"),
]


@pytest.mark.parametrize("values, message", MISTAKES, ids=[m for _, m in MISTAKES])
def test_mistake_is_refused_by_its_key(
    teacher_opts: List[Any], values: Dict[str, Any], message: str
) -> None:
    cfg = distill_config("retinanet", teacher_opts)
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        check_config(cfg)


def test_disabled_distillation_needs_no_teacher_and_no_head() -> None:
    cfg = distill_config("retinanet", [], heads=[])
    cfg.DISTILL.ENABLED = False
    check_config(cfg)


def test_unknown_meta_architecture_is_refused_with_the_known_ones() -> None:
    cfg = detector_config("retinanet")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNett"
    message = "MODEL.META_ARCHITECTURE is 'RetinaNett'; registered are .*RetinaNet"
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


@pytest.mark.parametrize("key", sorted(set(PARTS_OF_DETECTOR) - {"MODEL.BACKBONE.NAME"}))
def test_part_that_is_not_registered_is_refused_where_the_detector_has_it(key: str) -> None:
    switches = {"MODEL__MASK_ON": True, "MODEL__KEYPOINT_ON": True}
    of_faster_rcnn = detector_config("faster_rcnn", **switches)
    check_config(of_faster_rcnn)
    of_faster_rcnn.merge_from_list([key, "Wrong"])
    with pytest.raises(ValueError, match=f"{key} is 'Wrong'; registered are "):
        check_config(of_faster_rcnn)
    of_retinanet = detector_config("retinanet")
    of_retinanet.merge_from_list([key, "Wrong"])
    if key != "MODEL.ANCHOR_GENERATOR.NAME":
        check_config(of_retinanet)


def test_student_alone_that_names_heads_is_refused() -> None:
    cfg = detector_config("retinanet", DISTILL__HEADS=["MGD"])
    with pytest.raises(ValueError, match=r"DISTILL.HEADS is \['MGD'\], but .* is 'RetinaNet'"):
        check_config(cfg)
    cfg.DISTILL.ENABLED = False
    check_config(cfg)
    check_config(student_config(distill_config("retinanet", [])))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return detector_config("retinanet")


def test_gpu_that_is_not_there_is_refused(no_gpu: CfgNode) -> None:
    no_gpu.MODEL.DEVICE = "cuda:1"
    with pytest.raises(ValueError, match="MODEL.DEVICE is 'cuda:1', but PyTorch sees no GPU"):
        check_config(no_gpu)


def test_amp_without_a_gpu_is_refused(no_gpu: CfgNode) -> None:
    no_gpu.SOLVER.AMP.ENABLED = True
    with pytest.raises(ValueError, match="SOLVER.AMP.ENABLED is True.*MODEL.DEVICE is 'cpu'"):
        check_config(no_gpu)


@pytest.mark.parametrize("size", [-1, 3])
def test_batch_that_the_reference_does_not_share_evenly_is_refused(size: int) -> None:
    cfg = detector_config("retinanet", SOLVER__IMS_PER_BATCH=8, SOLVER__REFERENCE_WORLD_SIZE=size)
    message = f"REFERENCE_WORLD_SIZE is {size}, .*IMS_PER_BATCH 8 must be a multiple"
    with pytest.raises(ValueError, match=message):
        check_config(cfg)
    cfg.SOLVER.REFERENCE_WORLD_SIZE = 4
    check_config(cfg)


class Attack:
    """Unpickled by a trusting reader, it leaves a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("part", ["TRAIN", "TEST"])
def test_code_in_a_file_of_proposals_is_refused_and_not_run(part: str, tmp_path: Path) -> None:
    cfg = detector_config("faster_rcnn", MODEL__LOAD_PROPOSALS=True)
    path, trap = tmp_path / "proposals.pkl", tmp_path / "trap"
    cfg.DATASETS[f"PROPOSAL_FILES_{part}"] = (str(path),)
    proposals = {"ids": [1], "boxes": [np.zeros((2, 4))], "objectness_logits": [np.zeros(2)]}
    path.write_bytes(pickle.dumps(proposals))
    register_datasets(cfg)
    path.write_bytes(pickle.dumps({**proposals, "more": Attack(trap)}))
    with pytest.raises(ValueError, match=f"PROPOSAL_FILES_{part}: .*wants to run posix.system"):
        register_datasets(cfg)
    assert not trap.exists()
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"PROPOSAL_FILES_{part}: there is no file"):
        register_datasets(cfg)


def test_proposals_may_have_the_names_of_detectron1(tmp_path: Path) -> None:
    cfg = detector_config("faster_rcnn", MODEL__LOAD_PROPOSALS=True)
    path = tmp_path / "proposals.pkl"
    cfg.DATASETS.PROPOSAL_FILES_TRAIN = (str(path),)
    content = {"indexes": [1], "boxes": [np.zeros((2, 4))], "scores": [np.zeros(2)]}
    path.write_bytes(pickle.dumps(content))
    register_datasets(cfg)
    path.write_bytes(pickle.dumps({k: v for k, v in content.items() if k != "scores"}))
    with pytest.raises(ValueError, match="not a proposal file: it has no 'objectness_logits'"):
        register_datasets(cfg)
