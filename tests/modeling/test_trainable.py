"""Detectors that this path cannot train, or that cannot teach, are refused with what would be."""

from pathlib import Path
from typing import Any, Dict, Iterator, List

import pytest

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model

from d2kd.engine import train
from d2kd.modeling.trainable import check_trainable
from tests.helpers.runs import run_config
from tests.helpers.toys import detector_config, distill_config

SEGMENTS = {
    "MODEL__SEM_SEG_HEAD__IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL__SEM_SEG_HEAD__CONVS_DIM": 32,
    "MODEL__SEM_SEG_HEAD__NORM": "",
}
PANOPTIC = {"MODEL__META_ARCHITECTURE": "PanopticFPN", **SEGMENTS}
GIVEN = {"MODEL__PROPOSAL_GENERATOR__NAME": "PrecomputedProposals"}
# A change of a small Faster R-CNN (or RetinaNet), and what is said of it.
REFUSED: Dict[str, Any] = {
    "panoptic": (PANOPTIC, r"PanopticFPN learns from a map .*d2kd_shapes_train.*GeneralizedRCNN"),
    "panoptic_masks": ({**PANOPTIC, "MODEL__MASK_ON": True}, "PanopticFPN learns from a map"),
    "segmentor": (
        {**SEGMENTS, "MODEL__META_ARCHITECTURE": "SemanticSegmentor"},
        "SemanticSegmentor segments and detects nothing",
    ),
    "keypoints": (
        {"MODEL__KEYPOINT_ON": True},
        "KEYPOINT_ON is True, but d2kd_shapes_train of DATASETS.TRAIN has no keypoints",
    ),
    "given": (GIVEN, r"'PrecomputedProposals', so MODEL\.LOAD_PROPOSALS must be True"),
    "given_without_files": (
        {**GIVEN, "MODEL__LOAD_PROPOSALS": True},
        r"PROPOSAL_FILES_TRAIN has 0 files for the 1 sets of DATASETS\.TRAIN",
    ),
    "given_without_test_files": (
        {**GIVEN, "MODEL__LOAD_PROPOSALS": True, "DATASETS__PROPOSAL_FILES_TRAIN": ("a.pkl",)},
        r"PROPOSAL_FILES_TEST has 0 files for the 1 sets of DATASETS\.TEST",
    ),
    "loaded_and_not_read": ({"MODEL__LOAD_PROPOSALS": True}, "makes its own proposals .*'RPN'"),
    "rotated_anchors": (
        {"MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator"},
        r"upright boxes only: take 'DefaultAnchorGenerator'",
    ),
    "rotated_proposals": (
        {"MODEL__PROPOSAL_GENERATOR__NAME": "RRPN"},
        r"PROPOSAL_GENERATOR\.NAME is 'RRPN'.*take 'RPN'",
    ),
    "rotated_heads": (
        {"MODEL__ROI_HEADS__NAME": "RROIHeads"},
        r"ROI_HEADS\.NAME is 'RROIHeads'.*take 'StandardROIHeads'",
    ),
}
SETS = {"DATASETS__TEST": ("d2kd_shapes_val",)}


def untrained(folder: Path, name: str, **overrides: Any) -> List[Any]:
    """DISTILL.TEACHER.* of a teacher with random weights."""
    path = folder / "teacher.yaml"
    path.write_text(detector_config(name, **overrides).dump())
    key = "DISTILL.TEACHER"
    return [f"{key}.CONFIG_FILE", str(path), f"{key}.ALLOW_RANDOM_WEIGHTS", True]


@pytest.mark.parametrize("name", REFUSED)
def test_student_alone_is_refused_before_its_first_step(name: str, tmp_path: Path) -> None:
    overrides, expected = REFUSED[name]
    with pytest.raises(ValueError, match=expected):
        train(run_config(tmp_path, student="faster_rcnn", **{**SETS, **overrides}))


@pytest.mark.parametrize("name", REFUSED)
def test_student_of_a_distillation_is_refused_when_it_is_built(name: str, tmp_path: Path) -> None:
    overrides, expected = REFUSED[name]
    cfg = run_config(tmp_path, ["SEED", 1], ["PKD"], student="faster_rcnn", **{**SETS, **overrides})
    with pytest.raises(ValueError, match=expected):
        build_model(cfg)


@pytest.mark.parametrize(
    "overrides, expected",
    [
        (GIVEN, r"TEACHER\.CONFIG_FILE.*this teacher needs proposals with each image"),
        (
            {"MODEL__ANCHOR_GENERATOR__NAME": "RotatedAnchorGenerator"},
            r"TEACHER\.CONFIG_FILE.*upright boxes only",
        ),
    ],
)
def test_teacher_that_cannot_run_on_a_student_s_batch_is_refused(
    overrides: Dict[str, Any], expected: str, tmp_path: Path
) -> None:
    teacher = untrained(tmp_path, "faster_rcnn", **overrides)
    with pytest.raises(ValueError, match=expected):
        build_model(distill_config("retinanet", teacher, ["PKD"]))


def test_panoptic_teacher_is_as_good_as_its_features(tmp_path: Path) -> None:
    teacher = untrained(tmp_path, "mask_rcnn", **PANOPTIC)
    assert build_model(distill_config("retinanet", teacher, ["PKD"])).teacher


@pytest.mark.parametrize(
    "name, role",
    [
        ("ProposalNetwork", "student"),
        ("ProposalNetwork", "teacher"),
        ("SemanticSegmentor", "teacher"),
    ],
)
def test_detector_without_a_view_is_refused_by_its_role(
    name: str, role: str, tmp_path: Path
) -> None:
    change = {"MODEL__META_ARCHITECTURE": name, **SEGMENTS}
    names = ["retinanet", "faster_rcnn"] if role == "teacher" else ["faster_rcnn", "retinanet"]
    changes = [{}, change] if role == "teacher" else [change, {}]
    teacher = untrained(tmp_path, names[1], **changes[1])
    with pytest.raises(ValueError, match=f"The {role}'s meta-architecture {name} has no Detector"):
        build_model(distill_config(names[0], teacher, ["PKD"], **changes[0]))


@pytest.fixture
def registered() -> Iterator[List[str]]:
    """Sets as Detectron2 has them: with maps of classes, and with keypoints."""
    names = ["with_maps", "with_keypoints"]
    DatasetCatalog.register(names[0], lambda: [{"file_name": "a", "sem_seg_file_name": "b"}])
    DatasetCatalog.register(names[1], lambda: [])
    MetadataCatalog.get(names[1]).keypoint_names = ["nose"]
    yield names
    for name in names:
        DatasetCatalog.remove(name)
    MetadataCatalog.remove(names[1])


def test_what_the_data_allows_is_trained(registered: List[str]) -> None:
    c4 = {
        "MODEL__BACKBONE__NAME": "build_resnet_backbone",
        "MODEL__ROI_HEADS__NAME": "Res5ROIHeads",
    }
    proposals = {"MODEL__LOAD_PROPOSALS": True, "DATASETS__PROPOSAL_FILES_TRAIN": ("a.pkl",)}
    for overrides in (
        {**PANOPTIC, "DATASETS__TRAIN": registered[:1]},
        {"MODEL__KEYPOINT_ON": True, "DATASETS__TRAIN": registered[1:]},
        {**GIVEN, **proposals, "DATASETS__TRAIN": registered[:1]},
        {"MODEL__META_ARCHITECTURE": "ProposalNetwork"},
        c4,
    ):
        check_trainable(detector_config("faster_rcnn", **overrides))
