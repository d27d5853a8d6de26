"""Detectron2's optimizer from SOLVER, and gradient clipping over the whole model."""

import itertools
from typing import Any

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    Detectron2's optimizer for the student and the distillation heads.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" clips the norm of all gradients together to
    CLIP_VALUE, which the published recipes of MGD and FGD do (35); Detectron2's own "norm" clips
    each parameter by itself.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return build_detectron2_optimizer(cfg, model)
    max_norm, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = build_detectron2_optimizer(cfg, model)

    # Runs after AMP's unscaling, on what step() is about to use.
    def clip_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = itertools.chain(*(group["params"] for group in optimizer.param_groups))
        nn.utils.clip_grad_norm_(params, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip_all)
    return optimizer
