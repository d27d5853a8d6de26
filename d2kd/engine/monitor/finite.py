"""Explain which term, level and image made a loss infinite or NaN."""

from itertools import zip_longest
from typing import Any, Dict, List, Mapping, Optional, Sequence

import torch
from torch import Tensor, nn

from detectron2.engine import AMPTrainer, SimpleTrainer

from ...checkpoint import unwrap
from ...step import ByLevel, Step


class LossNotFinite(FloatingPointError):
    """A non-finite loss, with an explanation."""


class FiniteLossMixin:
    """
    For Detectron2's SimpleTrainer and AMPTrainer: stop with an explanation on a non-finite loss.

    Raised before the optimizer steps and before any hook could save, so that the weights and the
    checkpoints on disk are still those of the iteration before.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self._batch: List[Dict[str, Any]] = []
        model.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        self._batch = inputs[0]

    def run_step(self) -> None:
        try:
            super().run_step()
        except LossNotFinite:
            raise
        except FloatingPointError as error:  # of an RPN, before there is a loss
            raise LossNotFinite(self._explain({}, f"Not finite: {error}")) from error

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        # One transfer for all terms; Detectron2 would fetch them one by one.
        values = torch.stack([v.detach().float() for v in loss_dict.values()]).cpu()
        if not values.isfinite().all():
            raise LossNotFinite(self._explain(dict(zip(loss_dict, values.tolist()))))
        super()._write_metrics(dict(zip(loss_dict, values)), *args, **kwargs)

    def _explain(self, losses: Dict[str, float], what: str = "") -> str:
        model = unwrap(self.model)
        names = [x.name for x in getattr(model, "lessons", ())]
        step = getattr(model, "last_step", None)
        return explain(losses, step, [_describe(x) for x in self._batch], what, names)


class FiniteSimpleTrainer(FiniteLossMixin, SimpleTrainer):
    """Detectron2's SimpleTrainer that explains a non-finite loss."""


class FiniteAMPTrainer(FiniteLossMixin, AMPTrainer):
    """Detectron2's AMPTrainer that explains a non-finite loss."""


def explain(
    losses: Dict[str, float],
    step: Optional[Step],
    images: List[str],
    what: str = "",
    teachers: Sequence[str] = (),
) -> str:
    """
    Args:
        losses: name to value, some not finite; {} where none has been computed
        step: `Distiller.last_step`; None of a plain detector
        images: of the batch
        what: name of what is not finite; empty: the losses
        teachers: their names, where a step has several
    """
    bad = [k for k, v in losses.items() if not torch.tensor(v).isfinite()]
    lines = [what or f"Loss not finite: {', '.join(f'{k} = {losses[k]}' for k in bad)}."]
    for key in bad:
        lines += _bad_levels(key, step.losses.get(key, {}) if step else {})
    if step:
        lines += _bad_features("student", step.student.features)
        for name, teacher in zip_longest(teachers, step.teachers, fillvalue=""):
            lines += _bad_features(f"teacher {name}".rstrip(), teacher.features)
    lines.append("  images of the batch: " + ", ".join(images))
    if losses:
        lines.append(f"  all losses: { {k: round(v, 4) for k, v in losses.items()} }")
    lines.append(
        "  Nothing was saved. Usual causes: a learning rate or loss weight that is too high, AMP "
        "without enough range, a broken image."
    )
    return "\n".join(lines)


def _describe(sample: Dict[str, Any]) -> str:
    """The image's file name, and the number of its values that are not finite."""
    name, image = str(sample.get("file_name", "?")), sample.get("image")
    count = 0 if image is None else int((~image.isfinite()).sum())
    return f"{name} (which has {count} values that are not finite)" if count else name


def _bad_levels(key: str, by_level: ByLevel) -> List[str]:
    levels = [k for k, v in by_level.items() if k and not v.detach().isfinite()]
    return [f"  {key} is not finite at level {', '.join(levels)}"] if levels else []


def _bad_features(side: str, features: Dict[str, Tensor]) -> List[str]:
    counts = {k: int((~v.detach().isfinite()).sum()) for k, v in features.items()}
    return [
        f"  the {side}'s features at {k} have {n} values that are not finite"
        for k, n in counts.items()
        if n
    ]
