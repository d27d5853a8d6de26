"""One run from a config: train, resume or evaluate. Called by `d2kd train` in every process."""

import gc
import logging
import os
from typing import Any, Callable, Dict, Optional

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm

from ..checkpoint import load_whole_detector
from ..config import student_config
from ..config.unread import unread_keys
from ..data import register_datasets
from ..utils.atomic_file import atomic_write
from ..weights.run_checkpoints import forget_last_checkpoint, last_whole_checkpoint
from .facts import end_half_line, release_facts
from .folder_lock import hold_folder
from .plan import RunPlan
from .preflight.check_config import check_config
from .preflight.teacher_check import check_teachers
from .preflight.teacher_options import apply_options
from .resume_point import ResumePoint
from .stages import Stage
from .trainer import Trainer

logger = logging.getLogger(__name__)


def train(
    cfg: CfgNode, resume: bool = False, on_checked: Optional[Callable[[], None]] = None
) -> Dict[str, Any]:
    """
    Check the config, train stage by stage, evaluate.

    Args:
        resume: go on from the last checkpoint in OUTPUT_DIR, if there is one
        on_checked: called once the config has passed the check, before anything is written

    Returns:
        Detectron2's results of the last evaluation, {"bbox": {"AP": ...}}; {} on other processes
    """
    plan = RunPlan.resolve(cfg, resume, on_checked)
    unread = unread_keys(plan.cfg)
    if unread:
        logger.info(f"Set, but not read by this run: {', '.join(unread)}.")
    register_datasets(plan.cfg, student_config(plan.cfg).MODEL.META_ARCHITECTURE)
    first, *later = plan.stages_left
    point, results = plan.resume_point, {}
    # Before the teacher is evaluated, which takes minutes and leaves pictures there.
    with hold_folder(cfg.OUTPUT_DIR):
        for stage in later:
            preflight_stage(stage)
        for stage in (first, *later):
            if later:  # trainers hold themselves: two teachers would be in memory at a time
                gc.collect()
            trainer = _ready(stage, plan.seed, point, teacher_is_checked=stage is not first)
            if stage is first:
                _begin(cfg, point)
            trainer.train()
            comm.synchronize()  # the next stage reads the checkpoint that the main process writes
            results = getattr(trainer, "_last_eval_results", None) or {}
            del trainer
            point = ResumePoint(stage.final_checkpoint, stage.end, plan.seed)
    return results


def evaluate(
    cfg: CfgNode, resume: bool = False, on_checked: Optional[Callable[[], None]] = None
) -> Dict[str, Any]:
    """
    Evaluate the student alone on DATASETS.TEST; no teacher is built.

    Args:
        resume: take the last checkpoint in OUTPUT_DIR instead of MODEL.WEIGHTS
        on_checked: called once the config has passed the check, before anything is written

    Raises:
        ValueError: nothing to evaluate on, weights that are missing or do not cover the student
    """
    cfg = student_config(cfg)
    check_config(cfg, evaluation=True)
    if on_checked:
        on_checked()
    if not cfg.DATASETS.TEST:
        raise ValueError("DATASETS.TEST is empty: name the data sets to evaluate on.")
    register_datasets(cfg, cfg.MODEL.META_ARCHITECTURE, parts=("TEST",))
    student = build_model(cfg)
    if resume:
        key, weights = "OUTPUT_DIR", last_whole_checkpoint(cfg.OUTPUT_DIR)
    else:
        key, weights = "MODEL.WEIGHTS", cfg.MODEL.WEIGHTS
    if resume and not weights:
        raise ValueError(
            f"OUTPUT_DIR: there is no checkpoint in {cfg.OUTPUT_DIR!r} to evaluate with --resume. "
            "Leave --resume out to evaluate MODEL.WEIGHTS."
        )
    if not weights:
        raise ValueError(
            "MODEL.WEIGHTS is empty: name the checkpoint to evaluate, or add --resume to take the "
            "last one in OUTPUT_DIR."
        )
    load_whole_detector(student, weights, key, cfg)
    return Trainer.test(cfg, student)


def preflight_stage(stage: Stage) -> None:
    """
    Build a later stage's model and evaluate its teacher, so that an error in them stops the run
    before its first step and not days later. Both are freed again: memory is for one teacher.
    """
    logger.info(f"Trying out stage {stage.index} of {stage.count}.")
    with stage.in_errors():
        distiller = build_model(stage.cfg)
        distiller.inherit_from_teacher()
        apply_options(stage.cfg, distiller)
        check_teachers(stage.cfg, distiller, stage.name)


def _ready(
    stage: Stage, seed: int, point: Optional[ResumePoint], teacher_is_checked: bool
) -> Trainer:
    """
    Args:
        point: the last checkpoint of the run so far; None: there is none
        teacher_is_checked: by :func:`preflight_stage`

    Returns:
        the trainer of a stage, which nothing before its first step can stop any more
    """
    if not stage.is_whole_run:
        logger.info(str(stage))
    with stage.in_errors():
        trainer = Trainer(stage.cfg, stage, seed)
    trainer.start_from(point)
    if trainer.start_iter == stage.start and trainer.distiller and not teacher_is_checked:
        with stage.in_errors():
            check_teachers(stage.cfg, trainer.distiller, stage.name)
    return trainer


def _begin(cfg: CfgNode, point: Optional[ResumePoint]) -> None:
    """Take over OUTPUT_DIR, where until now all is as the run before has left it."""
    if not comm.is_main_process():
        return
    with atomic_write(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), "w") as file:
        file.write(cfg.dump())
    end_half_line(os.path.join(cfg.OUTPUT_DIR, "metrics.json"))
    release_facts(cfg.OUTPUT_DIR)
    if point is None and forget_last_checkpoint(cfg.OUTPUT_DIR):
        logger.warning(
            f"OUTPUT_DIR: {cfg.OUTPUT_DIR!r} has an earlier run, which this one replaces."
        )
