"""Compare a head in float16 with the same head in float32, on equal inputs and random draws."""

import copy
import math
from contextlib import nullcontext
from functools import partial
from typing import Any, Dict, List, NamedTuple, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..distiller import Distiller
from ..heads.registry import compares_logits
from ..utils.autocast import autocast_now
from ..views import DetectorView, Regions
from ..views.map_tensors import map_tensors
from .case import Case, seed_all
from .cuda_autocast import cuda_autocast

# Measured maxima for d2kd's own heads, over all pairs of toy detectors: 0.0001 and 0.044. The
# latter is due to a single ReLU of a generator with an input so close to 0 that float16 changes its
# sign; with Softplus instead it is 0.001.
VALUE_BOUND = 0.005
GRADIENT_BOUND = 0.06
# Loss scale, as with GradScaler; without it, gradients vanish in float16.
SCALE = 1024.0
# Of features that are larger than usual: float16 ends at 65504, below their squares.
LARGE = 1000.0


class Step(NamedTuple):
    """
    `values`: each loss without its weight; `inputs`: gradients of the weighted loss with respect to
    all that the head reads from the student; `parameters`: those with respect to its parameters.
    """

    values: Dict[str, Tensor]
    inputs: List[Tensor]
    parameters: List[Tensor]


def check_mixed_precision(case: Case) -> None:
    """
    Under CUDA's autocast (float16, loss scale 1024) losses are float32 and within 0.5 % of those in
    float32, gradients within 6 %, for the same features, predictions and random draws; and losses
    are finite for features of up to 1000.
    """
    exact, found = compare(case)
    for key, a in exact.values.items():
        b = found.values[key]
        assert b.dtype in (torch.float32, torch.float64), (
            f"{case}: {key} is {b.dtype} under torch.autocast, in which sums overflow or lose "
            "small addends. Compute the loss on x.float(), and matrix products, which autocast "
            "casts to float16 again, under torch.autocast(x.device.type, enabled=False)."
        )
        assert (a - b).abs() <= VALUE_BOUND * a.abs() + 1e-6, (
            f"{case}: {key} is {a:.6g} in float32 and {b:.6g} under torch.autocast, in float16. "
            "Compute softmax, logarithms, norms and sums on x.float(); draw random numbers with "
            "dtype=torch.float32, as float16 gives different ones."
        )
    for what, a, b in (
        ("its inputs from the student", exact.inputs, found.inputs),
        ("its own parameters", exact.parameters, found.parameters),
    ):
        error = relative_error(a, b)
        assert error <= GRADIENT_BOUND, (
            f"{case}: the gradient of {what} has a relative error of {error:.2g} under "
            f"torch.autocast, in float16, at a loss scale of {SCALE:.0f} (inf: it overflows). "
            "Look for divisions by small norms, differences of nearly equal numbers and sums that "
            "are divided later: compute them on x.float(). Draw random numbers with "
            "dtype=torch.float32, as float16 gives different ones."
        )
    for key, x in _of_large_features(case).items():
        assert x.isfinite(), (
            f"{case}: {key} is {x.item()} under torch.autocast, in float16, for features of up to "
            f"{LARGE:.0f}, whose squares float16 does not hold. Compute differences, products and "
            "sums on x.float()."
        )


def runs_in_float16() -> bool:
    """Whether :func:`check_mixed_precision` can run on a CPU with this PyTorch."""
    try:
        x = torch.ones(1, 1, 3, 3, dtype=torch.float16, requires_grad=True)
        F.conv2d(x, x, padding=1).sum().backward()
    except RuntimeError:
        return False
    return hasattr(torch.library, "fallthrough_kernel")


