"""Keys under TEST that would be asked for in vain, or be missed only after the training."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any, List

import pytest

from detectron2.data import MetadataCatalog

from d2kd.data import register_datasets
from d2kd.engine import evaluate, train
from d2kd.engine.evaluator import build_evaluator
from d2kd.engine.preflight.check_config import check_config
from tests.helpers.runs import run_config
from tests.helpers.toy_sets import Content, name_sets, write_set
from tests.helpers.toys import detector_config

RESULT = ["bbox", "AP", 38.5, 0.2]
ONE = {"DATASETS.TEST": ("a",)}
SHAPES = {"DATASETS.TEST": ("d2kd_shapes_val",)}
MISTAKES = [
    ({"TEST.AUG.ENABLED": True}, "TEST.AUG.ENABLED is True"),
    ({"TEST.PRECISE_BN.ENABLED": True}, "TEST.PRECISE_BN.ENABLED is True.*resumed exactly"),
    ({"TEST.EXPECTED_RESULTS": [RESULT]}, r"EXPECTED_RESULTS .* DATASETS.TEST is \(\)"),
    ({"TEST.EXPECTED_RESULTS": [RESULT], "DATASETS.TEST": ("a", "b")}, r"is \('a', 'b'\)"),
    ({"TEST.EXPECTED_RESULTS": [["bbox_TTA", *RESULT[1:]]], **ONE}, "has .'bbox_TTA'.*bbox, segm"),
    ({"TEST.EXPECTED_RESULTS": [RESULT[:3]], **ONE}, r"\['bbox', 'AP', 38.5\]; an entry is"),
    ({"TEST.EXPECTED_RESULTS": RESULT, **ONE}, "has 'bbox'; an entry is"),
    ({"TEST.EXPECTED_RESULTS": [["bbox", "AP", "x", 1.0]], **ONE}, "has .*'x'"),
    ({"TEST.EXPECTED_RESULTS": [["bbox", "mAP", 1.0, 1.0]], **ONE}, "has .*'mAP'"),
    (
        {"TEST.EVAL_PERIOD": 500, "DATASETS.TEST": ("d2kd_shapes_test",)},
        "BEST_METRIC 'bbox/AP' would choose a checkpoint, and on d2kd_shapes_test nothing is",
    ),
    ({"DATASETS.TEST": ("a", "b", "a")}, r"TEST names a set twice: \('a', 'b', 'a'\)"),
    ({"TEST.BEST_METRIC": "AP50", **ONE}, "BEST_METRIC is 'AP50'; it is a task and a metric"),
    ({"TEST.BEST_METRIC": "bbox/mAP", **ONE}, "BEST_METRIC is 'bbox/mAP'; it is a task"),
    ({"TEST.BEST_METRIC": "bbox/AP60", **ONE}, "BEST_METRIC is 'bbox/AP60'; it is a task"),
    ({"TEST.BEST_METRIC": "bbox/APL", **ONE}, "BEST_METRIC is 'bbox/APL'; it is a task"),
    ({"TEST.BEST_METRIC": "bbox/AP-rign", **SHAPES}, "no class 'rign'. Did you mean 'ring'"),
    ({"TEST.BEST_METRIC": "bbox/AP-zebra", **SHAPES}, "no class 'zebra'. It has disc, ring, "),
    ({"TEST.BEST_METRIC": "b/bbox/AP", **ONE}, "BEST_METRIC is 'b/bbox/AP'; it is a task"),
    ({"TEST.BEST_METRIC": "segm/AP", **ONE}, "BEST_METRIC is 'segm/AP', .*MODEL.MASK_ON False"),
]


@pytest.mark.parametrize("values, message", MISTAKES, ids=[str(i) for i in range(len(MISTAKES))])
def test_what_an_evaluation_would_not_do_is_refused(values: Any, message: str) -> None:
    cfg = detector_config("retinanet")
    cfg.merge_from_list([word for pair in values.items() for word in pair])
    with pytest.raises(ValueError, match=message):
        check_config(cfg)


def test_sound_expectation_passes() -> None:
    cfg = detector_config("retinanet", DATASETS__TEST=("a",), TEST__EXPECTED_RESULTS=[RESULT])
    check_config(cfg)


@pytest.mark.parametrize("metric", ["", "bbox/AP75", "bbox/AP-red cell", "b/bbox/AP"])
def test_metric_that_an_evaluation_has_passes(metric: str) -> None:
    check_config(detector_config("retinanet", DATASETS__TEST=("a", "b"), TEST__BEST_METRIC=metric))
    values = {"MODEL__MASK_ON": True, "DATASETS__TEST": ("a",), "TEST__BEST_METRIC": "segm/AP"}
    check_config(detector_config("mask_rcnn", **values))


@pytest.mark.parametrize("names, refused", [("cat", True), ("cat dog", False)])
def test_ap_by_class_is_refused_where_there_is_one_class(
    names: str, refused: bool, tmp_path: Path
) -> None:
    def rename(said: Content) -> None:
        said["categories"] = [{"id": i, "name": x} for i, x in enumerate(names.split(), 1)]

    write_set(tmp_path, "a", rename)
    cfg = name_sets(detector_config("retinanet"), tmp_path, ["a"], ["a"])
    cfg.TEST.BEST_METRIC = "bbox/AP-cat"
    with pytest.raises(ValueError, match="Take 'bbox/AP'") if refused else nullcontext():
        check_config(cfg)


def test_run_that_chooses_nothing_may_look_at_the_test_split() -> None:
    values = {"TEST__EVAL_PERIOD": 500, "DATASETS__TEST": ("d2kd_shapes_test",)}
    check_config(detector_config("retinanet", TEST__BEST_METRIC="", **values))
    check_config(detector_config("retinanet", **{**values, "TEST__EVAL_PERIOD": 0}))


def test_evaluation_does_not_look_at_what_only_training_reads() -> None:
    cfg = detector_config("retinanet", SOLVER__AMP__ENABLED=True, SOLVER__IMS_PER_BATCH=0)
    cfg.TEST.PRECISE_BN.ENABLED = True
    check_config(cfg, evaluation=True)
    cfg.TEST.AUG.ENABLED = True
    with pytest.raises(ValueError, match="TEST.AUG.ENABLED"):
        check_config(cfg, evaluation=True)


def test_evaluation_on_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="DATASETS.TEST is empty"):
        evaluate(run_config(tmp_path, MODEL__WEIGHTS="some.pth"))


def test_evaluation_of_a_last_checkpoint_that_is_not_there_takes_no_other(tmp_path: Path) -> None:
    cfg = run_config(tmp_path, MODEL__WEIGHTS="some.pth", DATASETS__TEST=("d2kd_shapes_val",))
    with pytest.raises(ValueError, match="OUTPUT_DIR: there is no checkpoint in .*--resume"):
        evaluate(cfg, resume=True)


def test_sigmas_of_keypoints_reach_the_evaluator(tmp_path: Path) -> None:
    cfg = run_config(tmp_path, DATASETS__TEST=("d2kd_shapes_val",))
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.5, 0.25]
    register_datasets(cfg, "RetinaNet")
    assert MetadataCatalog.get("d2kd_shapes_val").evaluator_type == "coco"
    found: List[float] = build_evaluator(cfg, "d2kd_shapes_val")._kpt_oks_sigmas
    assert list(found) == [0.5, 0.25]


def test_detector_is_evaluated_as_it_was_trained(tmp_path: Path) -> None:
    cfg = run_config(tmp_path, DATASETS__TEST=("d2kd_shapes_val",), SOLVER__MAX_ITER=1)
    train(cfg)
    cfg.MODEL.WEIGHTS = f"{cfg.OUTPUT_DIR}/model_final.pth"
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.01  # how many boxes are asked for may change
    cfg.MODEL.RPN.BBOX_REG_WEIGHTS = (2.0, 2.0, 2.0, 2.0)  # and what it does not read
    assert evaluate(cfg)
    for key, value in (
        ("MODEL.PIXEL_STD", [57.0, 57.0, 57.0]),
        ("INPUT.FORMAT", "RGB"),
        ("MODEL.ANCHOR_GENERATOR.OFFSET", 0.5),
        ("MODEL.RETINANET.BBOX_REG_WEIGHTS", (2.0, 2.0, 2.0, 2.0)),
    ):
        other = cfg.clone()
        other.merge_from_list([key, value])
        with pytest.raises(ValueError, match=f"final.*trained with other values.*\n  {key}: "):
            evaluate(other)
