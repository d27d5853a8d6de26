"""Check that every distillation loss has an effect, in the first steps and from then on."""

import hashlib
import itertools
import logging
import time
from dataclasses import asdict
from typing import Any, List, Mapping, Optional, Set

import torch
from torch import Tensor, nn

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from ...distiller import Distiller
from ..facts import write_fact
from .head_check import HeadCheck
from .head_parameters import HeadParameters
from .loss_gradients import LossGradients, describe, loss_scale, misled, suggest

logger = logging.getLogger(__name__)


class Liveness(HookBase):
    """
    Monitors the gradient of each loss at the student's pyramid, that the heads train and that the
    teacher stays frozen.

    In a monitored step, the gradient of every loss at every level is computed before the step's own
    backward: a table in the log, scalars in TensorBoard. Between monitored steps nothing is done.
    Training is the same to the bit. Every process measures, because layers such as synchronised
    norms wait for all in their backward; the main one judges.
    """

    def __init__(self, distiller: Distiller, optimizer: torch.optim.Optimizer, cfg: CfgNode):
        """
        Args:
            cfg: of the stage

        Raises:
            ValueError: a parameter of a head that the optimizer does not have, or a head of which
                it would move none
        """
        node = cfg.DISTILL.LIVENESS
        self.distiller, self.output_dir = distiller, cfg.OUTPUT_DIR
        self.period, self.wanted_share = node.PERIOD, node.WANTED_SHARE
        self.parameters = HeadParameters(distiller.heads, optimizer)
        self.checks = {
            name: HeadCheck(name, head, self.parameters, node.FIRST_STEPS)
            for name, head in distiller.heads.items()
        }
        self.were_on: Set[str] = set()  # heads, in any step so far
        self.teachers: List[str] = []  # their fingerprints before the first step
        self.found: Optional[LossGradients] = None  # in the latest monitored step
        self.scale, self.seconds = 1.0, 0.0  # of that step: mixed precision's, and time it took
        self.handle: Any = None

    def before_train(self) -> None:
        self.teachers = self._fingerprints()
        if comm.is_main_process():
            self.parameters.snapshot()

    def before_step(self) -> None:
        iteration = self.trainer.iter
        periodic = self.period > 0 and iteration % self.period == self.period - 1
        schedules = self.distiller.schedules.items()
        on = {x for x, schedule in schedules if schedule(iteration - self.distiller.start_iter)}
        self.were_on |= on
        if not all(self.checks[name].is_done for name in on) or (periodic and on):
            self.handle = self.distiller.register_forward_hook(self._measure)

    def _measure(self, module: nn.Module, inputs: Any, losses: Mapping[str, Tensor]) -> None:
        first, start = self.found is None, time.perf_counter()
        self.scale = loss_scale(self.trainer._trainer)
        self.found = LossGradients.measure(losses, self.distiller.last_step, self.scale)
        self.seconds = time.perf_counter() - start
        if first:
            self._log_table("Before the first step, what each loss does to the student")

    def after_step(self) -> None:
        if self.handle is None:
            return
        self.handle.remove()
        self.handle = None
        self._check_teacher()
        for name, value in self.found.scalars().items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)
        checks = [self.checks[name] for name in self.found.heads]
        due = [x for x in checks if not x.is_done]
        if due:
            # The main process decides for all: they must go on to measure together.
            informative = comm.all_gather([x.name for x in due if self._is_informative(x.name)])[0]
            if not informative:
                return
            due = [x for x in due if x.name in informative]
        is_main = comm.is_main_process()
        for check in due:
            check.add(self.found, is_main)
        done = [x for x in due if x.is_done]
        if done:
            # The main process's errors stop all of them, on other machines too.
            errors = comm.all_gather([x.error() for x in done] if is_main else [])[0]
            if any(errors):
                raise RuntimeError(" ".join(filter(None, errors)))
        if is_main and (done or not due):
            self._warn_inactive([x for x in checks if x not in due])
            self.parameters.snapshot()
            self._log_table("What each loss does to the student")

    def _log_table(self, title: str) -> None:
        if comm.is_main_process():
            iteration = self.trainer.iter - self.distiller.start_iter
            hint = suggest(self.found, self.distiller.schedules, iteration, self.wanted_share)
            took = f"measured in {self.seconds:.2f} s"
            logger.info(f"{title} ({took}):\n{describe(self.found)}\n{hint}")
            warnings = misled(self.found, self.distiller.levels_of_heads)
            for warning in warnings:
                logger.warning(warning)
            hint = " ".join([hint, *warnings])
            facts = {"iteration": self.trainer.iter, "hint": hint, **asdict(self.found)}
            write_fact(self.output_dir, "gradients", **facts)

    def _is_informative(self, head: str) -> bool:
        """False without objects, where losses are 0, and where mixed precision skips the step."""
        skipped = loss_scale(self.trainer._trainer) < self.scale
        return has_boxes(self.distiller, head) and not skipped

    def _warn_inactive(self, checks: List[HeadCheck]) -> None:
        checks = [x for x in checks if has_boxes(self.distiller, x.name)]
        inactive = [x for check in checks for x in check.inactive(self.found)]
        if inactive:
            logger.warning(
                f"Iteration {self.trainer.iter}: what worked in the first steps does nothing now: "
                f"{', '.join(inactive)}."
            )

    def _check_teacher(self) -> None:
        """
        Raises:
            RuntimeError: it is no longer frozen
        """
        for teacher in (x.teacher.model for x in self.distiller.lessons):
            if any(x.training for x in teacher.modules()):
                raise RuntimeError(
                    "The teacher is in training mode. Look for code that calls train()."
                )
            if any(x.requires_grad for x in teacher.parameters()):
                raise RuntimeError("The teacher's parameters require gradients: it must be frozen.")

    def _fingerprints(self) -> List[str]:
        return [fingerprint(x.teacher.model) for x in self.distiller.lessons]

    def after_train(self) -> None:
        if self.trainer.iter < self.trainer.max_iter:
            return  # another error is being raised, and must not be hidden
        unchecked = sorted(name for name in self.were_on if not self.checks[name].is_done)
        if unchecked:
            logger.warning(
                f"The run had fewer than {self.checks[unchecked[0]].steps} steps with objects in "
                f"which {', '.join(unchecked)} was on: whether it works was not checked."
            )
        if self._fingerprints() != self.teachers:
            raise RuntimeError(
                "The teacher's parameters or buffers changed during training: the student did not "
                "learn from the teacher that DISTILL.TEACHER names. Look for code of your own that "
                "writes to it or trains it."
            )


def has_boxes(distiller: Distiller, head: str) -> bool:
    """Whether any image of the batch has an object of a class that the head's teacher has too."""
    student = distiller.last_step.student
    if any("instances" not in x for x in student.batched_inputs):
        return True  # without labels, nobody knows better
    classes = torch.cat([x.gt_classes for x in student.gt_instances])
    lesson = next(x for x in distiller.lessons if head in x.heads)
    return len(lesson.of_its_classes(classes)) > 0


def fingerprint(module: nn.Module) -> str:
    """sha256 of all parameters and buffers, by name; also of buffers that are not saved."""
    digest = hashlib.sha256()
    for key, value in itertools.chain(module.named_parameters(), module.named_buffers()):
        digest.update(key.encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
