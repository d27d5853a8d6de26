"""The optimizer from SOLVER: Detectron2's SGD or AdamW, clipped also over the whole model."""

import itertools
import re
from contextlib import contextmanager, suppress
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

import torch
from torch import nn

from detectron2.config import CfgNode
from detectron2.solver import build_optimizer as build_detectron2_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping

from ..utils.checks import shown

OPTIMIZERS = ("SGD", "ADAMW")
# Detectron2's, and ours
CLIP_TYPES = ("value", "norm", "full_model")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    """
    SOLVER.OPTIMIZER for the student and the distillation heads: Detectron2's "SGD", or PyTorch's
    "ADAMW" over Detectron2's groups of parameters, so that each has the learning rate and weight
    decay that it has with SGD.

    SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" clips the norm of all gradients together to
    CLIP_VALUE, which the published recipes of MGD and FGD do (35); Detectron2's own "norm" clips
    each parameter by itself.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not (clip.ENABLED and clip.CLIP_TYPE == "full_model"):
        return _without_decay(_of_kind(cfg, model), model)
    max_norm, norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    optimizer = _without_decay(_of_kind(cfg, model), model)

    # Runs after AMP's unscaling, on what step() is about to use.
    def clip_all(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        params = itertools.chain(*(group["params"] for group in optimizer.param_groups))
        nn.utils.clip_grad_norm_(params, max_norm, norm_type)

    optimizer.register_step_pre_hook(clip_all)
    return optimizer


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> List[str]:
    """Names in the order in which the optimizer's state numbers its parameters."""
    # A student alone has the same names inside and outside a Distiller.
    names = {id(p): re.sub("^student[.]", "", k) for k, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def placed_state(
    optimizer: torch.optim.Optimizer,
    names: List[str],
    saved: Dict[str, Any],
    saved_names: Optional[List[str]],
) -> Dict[str, Any]:
    """
    State for an optimizer that may have other parameter groups: the saved state of each parameter
    is assigned by name, while learning rate, momentum and weight decay stay the optimizer's.

    Args:
        names: from parameter_names
        saved: state of the optimizer in a checkpoint
        saved_names: its parameters; None: a checkpoint without them, whose groups are the same

    Raises:
        ValueError: the saved state is of another optimizer, or of other parameters
    """
    new = optimizer.state_dict()
    kinds = [_kind_of(state) for state in (saved, new)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"SOLVER.OPTIMIZER: the checkpoint's is {kinds[0]}, now {kinds[1]}, which cannot go on "
            "from what the other remembers of each parameter. Resume with the checkpoint's, or "
            "give this run an OUTPUT_DIR of its own; its MODEL.WEIGHTS may name this checkpoint."
        )
    if saved_names is None:
        sizes = [[len(x["params"]) for x in state["param_groups"]] for state in (saved, new)]
        saved_names = names if sizes[0] == sizes[1] else ["a group of parameters"]
    other = sorted(set(names) ^ set(saved_names))
    if other:
        raise ValueError(
            f"The checkpoint's optimizer trained other parameters: {other[0]} is not in both. Give "
            "this run an OUTPUT_DIR of its own."
        )
    place = {name: i for i, name in enumerate(names)}
    state = {place[saved_names[i]]: value for i, value in saved["state"].items()}
    return {**new, "state": state}


@contextmanager
def schedule_in_errors(cfg: CfgNode) -> Iterator[None]:
    """Add the keys of a learning-rate schedule to Detectron2's errors about it."""
    try:
        yield
    except (AssertionError, ValueError, ZeroDivisionError) as error:
        names = ("LR_SCHEDULER_NAME", "BASE_LR", "STEPS", "WARMUP_METHOD", "WARMUP_ITERS")
        values = ", ".join(f"SOLVER.{x} {cfg.SOLVER[x]!r}" for x in names)
        raise ValueError(f"No learning-rate schedule: {error} ({values}).") from error


def _of_kind(cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
    solver = cfg.SOLVER
    if solver.OPTIMIZER == "SGD":
        return build_detectron2_optimizer(cfg, model)
    params = get_default_optimizer_params(
        model,
        base_lr=solver.BASE_LR,
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    kind = maybe_add_gradient_clipping(cfg, torch.optim.AdamW)
    settings = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY}
    # One kernel for all parameters takes a third of the time of foreach on a CPU, where PyTorch has
    # it from 2.4 on. With AMP it would unscale the gradients itself, after they were clipped.
    if not solver.AMP.ENABLED:
        with suppress(RuntimeError):
            return kind(_joined(params), **settings, fused=True)
    return kind(_joined(params), **settings, foreach=True)


def _joined(groups: Iterable[Dict[str, Any]]) -> List[Dict[str, Any]]:
    """
    Groups of equal settings as one. Detectron2 0.5 makes one of each parameter, with which a step
    of a small detector took three times as long on a CPU.
    """
    joined: Dict[Tuple, List[nn.Parameter]] = {}
    for group in groups:
        settings = tuple((k, v) for k, v in group.items() if k != "params")
        joined.setdefault(settings, []).extend(group["params"])
    return [{**dict(settings), "params": params} for settings, params in joined.items()]


def _kind_of(state: Dict[str, Any]) -> str:
    """SOLVER.OPTIMIZER of an optimizer's state, by what it keeps of its groups."""
    return "ADAMW" if "betas" in state["param_groups"][0] else "SGD"


def _without_decay(optimizer: torch.optim.Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """
    Move the parameters that a head lists in `no_weight_decay` to groups of their own.

    Raises:
        ValueError: a name in it that is no parameter
    """
    spared = {id(p) for module in model.modules() for p in _spared(module)}
    for group in list(optimizer.param_groups):
        mine = [p for p in group["params"] if id(p) in spared]
        if mine and group["weight_decay"]:
            group["params"] = [p for p in group["params"] if id(p) not in spared]
            optimizer.add_param_group({**group, "params": mine, "weight_decay": 0.0})
    optimizer.param_groups = [x for x in optimizer.param_groups if x["params"]]
    return optimizer


def _spared(module: nn.Module) -> Iterator[nn.Parameter]:
    names, known = getattr(module, "no_weight_decay", ()), dict(module.named_parameters())
    if callable(names):  # of a backbone: timm's and Swin's have a method of this name
        return
    for name in names:
        if name not in known:
            raise ValueError(
                f"{type(module).__name__}.no_weight_decay has {name!r}, which is no parameter of "
                f"it; it has {shown(list(known))}."
            )
        yield known[name]
