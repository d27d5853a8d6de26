"""Checks of checkpoints: a head is restored exactly, and adds nothing to the student's state."""

import copy
import io
from collections import deque
from typing import Any, Dict, List

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from detectron2.utils.events import EventStorage

from ..distiller import Distiller
from ..utils.checks import shown
from .batches import batch
from .case import Case, seed_all


def check_checkpoint(case: Case) -> None:
    """
    After two steps a new head with the saved state gives exactly the same next loss, and has the
    same tensors and numbers after it; the student's state_dict has only the plain student's keys.
    """
    distiller = case.fresh()
    before = copy.deepcopy(_attributes(distiller.heads[case.name]))
    keys = list(distiller.student.state_dict())
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01, momentum=0.9)
    for seed in range(2):
        step(distiller, optimizer, batch(seed=seed), seed)
    _check_keys(case, distiller, keys)
    resumed = case.with_new_head(case.cfg, seed=99)
    resumed.student.load_state_dict(distiller.student.state_dict())
    _load(case, resumed, _saved(distiller))
    heads = distiller.heads[case.name], resumed.heads[case.name]
    lost = _unlike(*heads, before)
    expected = case.terms(distiller, seed=2)
    found = case.terms(resumed, seed=2)
    for key, x in expected.items():
        assert torch.equal(x, found[key]), (
            f"{case}: in the step after a resume {key} is {found[key].item():.9g}, without the "
            f"interruption {x.item():.9g}. State between steps, and random values drawn when the "
            "head is built, belong in its state_dict: nn.Parameter, register_buffer, modules in an "
            "nn.ModuleList or nn.ModuleDict, or get_extra_state and set_extra_state. Draw without "
            "a generator of its own: torch's, NumPy's and Python's are seeded in each step."
        )
    # Also what this loss does not depend on, such as a queue that is used when it is full. What
    # each step sets anew is the same by now.
    lost = [k for k in lost if k in _unlike(*heads, before)]
    assert not lost, (
        f"{case}: {shown(lost)} of the head changes in training, and is not the same after a "
        "resume. State between steps belongs in its state_dict: nn.Parameter, register_buffer, or "
        "get_extra_state and set_extra_state; numbers, too."
    )


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, inputs: List[Dict[str, Any]], seed: int
) -> None:
    """One training step; `model` may be wrapped in DistributedDataParallel."""
    seed_all(seed)
    optimizer.zero_grad()
    with EventStorage():
        losses = model(inputs)
    sum(losses.values()).backward()
    # Published loss weights are for large images and long schedules, and differ a thousandfold.
    clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def _unlike(head: nn.Module, resumed: nn.Module, before: Dict[str, Any]) -> List[str]:
    """Names of what changed since `before` and is not in both heads the same."""
    now, found = _attributes(head), _attributes(resumed)
    changed = [k for k, x in before.items() if k in now and not equal(x, now[k])]
    return [k for k in changed if k not in found or not equal(now[k], found[k])]


def _attributes(head: nn.Module) -> Dict[str, Any]:
    """Buffers, saved or not, and attributes that may be state, by name."""
    return {
        f"{prefix}.{name}" if prefix else name: x
        for prefix, module in head.named_modules()
        for name, x in [*vars(module).items(), *module.named_buffers(recurse=False)]
        if _is_data(x)
    }


def _is_data(x: Any) -> bool:
    """A tensor or a number, or a list of such."""
    if isinstance(x, (list, tuple, deque)):
        return all(map(_is_data, x))
    return isinstance(x, (Tensor, int, float))


def equal(a: Any, b: Any) -> bool:
    """Of tensors, to the bit, and what holds them."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        both = isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype
        return both and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(x, b[k]) for k, x in a.items())
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def _check_keys(case: Case, distiller: Distiller, keys: List[str]) -> None:
    more = [k for k in distiller.student.state_dict() if k not in keys]
    assert not more, (
        f"{case}: the head adds {', '.join(more[:3])} to the student's state_dict. Register its "
        "parameters in the head itself."
    )
    teacher = {id(x) for x in distiller.teacher.model.state_dict(keep_vars=True).values()}
    held = [k for k, x in distiller.state_dict(keep_vars=True).items() if id(x) in teacher]
    assert not held, (
        f"{case}: {', '.join(held[:3])} belongs to the teacher, and would be saved and trained "
        "with the head. Do not make a module of the teacher an attribute of the head."
    )


def _saved(distiller: Distiller) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(distiller.heads.state_dict(), file)
    file.seek(0)
    return file


def _load(case: Case, distiller: Distiller, file: io.BytesIO) -> None:
    try:
        distiller.heads.load_state_dict(torch.load(file, weights_only=True))
    except Exception as error:
        raise AssertionError(
            f"{case}: the head's state_dict cannot be saved and loaded: {error} Extra state must "
            "consist of tensors, numbers, strings, lists and dicts; buffers whose shape changes "
            "must be set in set_extra_state. Make layers in __init__: no optimizer has those that "
            "forward makes."
        ) from error
