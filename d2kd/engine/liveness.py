"""Prove in the first steps that each term of the distillation does something."""

import hashlib
import itertools
import logging
import math
import time
from typing import Any, Dict, List, Mapping

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ..distiller import Distiller
from ..views import DetectorView
from .head_parameters import HeadParameters
from .loss_gradients import TASK, LossGradient, LossGradients, describe, suggest_weights

logger = logging.getLogger(__name__)


class Liveness(HookBase):
    """
    Watch what each loss does to the student's pyramid, that the heads train and the teacher rests.

    In a watched step, the gradient of every loss at every level is taken before the step's own
    backward: a table in the log, scalars in TensorBoard. Between watched steps nothing is done.
    Training is the same to the bit. Every process looks, because layers such as synchronised norms
    wait for all in their backward; the main one judges.
    """

    def __init__(self, distiller: Distiller, optimizer: torch.optim.Optimizer, cfg: CfgNode):
        """
        Args:
            cfg: of the stage

        Raises:
            ValueError: a value of DISTILL.LIVENESS outside its range, or a parameter of a head that
                the optimizer does not have, or not with a learning rate
        """
        node = cfg.DISTILL.LIVENESS
        if node.FIRST_STEPS < 2 or node.PERIOD < 0 or not 0 < node.WANTED_SHARE < 1:
            raise ValueError(
                "DISTILL.LIVENESS: FIRST_STEPS must be 2 or more, PERIOD 0 or more and WANTED_SHARE"
                f" in (0, 1), got {node.FIRST_STEPS}, {node.PERIOD} and {node.WANTED_SHARE}."
            )
        self.parameters = HeadParameters(distiller.heads, optimizer)
        self.distiller = distiller
        self.first_steps, self.period = node.FIRST_STEPS, node.PERIOD
        self.wanted_share = node.WANTED_SHARE
        self.loss_weights = {name: cfg.DISTILL[name].LOSS_WEIGHT for name in distiller.heads}
        self.seen: Dict[str, List[LossGradients]] = {}  # by head that was on, in its first steps
        self.handle: Any = None

    def before_train(self) -> None:
        self.teacher = fingerprint(self.distiller.teacher.model)
        self.parameters.remember()

    def before_step(self) -> None:
        iteration = self.trainer.iter
        periodic = self.period > 0 and iteration % self.period == self.period - 1
        schedules = self.distiller.schedules
        on = [x for x, schedule in schedules.items() if schedule(iteration - self._start)]
        if any(map(self._unproved, on)) or (periodic and on):
            self.handle = self.distiller.register_forward_hook(self._look)

    @property
    def _start(self) -> int:
        return self.distiller.start_iter

    def _unproved(self, name: str) -> bool:
        return len(self.seen.setdefault(name, [])) < self.first_steps

    def _look(self, module: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        start = time.perf_counter()
        scaler = getattr(self.trainer._trainer, "grad_scaler", None)
        self.scale = scaler.get_scale() if scaler else 1.0
        self.found = LossGradients.measure(losses, self.distiller.latest, self.scale)
        self.seconds = time.perf_counter() - start

    def after_step(self) -> None:
        if self.handle is None:
            return
        self.handle.remove()
        self.handle = None
        self._check_teacher()
        for name, value in self.found.scalars().items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        due = [name for name in self.found.heads if self._unproved(name)]
        # Of all processes alike: they must go on to look together.
        if due and not all(comm.all_gather(self._proves_something())):
            return
        for name in due:
            self.seen[name].append(self.found)
            self.parameters.look(name)
        if not comm.is_main_process():
            return
        proved = [name for name in due if not self._unproved(name)]
        for name in proved:
            self._prove(name)
        if not due or proved:
            self._warn_of_the_dead([name for name in self.found.heads if name not in due])
            self.parameters.remember()
            logger.info(
                f"What each loss does to the student (a look of {self.seconds:.2f} s):\n"
                f"{describe(self.found)}\n"
                f"{suggest_weights(self.found, self.loss_weights, self.wanted_share)}"
            )

    def _proves_something(self) -> bool:
        """Not where a loss on objects is rightly 0, nor where mixed precision skips a step."""
        scaler = getattr(self.trainer._trainer, "grad_scaler", None)
        skipped = scaler is not None and scaler.get_scale() < self.scale
        return has_boxes(self.distiller.latest["student"]) and not skipped

    def _prove(self, name: str) -> None:
        """
        Raises:
            RuntimeError: a term of the head does nothing, or its parameters do not train
        """
        problems, terms = [], self._terms(name)
        some_work = any(x.norm > 0 for steps in terms.values() for x in steps)
        for key, steps in terms.items():
            if not all(math.isfinite(x.norm) for x in steps):
                problems.append(f"{key} has a gradient that is not finite")
            elif some_work and all(x.value == 0 and x.norm == 0 for x in steps):
                logger.warning(f"{key} is 0: it has no weight, or nothing to learn from.")
            elif not any(x.norm > 0 for x in steps):
                problems.append(f"{key} has no gradient at the student's pyramid")
            elif len(steps) > 1 and len({x.term for x in steps}) == 1:
                problems.append(f"{key} is constant, {steps[0].term:g}")
        if not terms:
            problems.append("it returned no loss")
        problems += self.parameters.problems(name)
        if problems:
            raise RuntimeError(
                f"Distillation does not work: in the first {self.first_steps} steps of {name}, "
                f"{'; '.join(problems)}. (DISTILL.LIVENESS.ENABLED False goes on all the same.)"
            )
        levels = self._silent_levels(name)
        resting = [f"{', '.join(levels)} (no gradient there)"] if levels else []
        resting += self.parameters.resting(name)
        if resting:
            logger.warning(
                f"In its first {self.first_steps} steps, {name} did not train everything, which "
                f"may be right where there is nothing to learn: {'; '.join(resting)}."
            )

    def _terms(self, name: str) -> Dict[str, List[LossGradient]]:
        """Each loss of a head to what it did in the first steps."""
        terms: Dict[str, List[LossGradient]] = {}
        for found in self.seen[name]:
            for key in found.heads[name]:
                terms.setdefault(key, []).append(found.losses[key])
        return terms

    def _silent_levels(self, name: str) -> List[str]:
        """Levels that the head is to distil and that none of its losses had a gradient for."""
        steps = [x for steps in self._terms(name).values() for x in steps]
        pairs = getattr(self.distiller.heads[name], "levels", ())
        named = {getattr(pair, "student", None) for pair in pairs}
        silent = []
        for level in self.found.losses[TASK].levels:
            told = [x.terms[level] for x in steps if level in x.terms]
            if any(told) or (level in named and not told):
                if not any(x.levels[level] for x in steps):
                    silent.append(level)
        return silent

    def _warn_of_the_dead(self, names: List[str]) -> None:
        """Of heads that worked in their first steps and are on."""
        if not (names and has_boxes(self.distiller.latest["student"])):
            return
        dead = []
        for name in names:
            worked = {k for k, steps in self._terms(name).items() if any(x.norm for x in steps)}
            losses = {k: self.found.losses[k] for k in self.found.heads[name]}
            dead += [
                f"{k} (no gradient in this step)"
                for k in worked
                if k not in losses or not losses[k].norm
            ]
            stuck = self.parameters.stuck(name)
            dead += [f"{k} (has not moved since the last look)" for k in stuck]
        if dead:
            logger.warning(
                f"Iteration {self.trainer.iter}: what worked in the first steps does nothing now: "
                f"{', '.join(dead)}."
            )

    def _check_teacher(self) -> None:
        """
        Raises:
            RuntimeError: it could change from now on
        """
        teacher = self.distiller.teacher.model
        if any(x.training for x in teacher.modules()):
            raise RuntimeError("The teacher is in training mode. Look for code that calls train().")
        if any(x.requires_grad for x in teacher.parameters()):
            raise RuntimeError("The teacher's parameters require gradients: it must be frozen.")

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # an error is on its way, and must not be hidden by another
        unproved = [name for name in self.seen if self._unproved(name)]
        if unproved:
            logger.warning(
                f"The run had less than {self.first_steps} steps with objects in which "
                f"{', '.join(unproved)} was on: that it works is not proved."
            )
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
    """sha256 of all parameters and buffers, by name; also of buffers that are not saved."""
    digest = hashlib.sha256()
    for key, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def liveness_hooks(
    model: nn.Module, optimizer: torch.optim.Optimizer, cfg: CfgNode
) -> List[HookBase]:
    """[] for a student alone, or where it is switched off."""
    distils = getattr(model, "teacher", None) is not None
    if not (distils and cfg.DISTILL.LIVENESS.ENABLED):
        return []
    return [Liveness(model, optimizer, cfg)]
