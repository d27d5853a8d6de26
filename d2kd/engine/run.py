"""One run from a config: train, go on, or evaluate. What train_net.py calls in every process."""

import os
from typing import Any, Dict

import torch

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.utils import comm

from ..checkpoint import load_whole_detector
from ..config import student_config
from ..data import register_datasets
from .preflight import check_config
from .trainer import Trainer


def train(cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
    """
    Check the config, train, evaluate.

    Args:
        resume: go on from the last checkpoint in OUTPUT_DIR, if there is one

    Returns:
        Detectron2's results of the last evaluation, {"bbox": {"AP": ...}}; {} on other processes
    """
    check_config(cfg)
    register_datasets(cfg, student_config(cfg).MODEL.META_ARCHITECTURE)
    trainer = Trainer(_with_seed(cfg, resume))
    trainer.resume_or_load(resume)
    trainer.train()
    return getattr(trainer, "_last_eval_results", None) or {}


def evaluate(cfg: CfgNode, resume: bool = False) -> Dict[str, Any]:
    """
    Evaluate the student alone on DATASETS.TEST; no teacher is built.

    Args:
        resume: take the last checkpoint in OUTPUT_DIR instead of MODEL.WEIGHTS

    Raises:
        ValueError: weights that are missing or do not cover the student
    """
    cfg = student_config(cfg)
    check_config(cfg)
    register_datasets(cfg, cfg.MODEL.META_ARCHITECTURE, parts=("TEST",))
    student = build_model(cfg)
    last = DetectionCheckpointer(student, cfg.OUTPUT_DIR).get_checkpoint_file() if resume else ""
    weights = last or cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            "MODEL.WEIGHTS is empty: name the checkpoint to evaluate, or add --resume to take the "
            "last one in OUTPUT_DIR."
        )
    load_whole_detector(student, weights, "MODEL.WEIGHTS")
    return Trainer.test(cfg, student)


def _with_seed(cfg: CfgNode, resume: bool) -> CfgNode:
    """A negative SEED becomes a random one, or, in a resumed run, the one it was begun with."""
    if cfg.SEED >= 0:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    last = os.path.join(cfg.OUTPUT_DIR, "last_checkpoint")
    if resume and os.path.isfile(last):
        with open(last) as file:
            path = os.path.join(cfg.OUTPUT_DIR, file.read().strip())
        cfg.SEED = torch.load(path, map_location="cpu")["trainer"]["seed"]
    else:
        cfg.SEED = comm.shared_random_seed()
    return cfg
