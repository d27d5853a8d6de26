"""Gradients of each loss of a step at the student's pyramid."""

import math
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Sequence

import torch
from tabulate import tabulate
from torch import Tensor

from detectron2.engine import SimpleTrainer

from ...pairing.levels import LevelPair
from ...schedule import WeightSchedule
from ...step import Step

TASK = "student's own"


@dataclass
class LossGradient:
    """
    Gradient of one loss. `value`: weighted; `levels`, `norm`: of the gradient at each level, and at
    all together; `cosine`: with the gradient of the student's own losses; `terms`: unweighted
    values by level, or under "" where the head has none by level.
    """

    value: float
    levels: Dict[str, float]
    norm: float
    cosine: float
    terms: Dict[str, float]

    @property
    def term(self) -> float:
        """The value without weight."""
        return sum(self.terms.values())


@dataclass
class LossGradients:
    """`losses`: by name, the student's own as one; `heads`: name of a head to its losses."""

    losses: Dict[str, LossGradient]
    heads: Dict[str, List[str]]

    @classmethod
    def measure(
        cls, losses: Mapping[str, Tensor], step: Step, scale: float = 1.0
    ) -> "LossGradients":
        """
        Args:
            losses: of a step, as the Distiller returns them, before their backward
            step: `Distiller.last_step`
            scale: of :func:`loss_scale`, so that no gradient underflows
        """
        features = {k: v for k, v in step.student.features.items() if v.requires_grad}
        distilled = step.losses
        own = sum(v for k, v in losses.items() if k not in distilled)
        task = _gradient(own, features, scale)
        found = {TASK: _summary(own, task, task, {})}
        for key, levels in distilled.items():
            ours = _gradient(losses[key], features, scale)
            terms = {k: _number(v) for k, v in levels.items()}
            found[key] = _summary(losses[key], ours, task, terms)
        return cls(found, {name: list(terms) for name, terms in step.terms.items()})

    def share(self, key: str, level: str = "") -> float:
        """Share of the sum of all losses' gradient norms, at one level or at all together."""
        norms = {k: x.levels[level] if level else x.norm for k, x in self.losses.items()}
        total = sum(norms.values())
        return norms[key] / total if total else 0.0

    def scalars(self) -> Dict[str, float]:
        """For TensorBoard. Names avoid "loss", as Detectron2 prints every scalar that has it."""
        scalars = {}
        for key in (key for keys in self.heads.values() for key in keys):
            name = key[len("loss_") :]
            scalars[f"gradient_share/{name}"] = self.share(key)
            scalars[f"gradient_cosine/{name}"] = self.losses[key].cosine
            for level, norm in self.losses[key].levels.items():
                scalars[f"gradient_{level}/{name}"] = norm
                scalars[f"gradient_share_{level}/{name}"] = self.share(key, level)
        return scalars


def loss_scale(trainer: SimpleTrainer) -> float:
    """Factor by which mixed precision multiplies losses; 1 without it."""
    scaler = getattr(trainer, "grad_scaler", None)
    return scaler.get_scale() if scaler else 1.0


def describe(found: LossGradients) -> str:
    """
    A table: the norm of each loss's gradient and its share of all losses', at each level and at all
    together, and the cosine with the task's.
    """
    headers, *rows = table(found)
    return tabulate(rows, headers, disable_numparse=True)


def table(found: LossGradients) -> List[List[str]]:
    """The cells of :func:`describe`, headers first."""
    levels = list(found.losses[TASK].levels)
    rows = [["loss", "value", *(f"gradient {k}" for k in levels), "share", "cosine"]]
    for key, x in found.losses.items():
        norms = [f"{x.levels[k]:.2g} ({found.share(key, k):.0%})" for k in levels]
        rows.append([key, f"{x.value:.3g}", *norms, f"{found.share(key):.1%}", f"{x.cosine:.2g}"])
    return rows


def suggest(
    found: LossGradients, schedules: Mapping[str, WeightSchedule], iteration: int, share: float
) -> str:
    """
    For each head the LOSS_WEIGHT with which all heads together, in equal parts, would have the
    wanted share of the gradient of this step, were they neither warmed up nor decayed.

    Args:
        schedules: of each head
        iteration: of this step, as the schedules count
        share: in (0, 1)
    """
    if not found.losses[TASK].norm:
        return "The student's own losses have no gradient to compare with."
    wanted = share / (1 - share) * found.losses[TASK].norm / max(len(found.heads), 1)
    words = []
    for name, keys in found.heads.items():
        norm = sum(found.losses[key].norm for key in keys)
        weight = schedules[name](iteration) * wanted / norm if norm else math.nan
        teacher, _, head = name.rpartition("/")
        of = f" of {teacher}" if teacher else ""
        now = schedules[name].weight
        words.append(f"DISTILL.{head}.LOSS_WEIGHT{of} {weight:.3g} (now {now:g})")
    return f"For a share of {share:g} in a step like this one: {', '.join(words)}."


def misled(found: LossGradients, levels: Mapping[str, Sequence[LevelPair]]) -> List[str]:
    """
    Heads with over 80 % of their gradient on levels where the student's own losses have next to
    none, and what to set. There no object is learnt, and features of a teacher without norms may
    have any size. This is of one step: a small batch may have no object where others have some.

    Args:
        found: of images of the run; the boxes of noise tell nothing
        levels: those of the pair, of each head
    """
    own = found.losses[TASK]
    idle = [k for k, norm in own.levels.items() if norm < 0.01 * own.norm]
    words = []
    for name, keys in found.heads.items():
        whole = math.hypot(*(found.losses[k].norm for k in keys))
        there = math.hypot(*(found.losses[k].levels[level] for k in keys for level in idle))
        if there > 0.8 * whole:
            left = [[p.student, p.teacher] for p in levels[name] if p.student not in idle]
            words.append(
                f"{name} has {there / whole:.0%} of its gradient at {', '.join(idle)}, where the "
                "student's own losses have none: no object of this step is learnt there, and what "
                "the teacher has there drowns the rest."
                + (f' If so in others, DISTILL.LEVELS "{left}" leaves it out.' if left else "")
            )
    return words


def _gradient(loss: Any, features: Mapping[str, Tensor], scale: float) -> Dict[str, Tensor]:
    """Level name to the gradient there, flat and float32; zeros where the loss does not reach."""
    inputs = list(features.values())
    found: Any = [None] * len(inputs)
    if torch.is_tensor(loss) and loss.requires_grad and inputs:
        found = torch.autograd.grad(loss * scale, inputs, retain_graph=True, allow_unused=True)
    return {
        k: torch.zeros(x.numel(), device=x.device) if g is None else g.float().flatten() / scale
        for (k, x), g in zip(features.items(), found)
    }


def _number(x: Any) -> float:
    return float(x.detach() if torch.is_tensor(x) else x)


def _summary(
    loss: Any, ours: Dict[str, Tensor], task: Dict[str, Tensor], terms: Dict[str, float]
) -> LossGradient:
    levels = {k: float(g.norm()) for k, g in ours.items()}
    norm = math.hypot(*levels.values())
    whole = math.hypot(*(float(g.norm()) for g in task.values()))
    dot = sum(float((ours[k] * task[k]).sum()) for k in ours)
    cosine = dot / (norm * whole) if norm and whole else 0.0
    return LossGradient(_number(loss), levels, norm, cosine, terms)