def compare(case: Case, inputs: Sequence[Any] = ()) -> Tuple[Step, Step]:
    """
    Run the head alone in float32 and in float16, on the detectors' outputs in float16.

    Args:
        inputs: a batch; empty: two images with two boxes each
    """
    distiller, head = _after_a_step(case, inputs)
    student, teacher = distiller.last_step.student, distiller.last_step.teacher
    steps = []
    for dtype in (torch.float32, torch.float16):
        distiller.heads[case.name] = copy.deepcopy(head)
        leaves: List[Tensor] = []
        with cuda_autocast() if dtype == torch.float16 else nullcontext():
            views = _view(student, dtype, leaves), _view(teacher, dtype, leaves)
            steps.append(_step(case, distiller, views, leaves))
    return steps[0], steps[1]


def relative_error(exact: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Norm of the difference over the norm of `exact`, over all tensors; inf if not finite."""
    if not all(b.isfinite().all() for b in found):
        return math.inf
    norm = sum(float(a.square().sum()) for a in exact) ** 0.5
    difference = sum(float((a - b).square().sum()) for a, b in zip(exact, found)) ** 0.5
    return difference / norm if norm else difference


def _after_a_step(case: Case, inputs: Sequence[Any] = ()) -> Tuple[Distiller, nn.Module]:
    """A Distiller with its views of a step in float16, and the head as it was before the step."""
    distiller = case.fresh()
    head = copy.deepcopy(distiller.heads[case.name])
    with cuda_autocast():
        case.losses(distiller, inputs)
    return distiller, head


def _of_large_features(case: Case) -> Dict[str, Tensor]:
    """Losses in float16, the largest value of either pyramid being LARGE."""
    distiller, head = _after_a_step(case)
    distiller.heads[case.name] = head
    views = []
    with cuda_autocast():
        for view in (distiller.last_step.student, distiller.last_step.teacher):
            factor = LARGE / max(x.detach().abs().max().item() for x in view.features.values())
            views.append(_view(view, torch.float16, []))
            size, maps = views[-1]._recorded["backbone"]
            views[-1]._recorded["backbone"] = size, map_tensors(
                partial(torch.mul, other=factor), maps
            )
        return _terms(case, distiller, tuple(views))


def _step(
    case: Case,
    distiller: Distiller,
    views: Tuple[DetectorView, DetectorView],
    leaves: Sequence[Tensor],
) -> Step:
    head, terms = distiller.heads[case.name], _terms(case, distiller, views)
    weight = case.cfg.DISTILL[case.name].LOSS_WEIGHT
    (SCALE * weight * sum(terms.values())).backward()
    inputs, parameters = (
        [torch.zeros(()) if x.grad is None else x.grad.float() / SCALE for x in tensors]
        for tensors in (leaves, head.parameters())
    )
    return Step({k: v.detach() for k, v in terms.items()}, inputs, parameters)


def _terms(
    case: Case, distiller: Distiller, views: Tuple[DetectorView, DetectorView]
) -> Dict[str, Tensor]:
    head = distiller.heads[case.name]
    seed_all(0)
    terms = head(*(distiller.lessons[0].comparable(*views) if compares_logits(head) else views))
    return {k: sum(v.values()) if isinstance(v, dict) else v for k, v in terms.items()}


def _view(view: DetectorView, dtype: torch.dtype, leaves: List[Tensor]) -> DetectorView:
    """A copy of a view with new tensors of the same values; those with a gradient are leaves."""
    changed: Dict[int, Tensor] = {}

    def change(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if id(x) not in changed:
            changed[id(x)] = x.detach().to(dtype) if x.dtype == torch.float16 else x.detach()
            if x.requires_grad:
                changed[id(x)] = changed[id(x)].clone().requires_grad_()
                leaves.append(changed[id(x)])
        return changed[id(x)]

    found = copy.copy(view)
    found._autocast = autocast_now("cpu")
    found._recorded, found._versions = map_tensors(change, view._recorded), {}
    # A teacher's cached results are constants. A student's are recomputed, except for the regions:
    # they are random, and the teacher's results belong to them.
    known = view._answers.items()
    found._answers = {
        k: x if isinstance(x, Regions) else map_tensors(change, x)
        for k, x in known
        if isinstance(x, Regions) or not view._is_student
    }
    return found
