"""A teacher that is whole, but knows nothing of the data, is refused before the first step."""

import re
from pathlib import Path
from typing import Any, List

import pytest

from detectron2.config import CfgNode

from d2kd import build_teacher, load_config
from d2kd.data import register_datasets
from d2kd.engine import train
from d2kd.engine.teacher_check import _some, check_teacher

from runs import run_config
from toys import ROOT, write_teacher


@pytest.fixture
def cfg(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CfgNode:
    """The quickstart's pair, on a few images."""
    monkeypatch.chdir(ROOT)
    data = ["NUM_TRAIN", 8, "NUM_VAL", 12, "ROOT", str(folder)]
    opts: List[Any] = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(folder / "run")]
    for key, value in zip(data[0::2], data[1::2]):
        opts += [f"DATASETS.SHAPES.{key}", value]
    cfg = load_config("configs/quickstart/pkd.yaml", opts)
    register_datasets(cfg, "RetinaNet")
    return cfg


def ap_in(text: str) -> float:
    return float(re.search(r"The teacher has ([\d.]+) AP on", text).group(1))


def test_trained_teacher_passes_and_its_ap_is_told(
    cfg: CfgNode, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="d2kd")
    check_teacher(cfg, build_teacher(cfg))
    assert ap_in(caplog.text) > 20 and "on 12 images of d2kd_shapes_val" in caplog.text
    caplog.clear()
    cfg.DISTILL.TEACHER.EVAL_IMAGES = 5
    check_teacher(cfg, build_teacher(cfg))
    assert ap_in(caplog.text) > 10 and "on 5 images" in caplog.text


@pytest.mark.parametrize(
    "opts", [["MODEL.PIXEL_STD", [1.0, 1.0, 1.0]], ["MODEL.PIXEL_MEAN", [900.0, 900.0, 900.0]]]
)
def test_teacher_that_sees_other_pixels_than_it_learned_from_is_refused(
    cfg: CfgNode, opts: List[Any]
) -> None:
    cfg.DISTILL.TEACHER.MIN_AP = 15.0
    check_teacher(cfg, build_teacher(cfg))
    cfg.DISTILL.TEACHER.OPTS = opts
    with pytest.raises(ValueError, match="(?s)has .* AP, less than DISTILL.TEACHER.MIN_AP 15.0"):
        check_teacher(cfg, build_teacher(cfg))
    cfg.DISTILL.TEACHER.EVAL_IMAGES = 0
    check_teacher(cfg, build_teacher(cfg))


def test_floor_is_the_user_s(cfg: CfgNode) -> None:
    cfg.DISTILL.TEACHER.MIN_AP = 99.0
    with pytest.raises(ValueError, match="less than DISTILL.TEACHER.MIN_AP 99.0"):
        check_teacher(cfg, build_teacher(cfg))


def test_run_with_a_teacher_that_knows_nothing_stops_before_its_first_step(
    folder: Path, teacher: List[Any]
) -> None:
    # A toy teacher of 3 classes, for data of 6: it cannot be asked. Of 6: it knows none of them.
    cfg = run_config(folder, teacher, DISTILL__TEACHER__EVAL_IMAGES=4, SOLVER__MAX_ITER=1)
    cfg.DATASETS.TEST, cfg.OUTPUT_DIR = ("d2kd_shapes_val",), str(folder / "unlike")
    train(cfg)
    values = {"MODEL__FPN__OUT_CHANNELS": 64, "MODEL__RETINANET__NUM_CLASSES": 6}
    (folder / "six").mkdir()
    cfg.DISTILL.TEACHER.merge_from_list(
        [
            x.replace("DISTILL.TEACHER.", "")
            for x in write_teacher(folder / "six", "retinanet", **values)
        ]
    )
    cfg.OUTPUT_DIR = str(folder / "refused")
    with pytest.raises(ValueError, match="on 4 images of d2kd_shapes_val it has 0.00 AP"):
        train(cfg)
    assert not list((folder / "refused").glob("model*"))
    cfg.DISTILL.TEACHER.MIN_AP = 0.0
    train(cfg)


@pytest.mark.parametrize("change", ["no test set", "other classes", "random"])
def test_what_cannot_be_evaluated_is_said(
    cfg: CfgNode, change: str, caplog: pytest.LogCaptureFixture
) -> None:
    node = cfg.DISTILL.TEACHER
    if change == "no test set":
        cfg.DATASETS.TEST = ()
    elif change == "other classes":
        node.OPTS, node.ALLOW_RANDOM_WEIGHTS = ["MODEL.RETINANET.NUM_CLASSES", 2], True
        node.WEIGHTS = ""
    else:
        node.WEIGHTS, node.ALLOW_RANDOM_WEIGHTS = "", True
    check_teacher(cfg, build_teacher(cfg))
    assert "The teacher is not evaluated: " in caplog.text


def test_images_are_taken_at_equal_distances() -> None:
    images = [{"i": i} for i in range(10)]
    assert [x["i"] for x in _some(images, 4)] == [0, 2, 5, 7]
    assert _some(images, 10) == _some(images, 99) == images
