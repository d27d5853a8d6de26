"""One training step of a conformance case on some device."""

from contextlib import nullcontext
from typing import Any, Dict, List, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from d2kd.conformance.case import Case, Pair, find_case, pairs_of
from d2kd.distiller import Distiller
from d2kd.heads.registry import head_names

EVERY_CASE = pytest.mark.parametrize(
    "name, pair", [(name, pair) for name in head_names() for pair in pairs_of(name)], ids=str
)


class Step(NamedTuple):
    """`losses`: by name; `gradients`: of student and heads, on the CPU; `distiller`: it took it."""

    losses: Dict[str, float]
    gradients: List[Tensor]
    distiller: Distiller


class DrawOnCpu(TorchFunctionMode):
    """Random numbers are those of the CPU's generator, wherever they are asked for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.rand, torch.randn, torch.randint, torch.randperm):
            device = kwargs.pop("device", None)
            drawn = func(*args, **kwargs)
            return drawn if device is None else drawn.to(device)
        if func is torch.rand_like:
            drawn = torch.rand(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            return drawn.to(args[0].device)
        if func is Tensor.exponential_:
            drawn = torch.empty(args[0].shape, dtype=args[0].dtype).exponential_(*args[1:])
            return args[0].copy_(drawn)
        return func(*args, **kwargs)


def served(name: str, pair: Pair) -> Case:
    """The case; the test is skipped where the head refuses the pair."""
    case = find_case(name, pair)
    if case.refusal:
        pytest.skip("not served")
    return case


def take_step(case: Case, device: str, amp: bool = False, scale: float = 1.0) -> Step:
    """
    Forward and backward on two images, from the case's weights, with the same draws on any device.

    Args:
        scale: of the loss, by which gradients are divided again
    """
    distiller = case.fresh(own_teacher=True)
    distiller.to(device)
    with DrawOnCpu(), torch.autocast(device) if amp else nullcontext():
        losses = case.losses(distiller)
    (sum(losses.values()) * scale).backward()
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    return Step(
        {k: float(x) for k, x in losses.items()},
        [x.detach().float().cpu() / scale for x in gradients],
        distiller,
    )
