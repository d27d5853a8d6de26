"""Checks of a head's output: names, scalars, no loss weight, 0 for equal detectors."""

from typing import Any, Sequence, Set

import torch
from torch import Tensor, nn

from ..distiller import Distiller
from ..heads.registry import losses_by_level
from ..views import DetectorView
from .batches import batch
from .case import Case
from .requires import watch_views

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)
# By how much a loss may change when each image is twice in the batch. A sum over images doubles;
# measured maximum for d2kd's own heads, some of which draw other masks and regions then: 0.2.
BATCH_BOUND = 0.4


def check_names(case: Case) -> None:
    """
    `forward` returns {"loss_...": scalar, or {level: scalar}}: finite, float32, connected to the
    student, with names different from the student's own losses. It reads only what `requires`
    declares, and leaves it as it is. Maps in `self.maps` are (N, 1, H, W), detached.
    """
    distiller = case.fresh()
    watch_views(case, distiller)
    own: Set[str] = set()
    seen = []
    distiller.student.register_forward_hook(lambda module, inputs, losses: own.update(losses))
    distiller.heads[case.name].register_forward_hook(
        lambda module, inputs, output: seen.append(
            _check_output(case, output, own, distiller.last_step.student)
        )
    )
    distiller.heads[case.name].register_forward_hook(
        lambda module, inputs, output: _check_maps(case, getattr(module, "maps", {}), inputs[0])
    )
    case.losses(distiller)
    assert seen, (
        f"{case}: the head was not called as head(student, teacher), although its weight is "
        f"{case.cfg.DISTILL[case.name].LOSS_WEIGHT}. A default LOSS_WEIGHT of 0 switches it off."
    )


def _check_output(case: Case, output: Any, own: Set[str], student: DetectorView) -> None:
    try:
        losses = losses_by_level(case.name, output)
    except ValueError as error:
        raise AssertionError(f"{case}: {error}") from error
    assert losses, f"{case}: forward returns no loss, but an empty dict."
    for key, levels in losses.items():
        assert key not in own, f"{case}: the student has its own loss {key!r}; use another name."
        for level, x in levels.items():
            label = f"{key}[{level!r}]" if level != "" else key
            _check_scalar(case, label, x, list(student.features.values()))


def _check_maps(case: Case, maps: Any, student: DetectorView) -> None:
    count = len(student.image_sizes)
    for name, levels in maps.items():
        for level, x in levels.items():
            label = f"{case}: self.maps[{name!r}][{level!r}]"
            is_map = x.dim() == 4 and x.shape[:2] == (count, 1)
            assert is_map, f"{label} is {tuple(x.shape)}; it must be ({count}, 1, H, W)."
            assert not x.requires_grad, f"{label} is not detached: it keeps the step in memory."


def _check_scalar(case: Case, label: str, x: Tensor, features: Sequence[Tensor]) -> None:
    assert x.dtype in (torch.float32, torch.float64), (
        f"{case}: {label} is {x.dtype}, in which sums overflow or lose small addends; compute the "
        "loss on x.float()."
    )
    assert x.isfinite(), f"{case}: {label} is {x.item()} on noise images; look for log(0), 0/0."
    # Also where the gradient is 0, as of a softmax over a single cell, and not by an adapter alone.
    assert x.requires_grad and any(
        g is not None
        for g in torch.autograd.grad(x, features, retain_graph=True, allow_unused=True)
    ), (
        f"{case}: {label} is not connected to the student, which would not learn from it. Look for "
        ".detach(), .item(), .data or torch.no_grad() on the student's side."
    )


def check_weight(case: Case) -> None:
    """
    LOSS_WEIGHT is applied once, by the Distiller: doubling it doubles every loss. The same step
    with the same seeds has the same losses.
    """
    cfg = case.cfg.clone()
    cfg.defrost()
    cfg.DISTILL[case.name].LOSS_WEIGHT *= 2
    once, again, twice = (
        case.terms(case.with_new_head(x, seed=1)) for x in (case.cfg, case.cfg, cfg)
    )
    for key in once:
        a, b = once[key].item(), again[key].item()
        assert abs(b - a) <= 1e-4 * abs(a), (
            f"{case}: {key} is {a:.6g}, and {b:.6g} in the same step with the same seeds: a run "
            "could not be resumed exactly. Draw with torch, numpy or random, which are seeded."
        )
        b = twice[key].item()
        assert abs(b - 2 * a) <= 1e-4 * abs(2 * a), (
            f"{case}: {key} is {a:.6g}, and {b:.6g} with DISTILL.{case.name}.LOSS_WEIGHT doubled, "
            f"{b / a if a else float('nan'):.4g} times as much. The Distiller multiplies by "
            "LOSS_WEIGHT and the schedule; the head must return the loss without it."
        )


def check_batch_size(case: Case) -> None:
    """The loss is a mean over images: with each of them twice in the batch it is about the same."""
    inputs = batch()
    once, twice = (case.terms(case.fresh(), images) for images in (inputs, inputs + inputs))
    for key, a, b in ((k, x.item(), twice[k].item()) for k, x in once.items()):
        assert abs(b - a) <= BATCH_BOUND * abs(a), (
            f"{case}: {key} is {a:.4g}, and {b:.4g} with each image twice in the batch. Take the "
            "mean over images, not the sum: the weight would depend on the number of images of a "
            "process, and so on the number of GPUs."
        )


def check_zero_at_equal(case: Case) -> None:
    """If `zero_at_equal` is declared, the loss between identical detectors is 0."""
    distiller = _twins(case)
    equal = sum(x.item() for x in case.terms(distiller).values())
    step = distiller.last_step
    for level, x in step.student.features.items():
        torch.testing.assert_close(x, step.teacher.features[level])  # precondition
    with torch.no_grad():
        for p in distiller.student.parameters():
            p += 0.1 * p.abs().mean() * torch.randn_like(p)
    other = sum(x.item() for x in case.terms(distiller).values())
    assert other > 0 and abs(equal) < 1e-3 * other, (
        f"{case}: zero_at_equal is declared, but the loss between two equal detectors is "
        f"{equal:.3g}, and {other:.3g} when the student's weights are disturbed. Either the two "
        "sides are not treated alike (adapters, dropout, other cells), or zero_at_equal = False."
    )


def _twins(case: Case) -> Distiller:
    """A Distiller whose student has the teacher's weights, with norms in eval mode, too."""
    distiller = case.fresh()
    distiller.student.load_state_dict(distiller.teacher.model.state_dict())
    for module in distiller.student.modules():
        if isinstance(module, NORMS):
            module.eval()
    return distiller
