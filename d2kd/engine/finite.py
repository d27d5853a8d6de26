"""Say which term, level and image made a loss infinite or NaN."""

from typing import Any, Dict, List, Mapping

import torch
from torch import Tensor, nn

from detectron2.engine import AMPTrainer, SimpleTrainer

from ..checkpoint import unwrap


class FiniteLossMixin:
    """
    For Detectron2's SimpleTrainer and AMPTrainer: stop with an explanation on a non-finite loss.

    Raised before the optimizer steps and before any hook could save, so that the weights and the
    checkpoints on disk are still those of the iteration before.
    """

    def __init__(self, model: nn.Module, *args: Any, **kwargs: Any):
        super().__init__(model, *args, **kwargs)
        self._file_names: List[str] = []
        model.register_forward_pre_hook(self._remember)

    def _remember(self, module: nn.Module, inputs: Any) -> None:
        self._file_names = [str(x.get("file_name", "?")) for x in inputs[0]]

    def _write_metrics(self, loss_dict: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> None:
        # One transfer for all terms; Detectron2 reads each of them right after anyway.
        values = torch.stack([v.detach().float() for v in loss_dict.values()]).cpu()
        if not values.isfinite().all():
            losses = dict(zip(loss_dict, values.tolist()))
            latest = getattr(unwrap(self.model), "latest", {})
            raise FloatingPointError(explain(losses, latest, self._file_names))
        super()._write_metrics(loss_dict, *args, **kwargs)


class FiniteSimpleTrainer(FiniteLossMixin, SimpleTrainer):
    """Detectron2's SimpleTrainer that explains a non-finite loss."""


class FiniteAMPTrainer(FiniteLossMixin, AMPTrainer):
    """Detectron2's AMPTrainer that explains a non-finite loss."""


def explain(losses: Dict[str, float], latest: Dict[str, Any], file_names: List[str]) -> str:
    """
    Args:
        losses: name to value, some not finite
        latest: `Distiller.latest`, empty for a plain detector
        file_names: images of the batch
    """
    bad = [k for k, v in losses.items() if not torch.tensor(v).isfinite()]
    lines = [f"Loss not finite: {', '.join(f'{k} = {losses[k]}' for k in bad)}."]
    for key in bad:
        lines += _bad_levels(key, latest.get("terms", {}).get(key))
    for side in ("student", "teacher"):
        if side in latest:
            lines += _bad_features(side, latest[side].features)
    lines.append("  images of the batch: " + ", ".join(file_names))
    lines.append(f"  all losses: { {k: round(v, 4) for k, v in losses.items()} }")
    lines.append(
        "  Nothing was saved. Usual causes: a learning rate or loss weight that is too high, AMP "
        "without enough range, a broken image."
    )
    return "\n".join(lines)


def _bad_levels(key: str, term: Any) -> List[str]:
    if not isinstance(term, dict):
        return []
    levels = [k for k, v in term.items() if not v.detach().isfinite()]
    return [f"  {key} is not finite at level {', '.join(levels)}"] if levels else []


def _bad_features(side: str, features: Dict[str, Tensor]) -> List[str]:
    counts = {k: int((~v.detach().isfinite()).sum()) for k, v in features.items()}
    return [
        f"  the {side}'s features at {k} have {n} values that are not finite"
        for k, n in counts.items()
        if n
    ]
