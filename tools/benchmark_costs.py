"""What a distillation head costs by itself, whatever the machine: counted, not timed."""

from typing import Any, Callable, Dict, Iterable, Optional
from weakref import WeakSet

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from benchmark_parts import HeadAlone

try:
    from torch.utils import flop_counter
except ImportError:  # torch 2.0
    flop_counter = None


def head_costs(alone: HeadAlone) -> Dict[str, Any]:
    """
    Returns:
        "flops" of a step, None where torch cannot count them; "parameters", their number;
        "saved_bytes": what the forward keeps for the backward beside what was there before
    """
    return {
        "flops": count_flops(alone),
        "parameters": sum(p.numel() for p in alone.heads.parameters()),
        "saved_bytes": saved_bytes(alone.loss, alone.given()),
    }


def count_flops(step: Callable[[], Any]) -> Optional[int]:
    """Of convolutions and matrix products, 2 for a multiply-add; None with torch 2.0."""
    if flop_counter is None:
        return None
    with flop_counter.FlopCounterMode(display=False, custom_mapping=_fused_on_cpu()) as counter:
        step()
    return counter.get_total_flops()


def _fused_on_cpu() -> Dict[Any, Callable[..., int]]:
    """PyTorch counts the products in fused attention of a GPU, and not in that of a CPU."""

    def forward(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_flop_count(query, key, value)

    def backward(gradient: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return flop_counter.sdpa_backward_flop_count(gradient, query, key, value)

    name = "_scaled_dot_product_flash_attention_for_cpu"
    counts = {name: forward, f"{name}_backward": backward}
    aten = torch.ops.aten  # torch 2.1 has no such operator
    return {getattr(aten, x): count for x, count in counts.items() if hasattr(aten, x)}


class _Saved:
    """Dropped by autograd together with the graph that the tensor was saved for."""

    def __init__(self, tensor: Tensor):
        # A result that knows its graph would keep it alive, and with it what leads to no loss.
        self.tensor = tensor.detach()


def saved_bytes(forward: Callable[[], Tensor], leave_out: Iterable[Tensor] = ()) -> int:
    """
    Bytes that autograd holds for the backward of forward(), each storage counted once and whole: a
    saved slice keeps all of what it was cut from.

    Args:
        forward: returns the loss
        leave_out: tensors whose storages are not counted, such as parameters
    """
    alive = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        alive.add(saved)
        return saved

    known = {x.untyped_storage().data_ptr() for x in leave_out}
    with saved_tensors_hooks(pack, lambda saved: saved.tensor):
        loss = forward()  # held: what it was computed from stays alive, and nothing else does
    storages = [saved.tensor.untyped_storage() for saved in alive]
    del loss
    return sum({x.data_ptr(): x.nbytes() for x in storages if x.data_ptr() not in known}.values())
