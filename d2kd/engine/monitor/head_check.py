"""Whether a head works, judged by its first watched steps."""

import logging
import math
from typing import Dict, List

from torch import nn

from .head_parameters import HeadParameters
from .loss_gradients import TASK, LossGradient, LossGradients

logger = logging.getLogger(__name__)


class HeadProof:
    """The first steps of one head that is on: what its losses did, and what became of it."""

    def __init__(self, name: str, head: nn.Module, parameters: HeadParameters, steps: int):
        """
        Args:
            name: in DISTILL.HEADS
            parameters: of all heads
            steps: that are to be watched
        """
        self.name, self.parameters, self.steps = name, parameters, steps
        # Of a head that does not have the pair's levels it is not known which it should reach.
        self.levels = {getattr(x, "student", None) for x in getattr(head, "levels", ())}
        self.seen: List[LossGradients] = []

    @property
    def is_done(self) -> bool:
        return len(self.seen) >= self.steps

    def add(self, found: LossGradients, judged_here: bool) -> None:
        """
        After a step, before its gradients are cleared.

        Args:
            judged_here: by this process
        """
        self.seen.append(found)
        if judged_here:
            self.parameters.look(self.name)

    def verdict(self) -> str:
        """
        What is wrong: a term that does nothing, parameters that do not train; "" if nothing is.
        What may be right is named in the log.
        """
        problems = self._problems()
        if problems:
            return (
                f"Distillation does not work: in the first {self.steps} steps of {self.name}, "
                f"{'; '.join(problems)}. (DISTILL.LIVENESS.ENABLED False goes on all the same.)"
            )
        levels = self._silent_levels()
        resting = [f"{', '.join(levels)} (no gradient there)"] if levels else []
        resting += self.parameters.untrained(self.name)
        if resting:
            logger.warning(
                f"In its first {self.steps} steps, {self.name} did not train everything, which may "
                f"be right where there is nothing to learn: {'; '.join(resting)}."
            )
        return ""

    def dead(self, now: LossGradients) -> List[str]:
        """What worked in the first steps and does nothing in a later one, with how that is seen."""
        worked = [k for k, steps in self._terms().items() if any(x.norm for x in steps)]
        losses = {k: now.losses[k] for k in now.heads[self.name]}
        silent = [k for k in worked if k not in losses or not losses[k].norm]
        stuck = self.parameters.stuck(self.name)
        return [f"{k} (no gradient in this step)" for k in silent] + [
            f"{k} (has not moved since the last look)" for k in stuck
        ]

    def _problems(self) -> List[str]:
        problems, terms = [], self._terms()
        if not self.seen[-1].losses[TASK].levels:
            logger.warning(
                "The student's pyramid is frozen: no loss has a gradient to look at there."
            )
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
        """Each loss of the head to what it did in its steps."""
        terms: Dict[str, List[LossGradient]] = {}
        for found in self.seen:
            for key in found.heads[self.name]:
                terms.setdefault(key, []).append(found.losses[key])
        return terms

    def _silent_levels(self) -> List[str]:
        """Levels that the head is to distil and that none of its losses had a gradient for."""
        steps = [x for steps in self._terms().values() for x in steps]
        silent = []
        for level in self.seen[-1].losses[TASK].levels:
            told = [x.terms[level] for x in steps if level in x.terms]
            wanted = any(told) or (level in self.levels and not told)
            if wanted and not any(x.levels[level] for x in steps):
                silent.append(level)
        return silent
