"""Whether a head works, judged by its first measured steps."""

import logging
import math
from typing import Dict, List

from torch import nn

from ...heads.registry import compared_levels
from .head_parameters import HeadParameters
from .loss_gradients import TASK, LossGradient, LossGradients

logger = logging.getLogger(__name__)


class HeadCheck:
    """
    Collects the first measured steps in which a head is on: the gradients of its losses and
    parameters.
    """

    def __init__(self, name: str, head: nn.Module, parameters: HeadParameters, steps: int):
        """
        Args:
            name: in DISTILL.HEADS
            parameters: of all heads
            steps: how many to collect
        """
        self.name, self.parameters, self.steps = name, parameters, steps
        # A head without the pair's levels does not say which it should reach.
        self.levels = {x.student for x in compared_levels(head)}
        self.measured: List[LossGradients] = []

    @property
    def is_done(self) -> bool:
        return len(self.measured) >= self.steps

    def add(self, found: LossGradients, is_main: bool) -> None:
        """
        Add a step, before its gradients are cleared.

        Args:
            is_main: this is the process that judges the head
        """
        self.measured.append(found)
        if is_main:
            self.parameters.record_gradients(self.name)

    def error(self) -> str:
        """
        What is wrong: a loss without effect, parameters that do not train; "" if nothing is. What
        may have a good reason is logged as a warning.
        """
        problems = self._problems()
        if problems:
            return (
                f"Distillation does not work: in the first {self.steps} steps of {self.name}, "
                f"{'; '.join(problems)}. (DISTILL.LIVENESS.ENABLED False goes on all the same.)"
            )
        levels = self._levels_without_gradient()
        untrained = [f"{', '.join(levels)} (no gradient there)"] if levels else []
        untrained += self.parameters.untrained(self.name)
        if untrained:
            logger.warning(
                f"In its first {self.steps} steps, {self.name} did not train everything, which may "
                f"be right where there is nothing to learn: {'; '.join(untrained)}."
            )
        return ""

    def inactive(self, now: LossGradients) -> List[str]:
        """What worked in the first steps and has no effect in a later one, with the evidence."""
        worked = [k for k, steps in self._terms().items() if any(x.norm for x in steps)]
        losses = {k: now.losses[k] for k in now.heads[self.name]}
        without = [k for k in worked if k not in losses or not losses[k].norm]
        stuck = self.parameters.stuck(self.name)
        return [f"{k} (no gradient in this step)" for k in without] + [
            f"{k} (has not moved since the last check)" for k in stuck
        ]

    def _problems(self) -> List[str]:
        problems, terms = [], self._terms()
        if not self.measured[-1].losses[TASK].levels:
            logger.warning("The student's pyramid is frozen: no loss has a gradient there.")
            return self.parameters.problems(self.name)
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
        return problems + self.parameters.problems(self.name)

    def _terms(self) -> Dict[str, List[LossGradient]]:
        """Each loss of the head to its gradients in the measured steps."""
        terms: Dict[str, List[LossGradient]] = {}
        for found in self.measured:
            for key in found.heads[self.name]:
                terms.setdefault(key, []).append(found.losses[key])
        return terms

    def _levels_without_gradient(self) -> List[str]:
        """Levels that the head should distil, but at which none of its losses had a gradient."""
        steps = [x for steps in self._terms().values() for x in steps]
        found = []
        for level in self.measured[-1].losses[TASK].levels:
            values = [x.terms[level] for x in steps if level in x.terms]
            wanted = any(values) or (level in self.levels and not values)
            if wanted and not any(x.levels[level] for x in steps):
                found.append(level)
        return found
