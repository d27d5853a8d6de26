"""Every shipped YAML builds, names data sets that exist, and says only what makes it different."""

import hashlib
from pathlib import Path
from typing import List

import pytest
import torch

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model

from d2kd import load_config
from d2kd.config.lessons import lesson_configs
from d2kd.data.shapes import SPLITS
from d2kd.engine.stages import plan_stages
from d2kd.teacher.square_pad import square_pad
from tests.helpers.toys import ROOT

FOLDER = Path(ROOT) / "configs"
FILES = sorted(str(x.relative_to(ROOT)) for x in FOLDER.glob("[!b]*/**/*.yaml"))  # not bench's
LEAVES = [x for x in FILES if not Path(x).name.startswith("Base")]
MAX_LINES = 20

# What is said of a detector that a newer Detectron2 has, or timm.
NOT_HERE = (
    "which the installed Detectron2",
    "pip install timm",
    "cannot import name",
    "mask_rcnn_vitdet.py not available in Model Zoo",
    "naiveSyncBN_N",
)

NO_WEIGHTS = ["MODEL.WEIGHTS", "", "MODEL.DEVICE", "cpu"]
NO_TEACHER_WEIGHTS = ["DISTILL.TEACHER.WEIGHTS", "", "DISTILL.TEACHER.ALLOW_RANDOM_WEIGHTS", True]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in the configs start there."""
    monkeypatch.chdir(ROOT)


@pytest.fixture
def quick_init(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are left as memory has them: to draw them takes most of the time of a build."""
    for name in ("normal_", "uniform_", "kaiming_normal_", "kaiming_uniform_", "trunc_normal_"):
        monkeypatch.setattr(torch.nn.init, name, lambda tensor, *args, **kwargs: tensor)


def build_or_skip(cfg: CfgNode) -> torch.nn.Module:
    try:
        return build_model(cfg)
    except ValueError as error:
        if not any(x in str(error) for x in NOT_HERE):
            raise
        pytest.skip(str(error))


def lines_of(path: str) -> List[str]:
    return [x for x in Path(path).read_text().splitlines() if x.strip()]


def test_there_are_configs() -> None:
    assert FILES


@pytest.mark.parametrize("path", FILES)
def test_config_has_only_keys_that_are_read_and_data_sets_that_exist(path: str) -> None:
    cfg = load_config(path)
    own = [x["NAME"] for x in cfg.DATASETS.COCO_FORMAT]
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        assert name in (*SPLITS, *own, *DatasetCatalog.list()), name


@pytest.mark.parametrize("path", LEAVES)
def test_leaf_is_short(path: str) -> None:
    assert len(lines_of(path)) <= MAX_LINES


@pytest.mark.parametrize("path", LEAVES)
def test_leaf_builds_with_teacher_heads_and_level_plan(path: str, quick_init: None) -> None:
    cfg = load_config(path, NO_WEIGHTS)
    if cfg.MODEL.META_ARCHITECTURE != "Distiller":
        build_or_skip(cfg)
        return
    for stage in plan_stages(cfg):
        stage.cfg.merge_from_list(NO_TEACHER_WEIGHTS)
        for entry in stage.cfg.DISTILL.TEACHERS:
            entry["TEACHER"].update(WEIGHTS="", ALLOW_RANDOM_WEIGHTS=True)
        distiller = build_or_skip(stage.cfg)
        heads = [x for own in lesson_configs(stage.cfg) for x in own.cfg.DISTILL.HEADS]
        assert [x.rpartition("/")[2] for x in distiller.heads] == heads != []
        assert cfg.DISTILL.ENABLED
        distiller.inherit_from_teacher()  # refused where nothing fits


@pytest.mark.parametrize("path", sorted(FOLDER.glob("COCO/Teachers/*.py")), ids=lambda x: x.stem)
def test_teacher_of_the_newest_detectron2_builds_and_shares_levels(
    path: Path, quick_init: None
) -> None:
    cfg = load_config("configs/COCO/FasterRCNN/pkd_R_50_FPN_vitdet_B_2x.yaml", NO_WEIGHTS)
    cfg.merge_from_list([*NO_TEACHER_WEIGHTS, "DISTILL.TEACHER.CONFIG_FILE", str(path)])
    distiller = build_or_skip(cfg)
    assert [x.student for x in distiller.pair.levels] == [f"p{i}" for i in range(2, 7)]
    assert square_pad(distiller.teacher.model) == 1024


@pytest.mark.parametrize("name", ["teacher", "student_finished"])
def test_shipped_weights_are_those_that_the_model_zoo_names(name: str) -> None:
    weights = (FOLDER / "quickstart" / f"{name}.pth").read_bytes()
    assert hashlib.sha256(weights).hexdigest() in (Path(ROOT) / "MODEL_ZOO.md").read_text()
    assert len(weights) < 4_000_000


# The largest norm of all gradients together in the training that was published with a method; None
# where it clips nothing. Of methods that are not here, "reconstructed" ones, no training is known.
PUBLISHED_CLIP = {
    "MGD": 35.0,
    "FGD": 35.0,
    "PKD": None,
    "CWD": None,
    "ReviewKD": None,
    "DKD": None,
    "DIST": None,
    "BCKD": None,
    ("CrossKD", "RetinaNet"): None,
    ("CrossKD", "FCOS"): 35.0,
}


@pytest.mark.parametrize("path", [x for x in LEAVES if "COCO" in x])
def test_coco_config_trains_as_published(path: str) -> None:
    cfg = load_config(path)
    student = cfg.DISTILL.STUDENT_META_ARCHITECTURE
    heads = cfg.DISTILL.HEADS if cfg.MODEL.META_ARCHITECTURE == "Distiller" else []
    published = {
        PUBLISHED_CLIP[key]
        for name in heads
        for key in (name, (name, student))
        if key in PUBLISHED_CLIP
    }
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if len(published) == 1:  # nobody has published both FGD and DKD
        assert {clip.CLIP_VALUE if clip.ENABLED else None} == published
        assert not clip.ENABLED or (clip.CLIP_TYPE, clip.NORM_TYPE) == ("full_model", 2.0)
    if "FGD" in heads:
        assert cfg.DISTILL.FGD.LEGACY_SCALE, "the released placement of boxes"
