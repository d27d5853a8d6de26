"""
What operators cost on a GPU.

Each is a launch, which takes the host longer than the device needs for a small map; and a read,
such as `.item()` or a boolean mask as an index, waits until the device has done all its queued
work. On the CPU both are as cheap as any other line, so only counting shows them.
"""

from typing import Any, Dict, Sequence

import torch

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
