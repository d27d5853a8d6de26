"""Prove in the first steps that each term of the distillation does something."""

import hashlib
import logging
import time
from typing import Any, Dict, List, Mapping

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..distiller import Distiller
from ..views import DetectorView
from .loss_gradients import LossGradients, describe, suggest_weights

logger = logging.getLogger(__name__)


class Liveness(HookBase):
    """
    Watch what each loss does to the student's pyramid, that the heads train and the teacher rests.

    In a watched step, the gradient of every loss at every level is taken before the step's own
    backward: a table in the log, scalars in TensorBoard. Between watched steps nothing is done.
    Training is the same to the bit. Runs on the main process.
    """

    def __init__(self, distiller: Distiller, optimizer: torch.optim.Optimizer, cfg: CfgNode):
        """
        Args:
            cfg: of the stage

        Raises:
            ValueError: a parameter of a head that the optimizer does not have
        """
        node = cfg.DISTILL.LIVENESS
        _check_optimizer(distiller, optimizer)
        self.distiller = distiller
        self.first_steps, self.period = node.FIRST_STEPS, node.PERIOD
        self.wanted_share = node.WANTED_SHARE
        self.loss_weights = {name: cfg.DISTILL[name].LOSS_WEIGHT for name in distiller.heads}
        self.seen: Dict[str, List[LossGradients]] = {}  # by head, in its first steps
        self.handle: Any = None

    def before_train(self) -> None:
        self.teacher = fingerprint(self.distiller.teacher.model)
        self.initial = {k: p.detach().clone() for k, p in self.distiller.heads.named_parameters()}

    def before_step(self) -> None:
        iteration = self.trainer.iter
        periodic = self.period > 0 and iteration % self.period == self.period - 1
        if periodic or self._unproved(iteration - self.distiller.start_iter):
            self.handle = self.distiller.register_forward_hook(self._look)

    def _unproved(self, iteration: int) -> List[str]:
        """Heads that are on and have not been watched often enough."""
        schedules = self.distiller.schedules
        return [
            name
            for name in self.distiller.heads
            if len(self.seen.get(name, ())) < self.first_steps and schedules[name](iteration)
        ]

    def _look(self, module: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        start = time.perf_counter()
        self.found = LossGradients.measure(losses, self.distiller.latest)
        self.seconds = time.perf_counter() - start

    def after_step(self) -> None:
        if self.handle is None:
            return
        self.handle.remove()
        self.handle = None
        for name, value in self.found.scalars().items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        due = [name for name in self.found.heads if len(self.seen.get(name, ())) < self.first_steps]
        if due and not has_boxes(self.distiller.latest["student"]):
            return  # where a loss on objects is rightly 0
        for name in due:
            self.seen.setdefault(name, []).append(self.found)
            if len(self.seen[name]) == self.first_steps:
                self._prove(name)
        if not due or any(len(self.seen[name]) == self.first_steps for name in due):
            logger.info(
                f"What each loss does to the student (a look of {self.seconds:.2f} s):\n"
                f"{describe(self.found)}\n"
                f"{suggest_weights(self.found, self.loss_weights, self.wanted_share)}"
            )

    def _prove(self, name: str) -> None:
        """
        Raises:
            RuntimeError: a term of the head does nothing, or its parameters do not train
        """
        problems, keys = [], self.seen[name][0].heads[name]
        terms = {key: [found.losses[key] for found in self.seen[name]] for key in keys}
        some_work = any(x.norm > 0 for steps in terms.values() for x in steps)
        for key, steps in terms.items():
            if some_work and all(x.value == 0 for x in steps):
                logger.warning(f"{key} is 0: it has no weight, or nothing to learn from.")
            elif not any(x.norm > 0 for x in steps):
                problems.append(f"{key} has no gradient at the student's pyramid")
            elif len({x.value for x in steps}) == 1:
                problems.append(f"{key} is constant, {steps[0].value:g}")
        mine = {
            k: p for k, p in self.distiller.heads.named_parameters() if k.startswith(f"{name}.")
        }
        if mine and all(torch.equal(p.detach(), self.initial[k]) for k, p in mine.items()):
            problems.append(f"none of the {len(mine)} parameters of {name} has changed")
        if problems:
            raise RuntimeError(
                f"Distillation does not work: in the first {self.first_steps} steps of {name}, "
                f"{'; '.join(problems)}. (DISTILL.LIVENESS.ENABLED False goes on all the same.)"
            )

    def after_train(self) -> None:
        if fingerprint(self.distiller.teacher.model) != self.teacher:
            raise RuntimeError(
                "The teacher's parameters or buffers changed during training: the student did not "
                "learn from the teacher that DISTILL.TEACHER names. Look for code of your own that "
                "writes to it or trains it."
            )


def has_boxes(student: DetectorView) -> bool:
    """Whether any image of the batch has an object."""
    return any(len(x) for x in student.gt_instances)


def fingerprint(module: nn.Module) -> str:
    """sha256 of all parameters and buffers, by name."""
    digest = hashlib.sha256()
    for key, value in module.state_dict().items():
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_optimizer(distiller: Distiller, optimizer: torch.optim.Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    parameters = distiller.heads.named_parameters()
    missing = [k for k, p in parameters if p.requires_grad and id(p) not in held]
    if missing:
        raise ValueError(
            f"The optimizer does not have {', '.join(missing[:3])} of the heads: they would never "
            "train."
        )


def liveness_hooks(
    model: nn.Module, optimizer: torch.optim.Optimizer, cfg: CfgNode
) -> List[HookBase]:
    """[] for a student alone, on other processes than the main one, or where it is switched off."""
    distils = getattr(model, "teacher", None) is not None
    if not (distils and cfg.DISTILL.LIVENESS.ENABLED and comm.is_main_process()):
        return []
    return [Liveness(model, optimizer, cfg)]
