"""
How many operators a head runs, and how often it makes the host wait for the device.

On a GPU each operator is a launch, which takes the host longer than the device needs for a small
map; and a read, such as `.item()` or a boolean mask as an index, waits until the device has done
all its queued work. On the CPU both are as cheap as any other line, so only counting shows them.
"""

from contextlib import ExitStack
from typing import Any, Dict, Sequence, Tuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from d2kd.conformance.case import Case

# Their result's size, or value, is known on the host only when the device is done.
WAITS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "_unique2",
    "unique_dim",
    "bincount",
    "equal",
    "nms",
}


class OperatorCount(TorchDispatchMode):
    """Counts within a `with` block; `operators` without those that only make a view."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Dict[str, int] = {}
        self.waits: Dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if not only_makes_a_view(func, name):
            self.operators[name] = self.operators.get(name, 0) + 1
        if waits(name, args, kwargs):
            self.waits[name] = self.waits.get(name, 0) + 1
        return func(*args, **kwargs)


def count_operators(case: Case) -> OperatorCount:
    """Of the forward of a case's head; what the two detectors compute anyhow is there already."""
    distiller, count = case.fresh(), OperatorCount()
    head, given = distiller.heads[case.name], ExitStack()

    def before(module: Any, views: Tuple[Any, Any]) -> None:
        list(views[1].features.values())  # each is computed when it is first read
        if "dense" in distiller.requires:
            views[1].dense()
        given.enter_context(count)

    def after(*_: Any) -> None:
        given.close()

    head.register_forward_pre_hook(before)
    head.register_forward_hook(after)
    case.terms(distiller)
    return count


def only_makes_a_view(func: Any, name: str) -> bool:
    aliases = [x.alias_info for x in func._schema.returns]
    view = any(x is not None and not x.is_write for x in aliases)
    return view or name in ("empty", "empty_like", "_unsafe_view", "_local_scalar_dense")


def waits(name: str, args: Sequence[Any], kwargs: Dict[str, Any]) -> bool:
    if name in ("index", "index_put", "index_put_", "_index_put_impl_"):
        # A boolean index is turned into numbers, however many these may be.
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS
