"""One run from a config: train, go on, or evaluate. What train_net.py calls in every process."""

import gc
import logging
from typing import Any, Dict, Tuple

import torch

from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import build_model
from detectron2.utils import comm

from ..checkpoint import load_whole_detector
from ..config import student_config
from ..config.unread import unread_keys
from ..data import register_datasets
from ..modeling.trainable import check_trainable
from ..weights.run_checkpoints import last_whole_checkpoint
from ..weights.trained_config import check_same_detector
from .preflight.check_config import check_config
from .preflight.teacher_check import check_teacher
from .stages import Stage, plan_stages
from .trainer import Trainer

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
    """
    Check the config, train stage by stage, evaluate.

    Args:
        resume: go on from the last checkpoint in OUTPUT_DIR, if there is one

    Returns:
        Detectron2's results of the last evaluation, {"bbox": {"AP": ...}}; {} on other processes
    """
    check_config(cfg)
    unread = unread_keys(cfg)
    if unread:
        logger.info(f"Set, but not read by this run: {', '.join(unread)}.")
    check_trainable(student_config(cfg))
    register_datasets(cfg, student_config(cfg).MODEL.META_ARCHITECTURE)
    done, seed = _progress(cfg) if resume else (0, -1)
    cfg = DefaultTrainer.auto_scale_workers(_with_seed(cfg, seed), comm.get_world_size())
    stages = plan_stages(cfg)
    # Of a run that is done the last stage: it is only evaluated again.
    stages = [x for x in stages if x.end > done] or stages[-1:]
    for stage in stages:
        _try_out(stage, begun=stage.start < done)
    results: Dict[str, Any] = {}
    for stage in stages:
        gc.collect()  # trainers hold themselves: two teachers would be in memory at a time
        results = _train_stage(stage, done, resume)
        done = stage.end
    return results


def evaluate(cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
    """
    Evaluate the student alone on DATASETS.TEST; no teacher is built.

    Args:
        resume: take the last checkpoint in OUTPUT_DIR instead of MODEL.WEIGHTS

    Raises:
        ValueError: nothing to evaluate on, weights that are missing or do not cover the student
    """
    cfg = student_config(cfg)
    check_config(cfg, evaluation=True)
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
    found = load_whole_detector(student, weights, key)
    check_same_detector(found, cfg, f"{key}: {weights!r}")
    return Trainer.test(cfg, student)


def _train_stage(stage: Stage, done: int, resume: bool) -> Dict[str, Any]:
    """
    Args:
        done: iterations of the run that the last checkpoint has behind it

    Returns:
        as :func:`train`
    """
    if not stage.is_whole_run:
        logger.info(str(stage))
    trainer = Trainer(stage.cfg, stage)
    if 0 < stage.start == done:
        trainer.begin_stage()
    else:
        trainer.resume_or_load(resume)
    if stage.is_whole_run and trainer.start_iter == 0 and trainer.teacher is not None:
        check_teacher(stage.cfg, trainer.teacher, trainer.pair)
    trainer.train()
    comm.synchronize()  # the next stage reads the checkpoint that the main process has written
    return getattr(trainer, "_last_eval_results", None) or {}


def _try_out(stage: Stage, begun: bool) -> None:
    """
    Build a stage's model, and evaluate its teacher unless it has begun: a second teacher that is
    wrong is found now, not after the first.
    """
    if stage.is_whole_run:
        return
    logger.info(f"Trying out stage {stage.index} of {stage.count}.")
    with stage.in_errors():
        distiller = build_model(stage.cfg)
        distiller.inherit_from_teacher()
        if not begun:
            check_teacher(stage.cfg, distiller.teacher, distiller.pair)


def _progress(cfg: CfgNode) -> Tuple[int, int]:
    """
    Returns:
        iterations that the last checkpoint in OUTPUT_DIR has behind it, and the run's seed; (0, -1)
        without a checkpoint, or where neither is needed

    Raises:
        ValueError: a checkpoint that is none of a run
    """
    needed = cfg.SEED < 0 or len(plan_stages(cfg)) > 1  # the file is large
    path = last_whole_checkpoint(cfg.OUTPUT_DIR) if needed else ""
    if not path:
        return 0, -1
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)["trainer"]
        return state["iteration"] + 1, state["seed"]
    except Exception as error:  # whatever the bytes look like to torch.load
        raise ValueError(f"{path} is not a checkpoint to resume from: {error!r}") from error


def _with_seed(cfg: CfgNode, seed: int) -> CfgNode:
    """A negative SEED becomes `seed`, that of the run to resume; a random one if there is none."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SEED = seed if seed >= 0 else comm.shared_random_seed()
    return cfg
