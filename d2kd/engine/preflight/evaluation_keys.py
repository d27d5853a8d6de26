"""Refuse keys under TEST that would be ignored, or fail only after the training."""

import math

from detectron2.config import CfgNode

from ...data.class_names import class_names
from ...utils.checks import nearest

TASKS = ("bbox", "segm", "keypoints")
# What COCO's evaluation measures, and LVIS's of rare, common and frequent classes
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
OF_CLASS = "AP-"  # before a class's name


def check_evaluation(cfg: CfgNode, training: bool) -> None:
    """
    Args:
        training: whether the evaluation follows a training

    Raises:
        ValueError: naming the key, its value and what would be right
    """
    if cfg.TEST.AUG.ENABLED:
        raise ValueError(
            "TEST.AUG.ENABLED is True, but d2kd evaluates each image once, as it is. Set it to "
            "False; Detectron2's tools/train_net.py evaluates the student's checkpoint with "
            "test-time augmentation."
        )
    if cfg.TEST.PRECISE_BN.ENABLED and training:
        raise ValueError(
            "TEST.PRECISE_BN.ENABLED is True, but a run that computes the statistics of BatchNorm "
            "anew cannot be resumed exactly. Set it to False; MODEL.RESNETS.NORM FrozenBN or GN "
            "needs no such statistics."
        )
    if len(set(cfg.DATASETS.TEST)) < len(cfg.DATASETS.TEST):
        raise ValueError(
            f"DATASETS.TEST names a set twice: {tuple(cfg.DATASETS.TEST)}. It would be evaluated "
            "twice with the same result."
        )
    if training and cfg.TEST.BEST_METRIC and cfg.TEST.EVAL_PERIOD > 0:
        if "d2kd_shapes_test" in cfg.DATASETS.TEST:
            raise ValueError(
                f"DATASETS.TEST is {tuple(cfg.DATASETS.TEST)}, of which TEST.BEST_METRIC "
                f"{cfg.TEST.BEST_METRIC!r} would choose a checkpoint, and on d2kd_shapes_test "
                "nothing is chosen. Train with d2kd_shapes_val, and evaluate the end with "
                "--eval-only on the test set."
            )
    if training and cfg.TEST.BEST_METRIC and cfg.DATASETS.TEST:
        _check_best_metric(cfg)
    if cfg.TEST.EXPECTED_RESULTS:
        _check_expected_results(cfg)


def _check_best_metric(cfg: CfgNode) -> None:
    """No evaluation would have another one, so that no best checkpoint were ever saved."""
    metric = cfg.TEST.BEST_METRIC
    for name in cfg.DATASETS.TEST:
        metric = metric.removeprefix(f"{name}/")
    task, _, measure = metric.partition("/")
    if task not in TASKS or not _is_measure(measure):
        raise ValueError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}; it is a task and a metric, such as "
            "'bbox/AP', 'bbox/AP50' or 'segm/AP', also behind the name of a set in DATASETS.TEST. "
            "'' saves no best checkpoint."
        )
    if measure.startswith(OF_CLASS):
        _check_class(cfg, measure[len(OF_CLASS) :])
    switch = {"segm": "MASK_ON", "keypoints": "KEYPOINT_ON"}.get(task)
    if switch and not cfg.MODEL[switch]:
        raise ValueError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}, which a detector with MODEL.{switch} "
            "False does not have. Take 'bbox/AP'."
        )


def _check_class(cfg: CfgNode, name: str) -> None:
    names = class_names(cfg)
    if names and name not in names:
        near = nearest(name, names)
        hint = f"Did you mean {near[0]!r}?" if near else f"It has {', '.join(names[:20])}."
        raise ValueError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}, but the data has no class {name!r}. "
            f"{hint}"
        )
    if len(names) == 1:
        raise ValueError(
            f"TEST.BEST_METRIC is {cfg.TEST.BEST_METRIC!r}, but of a single class Detectron2 has "
            "no AP by class. Take 'bbox/AP'."
        )


def _check_expected_results(cfg: CfgNode) -> None:
    if len(cfg.DATASETS.TEST) != 1:
        raise ValueError(
            "TEST.EXPECTED_RESULTS is of one test set, but DATASETS.TEST is "
            f"{tuple(cfg.DATASETS.TEST)}. Name one, or set it to []."
        )
    for entry in cfg.TEST.EXPECTED_RESULTS:
        if not _is_expectation(entry):
            raise ValueError(
                f"TEST.EXPECTED_RESULTS has {entry!r}; an entry is [task, metric, value, "
                f"tolerance], such as ['bbox', 'AP', 38.5, 0.2], of a task out of "
                f"{', '.join(TASKS)}."
            )


def _is_expectation(entry: object) -> bool:
    if not (isinstance(entry, (list, tuple)) and len(entry) == 4 and entry[0] in TASKS):
        return False
    numbers = all(isinstance(x, (int, float)) and math.isfinite(x) for x in entry[2:])
    return isinstance(entry[1], str) and _is_measure(entry[1]) and numbers


def _is_measure(name: str) -> bool:
    return name in MEASURES or name.startswith(OF_CLASS)
